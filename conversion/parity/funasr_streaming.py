"""Every step of a streaming Paraformer against upstream: features, encoder, weights, tokens, caches, texts.

Upstream cuts the audio by its calls and drops what fills no step at the end of a stream, so the windows are fed with
the recorded features, in the recorded steps.
"""

from pathlib import Path
from typing import Any

import torch
from convert_funasr import convert_funasr_pack
from torch import Tensor

import hf_speechllm  # noqa: F401  registers the Auto classes
from hf_speechllm.models.modeling_funasr_paraformer import FunasrParaformerForSpeechRecognition
from hf_speechllm.models.processing_funasr_paraformer import FunasrParaformerProcessor

from .case import Case


# float32 rounding of the power spectrum, relative to the strongest mel band of a frame.
_SPECTRUM_ROUNDING = 4e-6
# float32 rounding of a sum, relative to the largest entry of its tensor.
_SUM_ROUNDING = 1e-5


def check_streaming(case: Case, work: Path) -> None:
    """Convert the pack of `case` into `work` and check every expected value."""
    convert_funasr_pack(case.directory, work / "model")
    model = FunasrParaformerForSpeechRecognition.from_pretrained(work / "model").eval()
    processor = FunasrParaformerProcessor.from_pretrained(work / "model")
    checks = StreamingChecks(case, model, processor)
    with torch.no_grad():
        for index, run in enumerate(case.facts["runs"]):
            checks.check_run(index, run)


class StreamingChecks:
    """The runs of a case, each a stream of its own."""

    def __init__(
        self, case: Case, model: FunasrParaformerForSpeechRecognition, processor: FunasrParaformerProcessor
    ) -> None:
        self.case, self.model, self.processor = case, model, processor
        self.step: dict[str, Tensor] = {}
        encode, decode = model._encode_window, model._decode_window

        def encode_window(*args: Any) -> Any:
            result = encode(*args)
            self.step["encoder_out"] = result[0]
            return result

        def decode_window(stream: Any, state: Any, embeddings: Tensor, *args: Any) -> Any:
            self.step["acoustic_embeds"] = embeddings
            return decode(stream, state, embeddings, *args)

        model._encode_window, model._decode_window = encode_window, decode_window
        model.lm_head.register_forward_hook(lambda module, args, output: self.step.update(decoder_logits=output))

    def check_run(self, index: int, run: dict[str, Any]) -> None:
        case, model, spec = self.case, self.model, run["spec"]
        self.check_features(index, run)
        case.use(f"run{index}.wav", f"runs[{index}].spec")
        past, new, _ = spec["chunk"]
        state = model.open_stream(1, spec["chunk"], spec["elb"], spec["dlb"])
        stream = state.streams[0]
        calls = []
        for number, call in enumerate(run["calls"]):
            found = {"call": number, "samples": call["samples"], "is_final": call["is_final"], "inner": []}
            ids: list[int] = []
            for position, inner in enumerate(call["inner"]):
                name = f"run{index}.call{number}.{position}.feats"
                features = case.tensors.get(name, stream.pending.new_zeros(1, 0, stream.pending.shape[1]))[0]
                is_last = call["is_final"] and position == len(call["inner"]) - 1
                self.step = {}
                stream = model._stream_window(stream, state, features, is_last)
                hidden = self.step["encoder_out"]
                alphas = model.model.predictor.weights(model.model.predictor.convolve(hidden), None)[0]
                alphas[:past] = 0.0
                if not is_last:
                    alphas[past + new :] = 0.0
                self.step["alphas"] = alphas
                prefix = f"run{index}.{inner['step']}."
                for key in case.tensors:
                    if key.startswith(prefix):
                        self.compare(key, self.step[key.removeprefix(prefix)])
                entry = {"step": inner["step"], "n_tokens": 0, "enc_frames": hidden.shape[1]}
                if "decoder_logits" in self.step:
                    fired = self.step["decoder_logits"].argmax(dim=-1)[0].tolist()
                    entry |= {"n_tokens": len(fired), "ids": fired}
                    ids += fired
                found["inner"].append(entry)
            found["text"] = self.processor.post_process_upstream(ids)["text"]
            found |= self.caches(stream, len(found["inner"][-1].get("ids", [])) if found["inner"] else 0)
            caches = {
                "cache_feats": stream.window[None],
                "cif_alphas": stream.carried_alpha,
                "cif_hidden": stream.carried_hidden,
            }
            for key, tensor in caches.items():
                if f"run{index}.call{number}.{key}" in case.tensors:
                    self.compare(f"run{index}.call{number}.{key}", tensor)
            calls.append(found)
        case.compare_value(f"runs[{index}].calls", calls, without_margins(run["calls"]))

    def caches(self, stream: Any, num_tokens: int) -> dict[str, object]:
        """Sizes of the caches as upstream has them; it keeps more of the decoder's memory than the next step reads."""
        sizes: dict[str, object] = {"start_idx": stream.num_frames, "enc_k_cache": list(stream.keys[0].shape)}
        if stream.memories:
            memory = stream.memories[0]
            sizes["dec_fsmn_cache"] = [1, memory.shape[2], memory.shape[1] + num_tokens]
            sizes["dec_k_cache"] = list(stream.cross_keys[0].shape)
        return sizes

    def check_features(self, index: int, run: dict[str, Any]) -> None:
        """The frames of the whole stream, in the order of the recorded pieces."""
        case, extractor = self.case, self.processor.feature_extractor
        windows, _ = self.processor.stream(case.tensors[f"run{index}.wav"], is_last=True)
        frames = windows[0]["input_features"][0]
        start = 0
        for number, call in enumerate(run["calls"]):
            for position in range(len(call["inner"])):
                name = f"run{index}.call{number}.{position}.feats"
                if name not in case.tensors:
                    continue
                expected = case.tensors[name][0]
                actual = frames[start : start + len(expected)]
                start += len(expected)
                if actual.shape != expected.shape:
                    case.compare(name, actual[None])
                    continue
                scale = torch.ones(1) if extractor.cmvn_mean is None else torch.tensor(extractor.cmvn_inverse_std)
                mean = torch.zeros(1) if extractor.cmvn_mean is None else torch.tensor(extractor.cmvn_mean)
                bands = (expected / scale + mean).unflatten(-1, (-1, extractor.feature_size))
                headroom = (bands.amax(dim=-1, keepdim=True) - bands).exp().flatten(-2) * scale
                allowed = case.atol + case.rtol * expected.abs() + _SPECTRUM_ROUNDING * headroom
                difference = (actual - expected).abs()
                passed = bool((difference <= allowed).all())
                case.record(name, float(difference.max()), f"{case.atol} + float32 rounding of the frame", passed)

    def compare(self, name: str, actual: Tensor) -> None:
        expected = self.case.tensors[name]
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        self.case.compare(name, actual, atol=self.case.atol + _SUM_ROUNDING * largest)


def without_margins(value: Any) -> Any:
    """Nested facts without how close a decision was."""
    if isinstance(value, dict):
        return {key: without_margins(item) for key, item in value.items() if key != "margin"}
    return [without_margins(item) for item in value] if isinstance(value, list) else value
