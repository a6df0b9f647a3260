"""CosyVoice's flows at their published sizes against upstream's own code, with the same weights.

    python benchmarks/cosyvoice_flow.py --cosyvoice CHECKOUT --matcha CHECKOUT [--versions 1 2 3]
        [--only sentence four stream] [--runs 3] [--tiny]
        [--output benchmarks/RESULTS.md]

The checkouts are FunAudioLLM/CosyVoice and its submodule Matcha-TTS; what they import must be installed beside them.
Measured are a sentence, also with bfloat16 products where the processor has them, and four sentences offline (upstream
takes one at a time), and the whole work of a stream: what upstream computes anew for every piece, with the pieces of
its own loop, against what the caches leave to do. Every comparison checks first that both sides compute the same.
`--tiny` shortens everything to see that it runs.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from cosyvoice_peer import FLOWS, build_flow, import_peer
from timing import HEADER, Comparison, compare, report
from torch import Tensor, nn

from hf_speechllm.cpu_inference import has_bfloat16_products, unpack_linear_weights, use_bfloat16_products
from hf_speechllm.models.causal_token_to_mel import CausalTokenToMelModel
from hf_speechllm.models.modeling_cosyvoice_flow import CosyVoiceFlowModel
from hf_speechllm.models.token_to_mel import TokenToMelModel


# Seconds of the voice prompt, of a sentence, of four sentences, and of a stream.
SECONDS = {"prompt": 3.0, "sentence": 8.0, "four": (3.0, 5.0, 6.0, 9.0), "stream": 20.0}
TINY_SECONDS = {"prompt": 0.4, "sentence": 0.4, "four": (0.2, 0.4, 0.3, 0.5), "stream": 2.2}
# Upstream's stream: pieces of 25 tokens, then twice as many each time, up to 100.
FIRST_HOP, LONGEST_HOP = 25, 100
TOLERANCE = 1e-3


@dataclass
class Sentence:
    """One sentence: tokens `(1, n)`, and the prompt's tokens, mel `(1, t, 80)` and speaker `(1, 192)`."""

    tokens: Tensor
    prompt_tokens: Tensor
    prompt_mel: Tensor
    speaker: Tensor


def make_sentence(model: TokenToMelModel, seconds: float, prompt_seconds: float, seed: int) -> Sentence:
    """Random tokens, and a prompt whose mel is as long as its tokens say."""
    generator, config = torch.Generator().manual_seed(seed), model.config
    counts = [round(value * config.input_frame_rate) for value in (seconds, prompt_seconds)]
    frames = (
        config.num_frames(counts[1]) if isinstance(model, CosyVoiceFlowModel) else config.token_mel_ratio * counts[1]
    )
    tokens, prompt = (torch.randint(config.vocab_size, (1, count), generator=generator) for count in counts)
    return Sentence(
        tokens,
        prompt,
        torch.randn(1, frames, 80, generator=generator),
        torch.randn(1, 192, generator=generator),
    )


def run_peer(peer: nn.Module, sentence: Sentence, streaming: bool = False, finalize: bool = True) -> Tensor:
    """Upstream's inference, `(1, t, 80)`. Version 1 draws its noise from torch's global generator."""
    ours_like = (sentence.tokens, sentence.prompt_tokens, sentence.prompt_mel)
    inputs = [part for value in ours_like for part in (value, torch.tensor([value.shape[1]]))]
    if hasattr(peer, "length_regulator"):
        torch.manual_seed(0)
        mel, _ = peer.inference(*inputs, sentence.speaker, torch.zeros(1, 80, 0, 2))
    else:
        mel, _ = peer.inference(*inputs, sentence.speaker, streaming, finalize)
    return mel.transpose(1, 2)


