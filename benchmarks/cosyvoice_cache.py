"""What a stream of CosyVoice 2 or 3 remembers in its flow: memory at the published sizes, and what rounding it costs.

    python benchmarks/cosyvoice_cache.py [--versions 2 3] [--left 4] [--error] [--seconds 4] [--model FOLDER]

Memory needs no weights that mean anything: one chunk goes through a flow with random ones, for real, and the state is
asked. `--error` also streams the given seconds with keys and values stored in every type, and compares the
spectrograms (natural logarithm) with those of the exact stream. `--model` does that with a model that was trained, a
folder of `CosyVoiceForTextToWaveform` such as `pretrained/cosyvoice_digits`, and nothing else.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from hf_speechllm.models.causal_token_to_mel import CausalMelStream, CausalTokenToMelModel
from hf_speechllm.models.configuration_cosyvoice2_flow import CosyVoice2FlowConfig
from hf_speechllm.models.configuration_cosyvoice3_flow import CosyVoice3FlowConfig
from hf_speechllm.models.modeling_cosyvoice import CosyVoiceForTextToWaveform
from hf_speechllm.models.modeling_cosyvoice2_flow import CosyVoice2FlowModel
from hf_speechllm.models.modeling_cosyvoice3_flow import CosyVoice3FlowModel


FLOWS = {2: (CosyVoice2FlowConfig, CosyVoice2FlowModel), 3: (CosyVoice3FlowConfig, CosyVoice3FlowModel)}
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
FRAMES_PER_SECOND = 50


def build(version: int) -> CausalTokenToMelModel:
    """A flow of the published size with random weights."""
    torch.manual_seed(0)
    config_class, model_class = FLOWS[version]
    return model_class(config_class()).eval()


def stream(
    flow: CausalTokenToMelModel, tokens: Tensor, speaker: Tensor, dtype: torch.dtype | None, **options
) -> tuple[Tensor, CausalMelStream]:
    """The mel `(1, t, m)` of tokens `(1, n)` that come a chunk at a time, and the last state."""
    state, pieces = flow.start_stream(speaker, cache_dtype=dtype, **options), []
    for piece in tokens.split(flow.chunk_tokens, dim=1):
        output, state = flow.stream_mel(state, piece)
        pieces.append(output.mel)
    return torch.cat(pieces, dim=1), state


def memory(name: str, flow: CausalTokenToMelModel, num_left_chunks: int) -> None:
    """Rows of the first table."""
    count = flow.chunk_tokens + flow.config.num_lookahead_tokens
    tokens = torch.zeros(1, count, dtype=torch.long)
    speaker = torch.ones(1, flow.config.speaker_embedding_size)
    chunk_frames = flow.chunk_tokens * flow.config.token_mel_ratio
    for kind, dtype in DTYPES.items():
        _, state = stream(flow, tokens, speaker, dtype)
        per_frame = state.bytes_per_frame / 1e6
        bound = num_left_chunks * chunk_frames * per_frame
        print(f"| {name} | {kind} | {per_frame:.2f} | {FRAMES_PER_SECOND * per_frame:.0f} | {bound:.0f} |", flush=True)


def error(name: str, flow: CausalTokenToMelModel, tokens: Tensor, speaker: Tensor) -> None:
    """Rows of the second table."""
    exact, _ = stream(flow, tokens, speaker, None)
    for kind, dtype in DTYPES.items():
        if dtype is not None:
            difference = (stream(flow, tokens, speaker, dtype)[0] - exact).abs()
            print(
                f"| {name} | {kind} | {float(difference.mean()):.1e} | {float(difference.max()):.1e} "
                f"| {float(exact.std()):.2f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, nargs="+", choices=sorted(FLOWS), default=sorted(FLOWS))
    parser.add_argument("--left", type=int, default=4, help="num_left_chunks for which the bound is printed")
    parser.add_argument("--error", action="store_true", help="what rounding the cache changes")
    parser.add_argument("--seconds", type=float, default=4.0, help="of speech, for --error")
    parser.add_argument("--model", type=Path, help="a trained model for --error, and nothing else")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    flows: dict[str, CausalTokenToMelModel] = {}
    with torch.inference_mode():
        if arguments.model is not None:
            model = CosyVoiceForTextToWaveform.from_pretrained(arguments.model).eval()
            if not isinstance(model.flow, CausalTokenToMelModel):
                raise SystemExit(f"{arguments.model}: expected version 2 or 3, got {model.config.version}")
            flows[arguments.model.name] = model.flow
        else:
            flows = {f"CosyVoice {version}": build(version) for version in arguments.versions}
            print(f"| flow | stored as | MB per mel frame | MB per second | MB with {arguments.left} left chunks |")
            print("|---|---|---|---|---|")
            for name, flow in flows.items():
                memory(name, flow, arguments.left)
            print()
        if arguments.error or arguments.model is not None:
            print(
                "| flow | stored as | mean difference | largest | spread of the spectrogram |\n|---|---|---|---|---|"
            )
            for name, flow in flows.items():
                config = flow.config
                count = round(arguments.seconds * config.input_frame_rate)
                tokens = torch.randint(config.vocab_size, (1, count), generator=generator)
                error(name, flow, tokens, torch.randn(1, config.speaker_embedding_size, generator=generator))


if __name__ == "__main__":
    main()
