"""CosyVoice 2 and 3: time from the call to the first piece of waveform, against upstream's loop.

    python benchmarks/cosyvoice_first_packet.py --cosyvoice CHECKOUT --matcha CHECKOUT [--dependencies FOLDER]
        [--versions 2 3] [--prompt 3.0] [--runs 3] [--tiny] [--output benchmarks/RESULTS.md]

The checkouts are FunAudioLLM/CosyVoice and its submodule Matcha-TTS; FOLDER holds what their imports need. Both sides
have the published shapes and the same random weights, a voice prompt that is encoded already, and a text of 20 tokens.
Our vocoder has folded weights (`fold_weight_norm`); upstream's function for that fails with its own layers. Time is
CPU time on one thread, the least of all runs; after the table of the parts come the rows that `timing.py` makes of the
whole.

* upstream is `tts` of `cosyvoice/cli/model.py` without its thread and its sleeps of 100 ms: the language model until
  there are enough tokens, the flow over prompt and tokens, the vocoder over the new frames, of which the overlap with
  the next piece is held back;
* ours is `stream_speech`. Its flow has two parts: the prompt, which is done as soon as the voice is known and may be
  kept (`CausalMelStream.clone`), and the piece. What the language model takes includes everything else. Once more with
  bfloat16 products where the processor has them.

The spectrograms are compared first. `--tiny` has a small language model, a short prompt, and one run.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from cosyvoice_peer import PUBLISHED_LM, TINY_LM, build_flow, build_vocoder, import_peer, ours_lm, peer_lm
from timing import HEADER, Comparison, report
from torch import Tensor, nn

from hf_speechllm.cpu_inference import has_bfloat16_products, use_bfloat16_products
from hf_speechllm.models.configuration_cosyvoice import CosyVoiceConfig
from hf_speechllm.models.modeling_cosyvoice import CosyVoiceForTextToWaveform
from hf_speechllm.models.streaming_cosyvoice import stream_speech


SPEECH_SIZE, END_OF_PROMPT = 6561, 151646
WORDS = 20
# Tokens of upstream's first piece: a hop, what fills up the last chunk of the prompt, and the look-ahead.
HOP, LOOKAHEAD = 25, 3
OVERLAP_SAMPLES = 8 * 480
# An answer of random weights must not end before the first piece.
RATIO = 10.0
TOLERANCE = 1e-3
PARTS = ("language model", "flow, prompt", "flow, piece", "vocoder")
PARTS_HEADER = f"| version | side | {', ms | '.join(PARTS)}, ms | all, ms | audio of it, ms |\n|{'---|' * 8}"


@dataclass
class FirstPiece:
    """Seconds of each part of one run, and the samples that came out."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    samples: int = 0

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        """Add what happens inside to a part."""
        start = time.process_time()
        yield
        self.seconds[part] += time.process_time() - start

    def row(self, version: int, side: str, sampling_rate: int) -> str:
        """A line of the table."""
        times = " | ".join(f"{1e3 * self.seconds[part]:.0f}" for part in PARTS)
        audio = 1e3 * self.samples / sampling_rate
        return f"| {version} | {side} | {times} | {1e3 * self.total:.0f} | {audio:.0f} |"


@dataclass
class Request:
    """A text and an encoded voice: ids `(1, n)`, mel `(1, t, 80)`, speaker `(1, 192)`."""

    text: Tensor
    prompt_text: Tensor
    prompt_speech: Tensor
    prompt_mel: Tensor
    speaker: Tensor


def make_request(version: int, prompt_seconds: float) -> Request:
    """Random; the text of version 3 has the token that ends its instruction."""
    generator = torch.Generator().manual_seed(0)

    def ids(size: int, count: int) -> Tensor:
        return torch.randint(1, size, (1, count), generator=generator)

    tokens = round(25 * prompt_seconds)
    prompt_text = ids(1000, WORDS)
    if version == 3:
        prompt_text[0, 0] = END_OF_PROMPT
    mel, speaker = (torch.randn(shape, generator=generator) for shape in ((1, 2 * tokens, 80), (1, 192)))
    return Request(ids(1000, WORDS), prompt_text, ids(SPEECH_SIZE, tokens), mel, speaker)


