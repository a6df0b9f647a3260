"""A complete CosyVoice pack against upstream's `CosyVoice` classes: prompts, tokens, mels, waveforms, streams.

The tensors of a case are named after the call that made them: `CALL.in.NAME` what went into the models,
`CALL.speech_token`, and for every piece of the answer `CALL.mel0`, `CALL.wav0` and what was drawn for it. A text of
several sentences is a model's answer for each; what there is once is of any of them, or of all one after the other.
"""

import base64
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from convert_cosyvoice import convert_cosyvoice_pack, needs_text_tokens
from torch import Tensor
from transformers import AutoModelForTextToWaveform, AutoProcessor

import hf_speechllm  # noqa: F401  registers the Auto classes
from hf_speechllm.models.modeling_cosyvoice import CosyVoiceForTextToWaveform, CosyVoicePrompt, change_speed
from hf_speechllm.models.modeling_cosyvoice_flow import fade_in
from hf_speechllm.models.processing_cosyvoice import CosyVoiceProcessor

from .case import Case
from .cosyvoice_calls import read_call


# The spectrograms of a case keep every fourth bin.
_KEPT_BINS = 4
# Where a case does not say how far its spectrograms and waveforms may be off.
_MEL_ATOL, _WAV_ATOL = 1e-3, 2e-3
# Where buffers of upstream's models are stored, which are no call's.
_SHARED = "buf"
# Sampling rate of the packs of which upstream cuts prompts to a whole number of tokens, and its frames for a token.
_ALIGNED_RATE, _ALIGNED_FRAMES = 24000, 2


def check_pack(case: Case, work: Path) -> None:
    """Convert the pack of `case` into `work` and check every expected value."""
    text_tokens = single_bytes(work / "bytes.tiktoken") if needs_text_tokens(case.directory) else None
    convert_cosyvoice_pack(case.directory, work / "model", tokenizer=text_tokens)
    model = AutoModelForTextToWaveform.from_pretrained(work / "model").eval()
    processor = AutoProcessor.from_pretrained(work / "model")
    # Whether wetext is installed shall not matter: upstream ran without.
    processor.normalizer = None
    calls = sorted({name.split(".")[0] for name in case.tensors if "." in name} - {_SHARED})
    with torch.no_grad():
        for call in calls:
            try:
                PackChecks(case, model, processor, call).run()
            except Exception as error:  # a call that cannot run has failed, and the others still run
                case.record(f"{call}.run", None, "run", False, error=f"{type(error).__name__}: {error}")


def single_bytes(path: Path) -> Path:
    """A file of text tokens for a case without one, whose texts fail then and whose rest can still be looked at."""
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


