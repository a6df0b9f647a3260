"""CosyVoice's HiFT vocoders at their published sizes against upstream's own code, with the same weights.

    python benchmarks/cosyvoice_vocoder.py --cosyvoice CHECKOUT --matcha CHECKOUT [--versions 1 2 3] [--runs 3]
        [--tiny] [--output benchmarks/RESULTS.md]

The checkouts are FunAudioLLM/CosyVoice and its submodule Matcha-TTS; what they import must be installed beside them.
Measured are a sentence with weights as they are converted and as plain weights, four sentences in one call (upstream
takes one at a time), and the whole work of a stream: upstream vocodes an overlap twice (versions 1 and 2) or all
frames so far (version 3), with the pieces of its own loop. Every comparison checks first that both sides compute the
same, a stream that it is the waveform of one pass. `--tiny` shortens everything to see that it runs.
"""

import argparse
from pathlib import Path

import torch
from cosyvoice_peer import build_vocoder, import_peer
from timing import HEADER, Comparison, compare
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hf_speechllm.models.modeling_cosyvoice_hift import CosyVoiceHiftModel


# Seconds of a sentence, of four sentences, and of a stream.
SECONDS = {"sentence": 8.0, "four": (3.0, 5.0, 6.0, 9.0), "stream": 20.0}
TINY_SECONDS = {"sentence": 0.5, "four": (0.3, 0.5, 0.4, 0.6), "stream": 1.5}
# Upstream's stream: pieces of 25 tokens or one second, then twice as many each time, up to 100.
PIECE_SECONDS = {1: (2.0, 2.0, 2.0), 2: (1.0, 2.0, 4.0), 3: (1.0, 2.0, 4.0)}
TOLERANCE = 2e-3
STREAM_TOLERANCE = 1e-4


def make_mel(seconds: float, model: CosyVoiceHiftModel, seed: int = 0) -> Tensor:
    """Noise in the place of a log-mel spectrogram, `(1, t, 80)`."""
    frames = round(seconds * model.config.sampling_rate / model.config.hop_length)
    return torch.randn(1, frames, 80, generator=torch.Generator().manual_seed(seed)) - 4.0


def run_peer(peer: nn.Module, mel: Tensor) -> Tensor:
    """Upstream's inference, `(1, samples)`; its noise comes from torch's global generator."""
    return peer.inference(speech_feat=mel.transpose(1, 2))[0]


def peer_noise(peer: nn.Module, model: CosyVoiceHiftModel, frames: int) -> dict[str, Tensor]:
    """What [`run_peer`] draws after seed 0, in the order and memory layout in which it draws."""
    samples = frames * model.config.hop_length
    if model.config.is_causal:
        return {"noise": peer.m_source.l_sin_gen.sine_waves[:, :samples]}
    torch.manual_seed(0)
    phase = (torch.rand(1, 9) * 2 - 1) * torch.pi
    # Filled in place: torch draws differently for a tensor that is not contiguous, which version 2's is not.
    noise = torch.empty(1, 9, samples)
    if model.config.phase_interpolation == "sample":
        noise.normal_()
    else:
        noise.transpose(1, 2).normal_()
    return {"noise": noise.transpose(1, 2), "phase": phase}


def check_pair(peer: nn.Module, ours: CosyVoiceHiftModel, mel: Tensor) -> None:
    """Both give one waveform for the same noise."""
    torch.manual_seed(0)
    expected = run_peer(peer, mel)
    found = ours(mel, **peer_noise(peer, ours, mel.shape[1]), compatibility="upstream").waveform
    difference = float((found - expected).abs().max())
    assert difference < TOLERANCE, f"waveforms differ by {difference}"