@dataclass
class Peer:
    """Upstream's three networks."""

    lm: nn.Module
    flow: nn.Module
    vocoder: nn.Module


def peer_mel(peer: Peer, request: Request, tokens: Tensor) -> Tensor:
    """`(1, 80, t)`: what upstream's flow computes for its first piece."""
    inputs = [
        part
        for value in (tokens, request.prompt_speech, request.prompt_mel)
        for part in (value, torch.tensor([value.shape[1]]))
    ]
    return peer.flow.inference(*inputs, request.speaker, streaming=True, finalize=False)[0]


def peer_first_piece(version: int, peer: Peer, request: Request) -> FirstPiece:
    """Upstream's loop up to its first `yield`."""
    piece = FirstPiece()
    needed = HOP + -request.prompt_speech.shape[1] % HOP + LOOKAHEAD
    with piece.clock("language model"):
        inputs = [
            part
            for value in (request.text, request.prompt_text, request.prompt_speech)
            for part in (value, torch.tensor([value.shape[1]]))
        ]
        answer = peer.lm.inference(
            *inputs, torch.zeros(0, 192), min_token_text_ratio=RATIO, max_token_text_ratio=2 * RATIO
        )
        tokens = torch.tensor([list(itertools.islice(answer, needed))]).clamp(max=SPEECH_SIZE - 1)
    assert tokens.shape[1] == needed, "upstream's answer ended before its first piece"
    with piece.clock("flow, piece"):
        mel = peer_mel(peer, request, tokens)
    with piece.clock("vocoder"):
        if version == 2:
            waveform, _ = peer.vocoder.inference(speech_feat=mel, cache_source=torch.zeros(1, 1, 0))
            waveform = waveform[:, :-OVERLAP_SAMPLES]
        else:
            waveform, _ = peer.vocoder.inference(speech_feat=mel, finalize=False)
    piece.samples = waveform.shape[1]
    return piece


@contextmanager
def timed(piece: FirstPiece, module: nn.Module, method: str, part: str) -> Iterator[None]:
    """Add the time of a method of a module to a part while inside."""
    original = getattr(module, method)

    def measured(*arguments, **options):
        with piece.clock(part):
            return original(*arguments, **options)

    setattr(module, method, measured)
    yield
    delattr(module, method)


def ours_first_piece(model: CosyVoiceForTextToWaveform, request: Request) -> FirstPiece:
    """The first piece of `stream_speech`."""
    piece = FirstPiece()
    inputs = {
        "input_ids": request.text,
        "prompt_input_ids": request.prompt_text,
        "prompt_speech_ids": request.prompt_speech,
        "prompt_mel": request.prompt_mel,
        "speaker_embedding": request.speaker,
    }
    with (
        timed(piece, model.flow, "start_stream", "flow, prompt"),
        timed(piece, model.flow, "stream_mel", "flow, piece"),
        timed(piece, model.vocoder, "stream", "vocoder"),
    ):
        start = time.process_time()
        stream = stream_speech(model, inputs, min_token_text_ratio=RATIO, max_token_text_ratio=2 * RATIO)
        piece.samples = next(stream).shape[1]
        whole = time.process_time() - start
    piece.seconds["language model"] = whole - piece.total
    return piece