def peer_noise(model: TokenToMelModel, sentence: Sentence) -> dict[str, Tensor]:
    """The noise that [`run_peer`] draws for version 1."""
    if not isinstance(model, CosyVoiceFlowModel):
        return {}
    frames = sentence.prompt_mel.shape[1] + model.config.num_frames(sentence.tokens.shape[1])
    torch.manual_seed(0)
    return {"noise": torch.randn(1, 80, frames).transpose(1, 2)}


def run_ours(model: TokenToMelModel, sentences: list[Sentence]) -> tuple[Tensor, Tensor]:
    """All sentences in one call: `(b, t, 80)` and its mask."""

    def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([row.shape[1] for row in rows])
        batch = nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)
        return batch, torch.arange(batch.shape[1]) < lengths[:, None]

    tokens, mask = padded([item.tokens for item in sentences])
    prompt_tokens, prompt_mask = padded([item.prompt_tokens for item in sentences])
    prompt_mel, prompt_mel_mask = padded([item.prompt_mel for item in sentences])
    noise = {}
    if isinstance(model, CosyVoiceFlowModel):
        noise = {"noise": padded([peer_noise(model, item)["noise"] for item in sentences])[0]}
    output = model.generate_mel(
        tokens,
        mask,
        prompt_tokens,
        prompt_mask,
        prompt_mel,
        prompt_mel_mask,
        torch.cat([item.speaker for item in sentences]),
        **noise,
    )
    return output.mel, output.mel_mask


def hops(num_tokens: int, num_prompt_tokens: int, lookahead: int) -> list[int]:
    """Tokens that have come at each piece of upstream's loop; the last is all of them."""
    hop, done, ends = FIRST_HOP, 0, []
    padding = -num_prompt_tokens % FIRST_HOP
    while True:
        wanted = hop + (padding if done == 0 else 0)
        if num_tokens - done < wanted + lookahead:
            return [*ends, num_tokens]
        done += wanted
        ends.append(done + lookahead)
        hop = min(LONGEST_HOP, 2 * hop)


def stream_peer(peer: nn.Module, sentence: Sentence, ends: list[int]) -> Tensor:
    """Upstream's loop: everything so far again at each piece, of which the new frames are kept.

    Upstream computes the last piece without chunks, which costs the same; here it has them, so that the pieces are
    those of one network.
    """
    pieces, done = [], 0
    for number, end in enumerate(ends):
        part = Sentence(sentence.tokens[:, :end], sentence.prompt_tokens, sentence.prompt_mel, sentence.speaker)
        mel = run_peer(peer, part, streaming=True, finalize=number == len(ends) - 1)
        pieces.append(mel[:, done:])
        done = mel.shape[1]
    return torch.cat(pieces, dim=1)


def stream_ours(model: CausalTokenToMelModel, sentence: Sentence, ends: list[int]) -> Tensor:
    """The same pieces from the caches."""
    state = model.start_stream(sentence.speaker, sentence.prompt_tokens, None, sentence.prompt_mel)
    pieces, done = [], 0
    for end in ends:
        piece, state = model.stream_mel(state, sentence.tokens[:, done:end], is_last=end == ends[-1])
        pieces.append(piece.mel)
        done = end
    return torch.cat(pieces, dim=1)


