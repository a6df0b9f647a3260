"""The unit vocoder against textlesslib: durations, what enters the generator, its stages, waveforms, dropped units."""

from pathlib import Path

import torch
from convert_speechgpt_vocoder import convert_vocoder_pack
from torch import Tensor
from transformers import AutoModelForTextToWaveform

import hf_speechllm  # noqa: F401  registers the Auto classes
from hf_speechllm.models.modeling_speechgpt_unit_vocoder import SpeechGptUnitVocoderModel, SpeechGptUnitVocoderOutput

from .case import Case


def check_vocoder(case: Case, work: Path) -> None:
    """Convert the pack of `case` into `work` and check every expected value."""
    convert_vocoder_pack(case.directory, work / "model")
    model = AutoModelForTextToWaveform.from_pretrained(work / "model").eval()
    case.rtol = 0.0
    with torch.no_grad():
        VocoderChecks(case, model).run()


class VocoderChecks:
    """The two ways of the vocoder: reduced units with durations (`dur`), and a unit for every frame (`frames`)."""

    def __init__(self, case: Case, model: SpeechGptUnitVocoderModel) -> None:
        self.case, self.model = case, model
        tolerance = case.facts["tolerance"]
        self.tolerances = {name: float(tolerance[name]) for name in ("log_dur", "stages", "waveform")}
        self.voice = {
            name: torch.tensor([case.facts[name]])
            for name in ("speaker_id", "style_id")
            if case.facts.get(name) is not None
        }

    def run(self) -> None:
        case, tensors = self.case, self.case.tensors
        for name in ("code", "code_frames", "code_with_invalid", "f0", "f0_frames"):
            if name in tensors:
                case.use(name)
        if "waveform_dur" in tensors:
            output = self.check_way("dur", tensors["code"], tensors.get("f0"), predict_durations=True)
            if "log_dur" in tensors:
                case.compare("log_dur", output.log_durations, atol=self.tolerances["log_dur"])
            if "durations" in tensors:
                case.compare("durations", output.durations)
            if "code_with_invalid" in tensors:
                with_invalid = self.speak(tensors["code_with_invalid"], None, predict_durations=True)
                wave = with_invalid.waveform[0]
                case.compare(
                    "code_with_invalid", wave, tensors["waveform_dur"].flatten(), atol=self.tolerances["waveform"]
                )
        if "waveform_frames" in tensors:
            f0 = tensors.get("f0_frames", tensors.get("f0"))
            self.check_way("frames", tensors["code_frames"], f0, predict_durations=False)

    def speak(self, units: Tensor, f0: Tensor | None, **options) -> SpeechGptUnitVocoderOutput:
        pitch = {"f0": f0} if self.model.config.use_f0 else {}
        return self.model(units, return_dict=True, **pitch, **self.voice, **options)

    def check_way(
        self, way: str, units: Tensor, f0: Tensor | None, predict_durations: bool
    ) -> SpeechGptUnitVocoderOutput:
        """Waveform and the stages of the generator that the case has for one way."""
        case, generator = self.case, self.model.generator
        captured: dict[str, Tensor] = {}
        modules = {f"conv_pre_{way}": generator.conv_pre} | {
            f"ups_{stage}_{way}": module for stage, module in enumerate(generator.upsampler)
        }
        handles = [
            module.register_forward_hook(lambda module, args, output, name=name: captured.update({name: output}))
            for name, module in modules.items()
        ]
        output = self.speak(units, f0, predict_durations=predict_durations)
        for handle in handles:
            handle.remove()
        captured[f"generator_input_{way}"] = output.frames.transpose(1, 2)
        for name, tensor in captured.items():
            if name in case.tensors:
                case.compare(name, tensor, atol=self.tolerances["stages"])
        expected = case.tensors[f"waveform_{way}"]
        case.compare(f"waveform_{way}", output.waveform.view(expected.shape), atol=self.tolerances["waveform"])
        return output