def build(version: int, tiny: bool) -> tuple[Peer, CosyVoiceForTextToWaveform]:
    """Upstream's networks, and ours with their weights. The encoders of a voice are not needed, and have none."""
    sizes = {**TINY_LM, "vocab_size": PUBLISHED_LM["vocab_size"]} if tiny else PUBLISHED_LM
    lm = peer_lm(version, sizes, SPEECH_SIZE)
    if version == 3:
        # Before the minimal length upstream forbids only one of the 200 ids that end an answer, and random weights
        # soon say another.
        lm.stop_token_ids = []
    flow, our_flow = build_flow(version)
    vocoder, our_vocoder = build_vocoder(version)
    our_vocoder.fold_weight_norm()
    our_lm = ours_lm(version, lm, sizes, SPEECH_SIZE)
    config = CosyVoiceConfig(
        version=version,
        lm_config=our_lm.config,
        flow_config=our_flow.config,
        vocoder_config=our_vocoder.config,
    )
    with torch.device("meta"):
        model = CosyVoiceForTextToWaveform(config)
    model.lm, model.flow, model.vocoder = our_lm, our_flow, our_vocoder
    return Peer(lm, flow, vocoder), model.eval()


def check_mel(peer: Peer, model: CosyVoiceForTextToWaveform, request: Request) -> None:
    """Both flows make the same first frames of the same tokens."""
    needed = HOP + -request.prompt_speech.shape[1] % HOP + LOOKAHEAD
    tokens = torch.randint(SPEECH_SIZE, (1, needed), generator=torch.Generator().manual_seed(1))
    expected = peer_mel(peer, request, tokens).transpose(1, 2)
    state = model.flow.start_stream(request.speaker, request.prompt_speech, None, request.prompt_mel)
    found = model.flow.stream_mel(state, tokens)[0].mel
    difference = float((found - expected).abs().max() / (1 + expected.abs().max()))
    if found.shape != expected.shape or not difference <= TOLERANCE:
        raise SystemExit(f"expected equal spectrograms, got {difference} apart")


def measure(version: int, arguments: argparse.Namespace) -> Comparison:
    """Both sides in turn, after one run of each to warm up."""
    peer, model = build(version, arguments.tiny)
    request = make_request(version, arguments.prompt)
    check_mel(peer, model, request)
    theirs, ours = [], []
    for run in range(arguments.runs + 1):
        pair = peer_first_piece(version, peer, request), ours_first_piece(model, request)
        if run:
            theirs.append(pair[0])
            ours.append(pair[1])
    sides = {"upstream": theirs, "ours": ours}
    if has_bfloat16_products():
        use_bfloat16_products(model)
        sides["ours in bfloat16"] = [ours_first_piece(model, request) for _ in range(arguments.runs + 1)][1:]
    for side, pieces in sides.items():
        fastest = min(pieces, key=lambda piece: piece.total)
        report(fastest.row(version, side, model.config.sampling_rate), arguments.output)
    name = f"CosyVoice {version}, first piece, prompt of {arguments.prompt:g} s"
    return Comparison(name, "-", [piece.total for piece in theirs], [piece.total for piece in ours])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cosyvoice", type=Path, required=True, help="checkout of FunAudioLLM/CosyVoice")
    parser.add_argument("--matcha", type=Path, required=True, help="checkout of shivammehta25/Matcha-TTS")
    parser.add_argument("--dependencies", type=Path, help="folder with the packages that their imports need")
    parser.add_argument("--versions", type=int, nargs="+", choices=[2, 3], default=[2, 3])
    parser.add_argument("--prompt", type=float, default=3.0, help="seconds of the voice prompt")
    parser.add_argument("--runs", type=int, default=3, help="of both sides, after one to warm up")
    parser.add_argument("--tiny", action="store_true", help="to see that it runs")
    parser.add_argument("--output", type=Path, help="append the tables to this file")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.prompt, arguments.runs = 0.4, 1
    torch.set_num_threads(1)
    import_peer(arguments.cosyvoice, arguments.matcha, arguments.dependencies)

    report(PARTS_HEADER, arguments.output)
    with torch.inference_mode():
        rows = [measure(version, arguments).row() for version in arguments.versions]
    report("\n" + "\n".join([HEADER, *rows]), arguments.output)


if __name__ == "__main__":
    main()