def offline(version: int, peer: nn.Module, ours: CosyVoiceHiftModel, seconds: dict, runs: int) -> list[Comparison]:
    """One sentence and four."""
    mel = make_mel(seconds["sentence"], ours)
    check_pair(peer, ours, mel)
    rows = [make_mel(length, ours, seed)[0] for seed, length in enumerate(seconds["four"])]
    batch = pad_sequence(rows, batch_first=True)
    mask = torch.arange(batch.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    name = f"HiFT {version}, {seconds['sentence']:g} s"
    results = [compare(f"{name}, as converted", "", lambda: run_peer(peer, mel), lambda: ours(mel), runs)]
    ours.fold_weight_norm()
    check_pair(peer, ours, mel)
    results.append(compare(f"{name}, folded", "1.1", lambda: run_peer(peer, mel), lambda: ours(mel), runs))
    four = " + ".join(f"{length:g}" for length in seconds["four"])
    results.append(
        compare(
            f"HiFT {version}, {four} s in a batch, folded",
            "",
            lambda: [run_peer(peer, row[None]) for row in rows],
            lambda: ours(batch, mel_mask=mask),
            runs,
        )
    )
    return results


def pieces_of(version: int, mel: Tensor, model: CosyVoiceHiftModel) -> list[Tensor]:
    """The frames of upstream's pieces."""
    per_second = model.config.sampling_rate / model.config.hop_length
    pieces, first = [], 0
    lengths = [round(length * per_second) for length in PIECE_SECONDS[version]]
    while first < mel.shape[1]:
        length = lengths[min(len(pieces), len(lengths) - 1)]
        pieces.append(mel[:, first : first + length])
        first += length
    return pieces


def stream_peer(version: int, peer: nn.Module, pieces: list[Tensor], model: CosyVoiceHiftModel) -> Tensor:
    """What `token2wav` of `cosyvoice/cli/model.py` has the vocoder do for each piece."""
    done: list[Tensor] = []
    if version == 3:
        for index in range(len(pieces)):
            so_far = torch.cat(pieces[: index + 1], dim=1).transpose(1, 2)
            waveform, _ = peer.inference(speech_feat=so_far, finalize=index == len(pieces) - 1)
            done.append(waveform[:, sum(piece.shape[1] for piece in done) :])
        return torch.cat(done, dim=1)
    from cosyvoice.utils.common import fade_in_out

    frames = model.config.overlap_frames
    overlap = frames * model.config.hop_length
    window = torch.hamming_window(2 * overlap, periodic=False)
    mel_before, source, before = torch.zeros(1, 80, 0), torch.zeros(1, 1, 0), None
    for index, piece in enumerate(pieces):
        mel = torch.cat((mel_before, piece.transpose(1, 2)), dim=2)
        waveform, new_source = peer.inference(speech_feat=mel, cache_source=source)
        if before is not None:
            waveform = fade_in_out(waveform, before, window)
        mel_before, source, before = mel[:, :, -frames:], new_source[:, :, -overlap:], waveform[:, -overlap:]
        done.append(waveform if index == len(pieces) - 1 else waveform[:, :-overlap])
    return torch.cat(done, dim=1)


def stream_ours(model: CosyVoiceHiftModel, pieces: list[Tensor], **options: Tensor) -> Tensor:
    """The exact stream."""
    state, done = model.start_stream(**options), []
    for index, piece in enumerate(pieces):
        waveform, state = model.stream(piece, state, is_last=index == len(pieces) - 1)
        done.append(waveform)
    return torch.cat(done, dim=1)


def streaming(version: int, peer: nn.Module, ours: CosyVoiceHiftModel, seconds: dict, runs: int) -> Comparison:
    """The whole work of a stream; `ours` has plain weights."""
    mel = make_mel(seconds["stream"], ours)
    pieces = pieces_of(version, mel, ours)
    drawn = peer_noise(peer, ours, mel.shape[1])
    difference = float((stream_ours(ours, pieces, **drawn) - ours(mel, **drawn).waveform).abs().max())
    assert difference < STREAM_TOLERANCE, f"stream and one pass differ by {difference}"
    samples = mel.shape[1] * ours.config.hop_length
    assert stream_peer(version, peer, pieces, ours).shape[1] == samples
    return compare(
        f"HiFT {version}, stream of {seconds['stream']:g} s in {len(pieces)} pieces, folded",
        "",
        lambda: stream_peer(version, peer, pieces, ours),
        lambda: stream_ours(ours, pieces),
        runs,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cosyvoice", type=Path, required=True, help="checkout of FunAudioLLM/CosyVoice")
    parser.add_argument("--matcha", type=Path, required=True, help="checkout of Matcha-TTS")
    parser.add_argument("--dependencies", type=Path, help="folder with the packages that their imports need")
    parser.add_argument("--versions", type=int, nargs="+", choices=[1, 2, 3], default=[1, 2, 3])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="a fraction of the audio, to see that it runs")
    parser.add_argument("--output", type=Path, help="append the table to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    import_peer(arguments.cosyvoice, arguments.matcha, arguments.dependencies)
    lines = [HEADER]
    print(HEADER, flush=True)
    seconds = TINY_SECONDS if arguments.tiny else SECONDS
    with torch.inference_mode():
        for version in arguments.versions:
            peer, ours = build_vocoder(version)
            results = offline(version, peer, ours, seconds, arguments.runs)
            for result in [*results, streaming(version, peer, ours, seconds, arguments.runs)]:
                print(result.row(), flush=True)
                lines.append(result.row())
    if arguments.output is not None:
        with arguments.output.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
