"""A complete CosyVoice pack against upstream's `CosyVoice2` class: prompts, tokens, mels, waveforms, streams."""

import re
from pathlib import Path
from typing import Any

import torch
from convert_cosyvoice import convert_cosyvoice_pack
from torch import Tensor
from transformers import AutoModelForTextToWaveform, AutoProcessor

import hf_speechllm  # noqa: F401  registers the Auto classes
from hf_speechllm.models.modeling_cosyvoice import CosyVoiceForTextToWaveform, CosyVoicePrompt
from hf_speechllm.models.processing_cosyvoice import CosyVoiceProcessor

from .case import Case


_CALL = re.compile(r'inference_\w+\("(?P<text>[^"]*)"(?:, "(?P<second>[^"]*)")?')
# Upstream's names of what goes into the models -> where it is in ours.
_TEXTS = {"in.text": "input_ids", "in.prompt_text": "prompt_input_ids"}
_MODES = {"vc": "voice_conversion", "stream": "zero_shot"}
# The spectrograms of a case keep every fourth bin.
_KEPT_BINS = 4


def check_pack(case: Case, work: Path) -> None:
    """Convert the pack of `case` into `work` and check every expected value."""
    convert_cosyvoice_pack(case.directory, work / "model")
    model = AutoModelForTextToWaveform.from_pretrained(work / "model").eval()
    processor = AutoProcessor.from_pretrained(work / "model")
    # Whether wetext is installed shall not matter: upstream ran without.
    processor.normalizer = None
    with torch.no_grad():
        for call in sorted({name.split(".")[0] for name in case.tensors}):
            PackChecks(case, model, processor, call).run()


