"""The HiFT vocoder against CosyVoice: fundamental frequency, excitation, the network's stages, waveforms, streams."""

from pathlib import Path

import torch
from cosyvoice_hift import convert
from torch import Tensor
from transformers import AutoModel

import hf_speechllm  # noqa: F401  registers the Auto classes
from hf_speechllm.models.edge_convolution import WholePass
from hf_speechllm.models.modeling_cosyvoice_hift import CosyVoiceHiftModel

from .case import Case


# What the rounding of upstream's fundamental frequency may do to a waveform.
_DOUBLE_ATOL = 2e-3
# Frames of version 3 that its first pass over a beginning keeps back: three for the fundamental frequency, four for
# the first convolution, and one.
_UPSTREAM_LOOK_AHEAD = 8


def check_hift(case: Case, work: Path) -> None:
    """Convert the pack of `case` into `work` and check every expected value."""
    convert(case.directory, work / "model")
    model = AutoModel.from_pretrained(work / "model").eval()
    with torch.no_grad():
        if model.config.is_causal:
            check_causal(case, model)
        else:
            for call in sorted({name.split(".")[0] for name in case.tensors}):
                check_call(case, model, call)
        model.fold_weight_norm()
        check_folded(case, model)


def check_call(case: Case, model: CosyVoiceHiftModel, call: str) -> None:
    """One call of versions 1 and 2, with the numbers that upstream drew."""
    tensors = {name.split(".", 1)[1]: tensor for name, tensor in case.tensors.items() if name.startswith(f"{call}.")}
    mel = tensors["mel"].transpose(1, 2)
    noise, phase = drawn(tensors)
    # An initial phase of version 2 has no effect, see `sine_source.py`.
    case.use(*(f"{call}.{name}" for name in ("mel", "noise", "phase", "rand_ini", "cache_source") if name in tensors))
    cached = tensors["cache_source"][:, 0]
    output = model(mel, noise=noise, phase=phase, cached_source=cached, compatibility="upstream")
    case.compare(f"{call}.f0", output.f0)
    voiced = (output.f0 > model.config.voiced_threshold).float().repeat_interleave(model.config.hop_length, dim=1)
    case.compare(f"{call}.uv", voiced[..., None])
    case.compare(f"{call}.sine", model.sines(tensors["f0"], noise, phase, compatibility="upstream"))
    case.compare(f"{call}.source", output.source[:, None])
    case.compare(f"{call}.conv_pre", WholePass().conv(model.conv_pre, mel.transpose(1, 2)))
    case.compare(f"{call}.conv_post", model.spectrum(mel, output.source))
    case.compare(f"{call}.wav", output.waveform)
    if not cached.shape[1]:
        # The default, whose fundamental frequency is found in double precision, in one pass and in a stream.
        expected = model(mel, noise=noise, phase=phase).waveform
        case.compare(f"{call}.wav (double precision)", expected, tensors["wav"], atol=_DOUBLE_ATOL)
        streamed = stream(model, mel, [3] * mel.shape[1], noise=noise, phase=phase)
        case.compare(f"{call}.wav (streamed)", streamed, expected, atol=1e-5)


def drawn(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Noise `(b, n, h)` and initial phase `(b, h)`; version 1 stores both with the harmonics in front."""
    if "phase" in tensors:
        return tensors["noise"].transpose(1, 2), tensors["phase"][..., 0]
    return tensors["noise"], None


def stream(model: CosyVoiceHiftModel, mel: Tensor, sizes: list[int], **options: Tensor | None) -> Tensor:
    """The waveform of `mel` `(b, t, 80)` in pieces of `sizes` frames."""
    state, pieces, first = model.start_stream(len(mel), **options), [], 0
    for size in sizes:
        last = first + size >= mel.shape[1]
        waveform, state = model.stream(mel[:, first : first + size], state, is_last=last)
        pieces.append(waveform)
        first += size
        if last:
            break
    return torch.cat(pieces, dim=1)


def check_causal(case: Case, model: CosyVoiceHiftModel) -> None:
    """Version 3: one pass, and upstream's pass over a beginning."""
    tensors = case.tensors
    mel, noise = tensors["mel"].transpose(1, 2), tensors["buf.sine_noise"]
    # The initial phase has no effect, see `sine_source.py`.
    case.use("mel", "buf.rand_ini", "buf.sine_noise")
    output = model(mel, noise=noise, compatibility="upstream")
    case.compare("full.f0", output.f0)
    case.compare("full.source", output.source[:, None])
    case.compare("full.conv_post", model.spectrum(mel, output.source))
    case.compare("full.wav", output.waveform)
    # Upstream keeps back what eight frames that follow could change.
    expected = tensors["chunk.wav"]
    frames = expected.shape[1] // model.config.hop_length + _UPSTREAM_LOOK_AHEAD
    samples = frames * model.config.hop_length
    beginning = model(mel[:, :frames], noise=noise[:, :samples], compatibility="upstream").waveform
    case.compare("chunk.wav", beginning[:, : expected.shape[1]])
    # The default, whose phase is added up in double precision, in one pass and in a stream.
    whole = model(mel, noise=noise).waveform
    case.compare("full.wav (double precision)", whole, tensors["full.wav"], atol=_DOUBLE_ATOL)
    case.compare("full.wav (streamed)", stream(model, mel, [5] * mel.shape[1], noise=noise), whole, atol=1e-5)
    settled, _ = model.stream(mel[:, :frames], model.start_stream(noise=noise))
    case.compare("chunk.wav (streamed)", settled[:, : expected.shape[1]], whole[:, : expected.shape[1]], atol=1e-5)


def check_folded(case: Case, model: CosyVoiceHiftModel) -> None:
    """Plain weights give the same waveform."""
    if model.config.is_causal:
        output = model(case.tensors["mel"].transpose(1, 2), noise=case.tensors["buf.sine_noise"])
    else:
        full = {name.removeprefix("full."): value for name, value in case.tensors.items() if name.startswith("full.")}
        noise, phase = drawn(full)
        output = model(full["mel"].transpose(1, 2), noise=noise, phase=phase, compatibility="upstream")
    case.compare("full.wav (folded)", output.waveform, case.tensors["full.wav"])