class PackChecks:
    """One call of upstream: the recordings of the case in, everything that upstream made of them out."""

    def __init__(
        self, case: Case, model: CosyVoiceForTextToWaveform, processor: CosyVoiceProcessor, name: str
    ) -> None:
        self.case, self.model, self.processor, self.name = case, model, processor, name
        self.call = read_call(case, name)
        tolerance = case.facts.get("tolerance", {})
        self.mel_atol = float(tolerance.get("mel", {}).get("atol", _MEL_ATOL))
        self.wav_atol = float(tolerance.get("wav", {}).get("atol", _WAV_ATOL))
        self.tensors = {
            key.removeprefix(f"{name}."): tensor for key, tensor in case.tensors.items() if key.startswith(f"{name}.")
        }
        # What ours has for the names that are not of a piece, sentence by sentence.
        self.found: dict[str, list[Tensor]] = {}
        self.mels, self.waveforms = 0, 0
        self.draws = self.read_draws()

    def compare(self, name: str, actual: Tensor, **options: Any) -> None:
        self.case.compare(f"{self.name}.{name}", actual.to(self.tensors[name].dtype), **options)

    # -- the call ----------------------------------------------------------------------------------------------------
    def run(self) -> None:
        sentences = self.sentences()
        for number, arguments in enumerate(sentences):
            self.run_sentence(number, arguments, only=len(sentences) == 1)
        for name in self.tensors:
            kept, number = self.place(name)
            if kept in self.found:
                atol = self.mel_atol if kept == "prompt_speech_feat" else None
                self.compare(name, self.closest(name, self.found[kept], number), atol=atol)

    def sentences(self) -> list[dict[str, Any]]:
        """Arguments of the processor for each sentence, whose texts are as upstream's tokenizer gets them."""
        call, processor = self.call, self.processor
        arguments: dict[str, Any] = {"mode": "voice_conversion" if call.mode == "vc" else call.mode}
        arguments |= {"normalize": False, "compatibility": "upstream"}
        if call.mode in ("sft", "instruct") or call.saved_prompt:
            arguments["speaker"] = call.speaker if call.speaker in processor.speakers else self.speaker_by_embedding()
        else:
            arguments["prompt_audio"] = call.prompt_audio
        if call.mode == "vc":
            return [arguments | {"source_audio": call.source_audio}]
        if call.mode == "zero_shot" and not call.saved_prompt:
            arguments["prompt_text"] = processor.normalize_text(call.prompt_text or "", call.normalize)
        elif call.mode == "instruct":
            arguments["instruct"] = processor.normalize_text(call.instruct or "", call.normalize)
        elif call.mode == "instruct2":
            arguments["instruct"] = call.instruct
        sentences = processor.split_text(call.text or "", call.normalize) or [""]
        return [arguments | {"text": sentence} for sentence in sentences]

    def speaker_by_embedding(self) -> str | None:
        """The speaker that upstream spoke as, where the case does not say its name."""
        expected = self.tensors["in.flow_embedding"][0].float()
        found = [name for name, voice in self.processor.speakers.items() if torch.equal(voice.embedding, expected)]
        return found[0] if found else None

    def run_sentence(self, number: int, arguments: dict[str, Any], only: bool) -> None:
        inputs = self.processor(**arguments)
        prompt = self.read_prompt(dict(inputs))
        if self.call.mode == "vc":
            tokens, _ = self.model.encode_speech(inputs["source_features"], inputs["source_features_mask"])
            self.keep("source_speech_token", tokens)
        else:
            self.keep("text", inputs["input_ids"])
            self.keep("prompt_text", inputs["prompt_input_ids"])
            text, before = (
                self.upstream_ids(name, number, inputs[ours], only)
                for name, ours in (("text", "input_ids"), ("prompt_text", "prompt_input_ids"))
            )
            tokens = self.speak(text, before, dict(inputs), prompt)
        self.keep("speech_token", tokens)
        if not self.call.stream:
            self.check_offline(tokens, prompt)
        elif self.model.config.version == 1:
            self.check_overlapping_stream(tokens, prompt)
        else:
            self.check_stream(tokens, prompt)

    def speak(self, text: Tensor, before: Tensor, inputs: dict[str, Tensor], prompt: CosyVoicePrompt) -> Tensor:
        """Speech tokens of a text behind a prompt's."""
        lm_config = self.model.config.lm_config
        if self.model.config.version == 3 and lm_config.end_of_prompt_id not in (*text[0], *before[0]):
            # Upstream has the id of a full-sized vocabulary in its code; it was told another one.
            lm_config.end_of_prompt_id = int((before if before.numel() else text)[0, 0])
        spoken = self.model.speak(
            text,
            torch.ones_like(text),
            before,
            torch.ones_like(before),
            prompt,
            inputs["lm_reads_prompt_speech"],
            inputs["lm_reads_speaker"],
            do_sample=False,
            compatibility="upstream",
        )
        return spoken.token_ids

    # -- book-keeping ------------------------------------------------------------------------------------------------
    def keep(self, name: str, value: Tensor) -> None:
        """Remember what ours has for a name, and its length."""
        self.found.setdefault(name, []).append(value)
        if value.dim() > 1:
            self.found.setdefault(f"{name}_len", []).append(torch.tensor([value.shape[1]]))

    @staticmethod
    def place(name: str) -> tuple[str, int | None]:
        """`in.text`, `in1.text`, `in.text1` or `speech_token1`: the plain name, and the sentence where it is said."""
        head, _, rest = name.rpartition(".")
        match = re.fullmatch(r"(.*?)(\d*)", rest)
        number = match[2] or re.sub(r"\D", "", head)
        return match[1], int(number) if number else None

    def upstream_ids(self, name: str, number: int, ours: Tensor, only: bool) -> Tensor:
        """Upstream's ids of a sentence to go on with, where the case has them beyond doubt: a text that differs has
        been found already."""
        for key, tensor in self.tensors.items():
            plain, sentence = self.place(key)
            if plain == name and (sentence == number or (sentence is None and only)):
                return tensor.long()
        return ours

    def closest(self, name: str, values: list[Tensor], number: int | None) -> Tensor:
        """The sentence that a name is of; where it does not say, the one that fits, or all of them."""
        expected = self.tensors[name]
        if number is not None and number < len(values):
            return values[number]
        candidates = [*values, torch.cat(values, dim=-1)] if values[0].dim() < 3 else values
        fitting = [value for value in candidates if value.shape == expected.shape]
        return min(fitting, key=lambda value: float((value - expected).abs().sum()), default=values[0])

    def piece(self, kind: str) -> str | None:
        """The name of the next piece, `None` where the case has no more."""
        number = self.mels if kind == "mel" else self.waveforms
        name = f"{kind}{number}"
        return name if name in self.tensors else None

    def check_mel(self, mel: Tensor) -> None:
        if (name := self.piece("mel")) is not None:
            bins = _KEPT_BINS if self.tensors[name].shape[1] < mel.shape[2] else 1
            self.compare(name, mel[..., ::bins].transpose(1, 2), atol=self.mel_atol)
        self.mels += 1

    def check_waveform(self, waveform: Tensor) -> None:
        if (name := self.piece("wav")) is not None:
            self.compare(name, waveform, atol=self.wav_atol)
        self.waveforms += 1

    # -- prompts -----------------------------------------------------------------------------------------------------
    def read_prompt(self, inputs: dict[str, Tensor]) -> CosyVoicePrompt:
        """What the flow and the language model read of the voice."""
        names = ("prompt_features", "prompt_fbank", "prompt_mel", "prompt_speech")
        given = {key: inputs.get(key) for name in names[:3] for key in (name, f"{name}_mask")}
        given |= {f"prompt_speech_{part}": inputs.get(f"prompt_speech_{part}") for part in ("ids", "mask")}
        prompt = self.model.read_prompt(1, **given, speaker_embedding=inputs.get("speaker_embedding"))
        aligned = self.model.config.sampling_rate == _ALIGNED_RATE and self.call.mode != "vc"
        if given["prompt_features"] is not None and aligned != self.model.config.aligns_prompts:
            prompt = self.unaligned(given, prompt, aligned)
        self.keep("flow_prompt_speech_token", prompt.speech_ids)
        self.keep("llm_prompt_speech_token", prompt.speech_ids)
        self.keep("prompt_speech_feat", prompt.mel)
        for name in ("flow_embedding", "llm_embedding", "embedding"):
            self.found.setdefault(name, []).append(prompt.speaker_embedding)
        return prompt

    def unaligned(self, given: dict[str, Tensor], prompt: CosyVoicePrompt, aligned: bool) -> CosyVoicePrompt:
        """Tokens and frames as long as upstream leaves them: by the sampling rate, never for voice conversion."""
        tokens, _ = self.model.encode_speech(given["prompt_features"], given["prompt_features_mask"])
        mel = given["prompt_mel"]
        if aligned:
            count = min(mel.shape[1] // _ALIGNED_FRAMES, tokens.shape[1])
            tokens, mel = tokens[:, :count], mel[:, : _ALIGNED_FRAMES * count]
        masks = torch.ones_like(tokens), torch.ones(mel.shape[:2], dtype=torch.long)
        return CosyVoicePrompt(tokens, masks[0], mel, masks[1], prompt.speaker_embedding)

    # -- what was drawn ----------------------------------------------------------------------------------------------
    def read_draws(self) -> dict[str, list[Tensor]]:
        """What upstream drew, piece by piece: `flow` `(1, t, bins)`, `noise` `(1, samples, sines)`, `phase`.

        The shapes say what is what, and their numbers only in which order they were drawn. What is stored for all
        calls holds for all pieces. An initial phase of versions 2 and 3 has no effect, see `sine_source.py`.
        """
        sines, bins = self.model.vocoder.source.num_sines, self.model.config.flow_config.num_mel_bins
        draws: dict[str, list[tuple[int, Tensor]]] = {}
        for full, tensor in self.case.tensors.items():
            call, _, name = full.rpartition(".")
            match = re.fullmatch(r"(\w*?)(\d*)", name)
            if call not in (self.name, _SHARED, "") or match is None or match[1] in ("mel", "wav", "speech_token"):
                continue
            if tensor.dim() == 3 and tensor.shape[1] == bins:
                kind, tensor = "flow", tensor.float().transpose(1, 2)
            elif tensor.numel() == sines:
                kind, tensor = "phase", tensor.float().view(1, sines)
            elif tensor.dim() == 3 and sines in tensor.shape[1:]:
                kind = "noise"
                tensor = tensor.float() if tensor.shape[2] == sines else tensor.float().transpose(1, 2)
            else:
                continue
            self.case.use(full)
            draws.setdefault(kind, []).append((int(match[2] or 0), tensor))
        for found in draws.values():
            found.sort(key=lambda item: item[0])
        return {kind: [tensor for _, tensor in found] for kind, found in draws.items()}

    def drawn(self, number: int) -> dict[str, Tensor]:
        """Those of one piece; of what there is too few of, the last."""
        return {kind: found[min(number, len(found) - 1)] for kind, found in self.draws.items()}

    def vocoder_draws(self, draws: dict[str, Tensor], samples: int) -> dict[str, Tensor]:
        """Those of the vocoder; a buffer of the model is as long as its longest answer."""
        names = ("noise", "phase") if self.model.config.vocoder_config.phase_interpolation == "sample" else ("noise",)
        return {name: draws[name][:, :samples] if name == "noise" else draws[name] for name in names if name in draws}

    # -- speech ------------------------------------------------------------------------------------------------------
    def flow_options(self, draws: dict[str, Tensor], streaming: bool = False) -> dict[str, Any]:
        if self.model.config.version == 1:
            return {"noise": draws["flow"]} if "flow" in draws else {}
        return {"streaming": streaming}

    def generate_mel(self, tokens: Tensor, prompt: CosyVoicePrompt, **options: Any) -> Any:
        return self.model.flow.generate_mel(
            tokens,
            None,
            prompt.speech_ids,
            prompt.speech_mask,
            prompt.mel,
            prompt.mel_mask,
            prompt.speaker_embedding,
            **options,
        )

    def check_offline(self, tokens: Tensor, prompt: CosyVoicePrompt) -> None:
        draws = self.drawn(self.mels)
        mel = self.generate_mel(tokens, prompt, **self.flow_options(draws)).mel
        self.check_mel(mel)
        mask = torch.ones(mel.shape[:2], dtype=torch.long)
        if self.call.speed != 1.0:
            mel, mask = change_speed(mel, mask, self.call.speed)
        options = self.vocoder_draws(draws, mel.shape[1] * self.model.config.vocoder_config.hop_length)
        waveform, _ = self.model.mel_to_waveform(mel, mask, compatibility="upstream", **options)
        self.check_waveform(waveform)

    def start_vocoder(self) -> Any:
        return self.model.vocoder.start_stream(1, compatibility="upstream")

    def vocode(self, mel: Tensor, state: Any, draws: dict[str, Tensor], is_last: bool) -> Any:
        """The samples of a piece, with what was drawn for it: upstream draws anew for each."""
        state = replace(state, **self.vocoder_draws(draws, 1 << 40))
        waveform, state = self.model.vocoder.stream(mel, state, is_last=is_last)
        self.check_waveform(waveform)
        return state

    def check_stream(self, tokens: Tensor, prompt: CosyVoicePrompt) -> None:
        """Versions 2 and 3: the flow over the whole history for each piece, which begins where the last one ended.

        How many tokens a piece has depends on what upstream streamed before; its spectrogram tells.
        """
        config = self.model.config.flow_config
        ratio, ahead = config.token_mel_ratio, config.num_lookahead_tokens
        surplus = ratio * prompt.speech_ids.shape[1] - prompt.mel.shape[1]
        total, spoken, state = tokens.shape[1], 0, self.start_vocoder()
        while (name := self.piece("mel")) is not None:
            draws, frames = self.drawn(self.mels), self.tensors[name].shape[2]
            is_last = frames == ratio * total + surplus
            end = total if is_last else (frames - surplus) // ratio
            output = self.generate_mel(
                tokens if is_last else tokens[:, : end + ahead],
                prompt,
                # Upstream forgets to say that the last piece is one of a stream, and computes it with full attention.
                streaming=not is_last,
                is_last=is_last,
            )
            self.check_mel(output.mel)
            state = self.vocode(output.mel[:, ratio * spoken :], state, draws, is_last)
            spoken = end
            if is_last:
                break

    def check_overlapping_stream(self, tokens: Tensor, prompt: CosyVoicePrompt) -> None:
        """Version 1: pieces of two seconds and an overlap, whose spectrograms are faded into each other."""
        flow = self.model.flow
        hop, overlap = 2 * flow.config.input_frame_rate, flow.stream_overlap_tokens
        held = flow.config.num_frames(overlap)
        state, overlaps, tail, is_last = self.start_vocoder(), None, None, False
        while not is_last:
            is_last = tokens.shape[1] < hop + overlap
            draws = self.drawn(self.mels)
            piece = tokens if is_last else tokens[:, : hop + overlap]
            output = self.generate_mel(piece, prompt, overlaps=overlaps, **self.flow_options(draws))
            self.check_mel(output.mel)
            mel, overlaps, tokens = output.mel, output.overlaps, tokens[:, hop:]
            if tail is not None:
                mel = fade_in(mel, tail)
            if not is_last:
                mel, tail = mel[:, :-held], mel[:, -held:]
            state = self.vocode(mel, state, draws, is_last)