class PackChecks:
    """One call of upstream: the recordings of the case in, everything that upstream made of them out."""

    def __init__(
        self, case: Case, model: CosyVoiceForTextToWaveform, processor: CosyVoiceProcessor, call: str
    ) -> None:
        self.case, self.model, self.processor, self.call = case, model, processor, call
        tolerance = case.facts["tolerance"]
        self.mel_atol, self.wav_atol = float(tolerance["mel"]["atol"]), float(tolerance["wav"]["atol"])
        self.tensors = {
            name.removeprefix(f"{call}."): tensor
            for name, tensor in case.tensors.items()
            if name.startswith(f"{call}.")
        }

    def compare(self, name: str, actual: Tensor, **options: Any) -> None:
        self.case.compare(f"{self.call}.{name}", actual.to(self.tensors[name].dtype), **options)

    def run(self) -> None:
        inputs = self.processor(**self.arguments())
        for theirs, ours in _TEXTS.items():
            if theirs in self.tensors:
                self.compare(theirs, inputs[ours])
        prompt = self.check_prompt(dict(inputs))
        if "in.source_speech_token" in self.tensors:
            tokens, _ = self.model.encode_speech(inputs["source_features"], inputs["source_features_mask"])
            self.compare("in.source_speech_token", tokens)
        else:
            spoken = self.model.speak(
                *(inputs[name] for name in ("input_ids", "attention_mask")),
                *(inputs[name] for name in ("prompt_input_ids", "prompt_attention_mask")),
                prompt,
                inputs["lm_reads_prompt_speech"],
                do_sample=False,
            )
            tokens = spoken.token_ids
        self.compare("speech_token", tokens)
        if self.call == "stream":
            self.check_stream(tokens, prompt)
        else:
            self.check_offline(tokens, prompt)

    def arguments(self) -> dict[str, Any]:
        """Arguments of the processor: what the case says of the call."""
        described = self.case.facts["tensors"][f"{self.call}.wav0"]["what"]
        found = _CALL.match(described)
        text = found["text"] if found else self.case.facts["text"]
        mode = _MODES.get(self.call, self.call)
        arguments: dict[str, Any] = {"mode": mode, "prompt_audio": self.case.directory / "prompt.wav"}
        if mode == "voice_conversion":
            return arguments | {"source_audio": self.case.directory / "source.wav"}
        if mode == "zero_shot":
            arguments["prompt_text"] = self.case.facts["prompt_text"]
        elif mode == "instruct2":
            arguments["instruct"] = found["second"]
        return arguments | {"text": text}

    def check_prompt(self, inputs: dict[str, Tensor]) -> CosyVoicePrompt:
        """What is made of the recording. Voice conversion alone leaves tokens and frames as long as they are; ours
        aligns them there as well, so that the check goes on with upstream's."""
        names = ("prompt_features", "prompt_fbank", "prompt_mel")
        given = {f"{name}{part}": inputs[f"{name}{part}"] for name in names for part in ("", "_mask")}
        prompt = self.model.encode_prompt(**given)
        theirs = self.tensors["in.flow_prompt_speech_token"].long()
        if self.call == "vc":
            tokens, _ = self.model.encode_speech(given["prompt_features"], given["prompt_features_mask"])
            self.compare("in.flow_prompt_speech_token", tokens)
            self.compare("in.prompt_speech_feat", given["prompt_mel"], atol=self.mel_atol)
            mel = self.tensors["in.prompt_speech_feat"]
            prompt = CosyVoicePrompt(
                theirs, torch.ones_like(theirs), mel, torch.ones(mel.shape[:2]).long(), prompt.speaker_embedding
            )
        else:
            self.compare("in.flow_prompt_speech_token", prompt.speech_ids)
            self.compare("in.prompt_speech_feat", prompt.mel, atol=self.mel_atol)
        if "in.llm_prompt_speech_token" in self.tensors:
            self.compare("in.llm_prompt_speech_token", prompt.speech_ids)
        self.compare("in.flow_embedding", prompt.speaker_embedding)
        return prompt

    def draws(self, piece: int) -> Tensor:
        """Noise of the vocoder; an initial phase of version 2 has no effect, see `sine_source.py`."""
        self.case.use(f"{self.call}.noise{piece}", f"{self.call}.rand_ini{piece}")
        return self.tensors[f"noise{piece}"].float()

    def check_offline(self, tokens: Tensor, prompt: CosyVoicePrompt) -> None:
        mel, mask = self.model.token_to_mel(tokens, torch.ones_like(tokens), prompt)
        self.compare("mel0", mel[..., ::_KEPT_BINS].transpose(1, 2), atol=self.mel_atol)
        waveform, _ = self.model.mel_to_waveform(mel, mask, noise=self.draws(0))
        self.compare("wav0", waveform, atol=self.wav_atol)

    def check_stream(self, tokens: Tensor, prompt: CosyVoicePrompt) -> None:
        """Upstream's pieces: the flow over the whole history each time, the vocoder with an overlap."""
        config = self.model.config.flow_config
        pieces = sum(name.startswith("mel") for name in self.tensors)
        noise = torch.cat([self.draws(piece) for piece in range(pieces)], dim=1)
        state = self.model.vocoder.start_stream(1, noise=noise, compatibility="upstream")
        heard = 0
        for piece in range(pieces):
            is_last = piece == pieces - 1
            frames = self.tensors[f"mel{piece}"].shape[2]
            count = frames // config.token_mel_ratio + (0 if is_last else config.num_lookahead_tokens)
            output = self.model.flow.generate_mel(
                tokens[:, :count],
                None,
                prompt.speech_ids,
                prompt.speech_mask,
                prompt.mel,
                prompt.mel_mask,
                prompt.speaker_embedding,
                # Upstream forgets to say that the last piece is one of a stream, and computes it with full attention.
                streaming=not is_last,
                is_last=is_last,
            )
            self.compare(f"mel{piece}", output.mel[..., ::_KEPT_BINS].transpose(1, 2), atol=self.mel_atol)
            waveform, state = self.model.vocoder.stream(output.mel[:, heard:], state, is_last=is_last)
            self.compare(f"wav{piece}", waveform, atol=self.wav_atol)
            heard = frames