def check_equal(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Stop where the two sides differ by more than rounding."""
    difference = float((ours - theirs).abs().max() / (1 + theirs.abs().max()))
    if ours.shape != theirs.shape or not difference <= TOLERANCE:
        raise SystemExit(f"{what}: expected equal spectrograms, got {difference} apart")


def compare_precisions(
    model: TokenToMelModel,
    exact: Tensor,
    name: str,
    goal: str,
    peer: Callable[[], object],
    ours: Callable[[], Tensor],
    runs: int,
) -> Iterator[Comparison]:
    """Both sides in float32, then ours with bfloat16 products, and how far that is from `exact`."""
    yield compare(name, goal, peer, ours, runs=runs, warm_up=False)
    if not has_bfloat16_products():
        return
    use_bfloat16_products(model)
    error = float((ours() - exact).norm() / exact.norm())
    yield compare(f"{name}, ours in bfloat16 (mel {100 * error:.1f} % off)", "", peer, ours, runs=runs, warm_up=False)
    unpack_linear_weights(model)
    model.set_attn_implementation("sdpa")


def compare_sentence(
    version: int, peer: nn.Module, model: TokenToMelModel, seconds: dict, runs: int
) -> Iterator[Comparison]:
    """One sentence, and again with bfloat16 products."""
    one = make_sentence(model, seconds["sentence"], seconds["prompt"], seed=0)
    exact = run_ours(model, [one])[0]
    check_equal(exact, run_peer(peer, one), f"version {version}")
    name = f"CosyVoice {version} flow, {seconds['sentence']:g} s"
    yield from compare_precisions(
        model, exact, name, ">= 1.1", lambda: run_peer(peer, one), lambda: run_ours(model, [one])[0], runs
    )


def compare_four(
    version: int, peer: nn.Module, model: TokenToMelModel, seconds: dict, runs: int
) -> Iterator[Comparison]:
    """Four sentences in one call, against one after the other."""
    four = [make_sentence(model, length, seconds["prompt"], seed=row) for row, length in enumerate(seconds["four"])]
    mels, mask = run_ours(model, four)
    for mel, real, item in zip(mels, mask, four, strict=True):
        check_equal(mel[real][None], run_peer(peer, item), f"version {version}, four sentences")
    name = f"CosyVoice {version} flow, 4 sentences, {sum(seconds['four']):g} s"
    yield from compare_precisions(
        model,
        mels,
        name,
        ">= 2",
        lambda: [run_peer(peer, item) for item in four],
        lambda: run_ours(model, four)[0],
        runs,
    )


def compare_stream(
    version: int, peer: nn.Module, model: TokenToMelModel, seconds: dict, runs: int
) -> Iterator[Comparison]:
    """All work of a stream; version 1 has none that is exact."""
    if not isinstance(model, CausalTokenToMelModel):
        return
    long = make_sentence(model, seconds["stream"], seconds["prompt"], seed=9)
    ends = hops(long.tokens.shape[1], long.prompt_tokens.shape[1], model.config.num_lookahead_tokens)
    check_equal(stream_ours(model, long, ends), stream_peer(peer, long, ends), f"version {version}, stream")
    yield compare(
        f"CosyVoice {version} flow, stream of {seconds['stream']:g} s in {len(ends)} pieces, all work",
        ">= 2",
        lambda: stream_peer(peer, long, ends),
        lambda: stream_ours(model, long, ends),
        runs=runs,
        warm_up=False,
    )


COMPARISONS = {"sentence": compare_sentence, "four": compare_four, "stream": compare_stream}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cosyvoice", type=Path, required=True, help="checkout of FunAudioLLM/CosyVoice")
    parser.add_argument("--matcha", type=Path, required=True, help="checkout of shivammehta25/Matcha-TTS")
    parser.add_argument("--dependencies", type=Path, help="folder with the packages that their imports need")
    parser.add_argument("--versions", type=int, nargs="+", choices=sorted(FLOWS), default=sorted(FLOWS))
    parser.add_argument("--only", nargs="+", choices=COMPARISONS, default=list(COMPARISONS))
    parser.add_argument("--runs", type=int, default=3, help="of both sides, after the one that checks them")
    parser.add_argument("--tiny", action="store_true", help="seconds of audio, to see that it runs")
    parser.add_argument("--output", type=Path, help="append the table to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    import_peer(arguments.cosyvoice, arguments.matcha, arguments.dependencies)

    report(HEADER, arguments.output)
    seconds = TINY_SECONDS if arguments.tiny else SECONDS
    with torch.inference_mode():
        for version in arguments.versions:
            peer, model = build_flow(version)
            for name in arguments.only:
                for comparison in COMPARISONS[name](version, peer, model, seconds, arguments.runs):
                    report(comparison.row(), arguments.output)


if __name__ == "__main__":
    main()
