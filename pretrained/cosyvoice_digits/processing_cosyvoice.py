"""Processor of CosyVoice: texts, voices and instructions to what the models read, by mode.

Upstream: `cosyvoice/cli/frontend.py`. Which part of a prompt reaches which model:

| mode | text before the text | speech before the answer | speaker of the language model | prompt of the flow |
|---|---|---|---|---|
| `sft` | | | yes | |
| `zero_shot` | of the recording | of the recording | yes | the recording |
| `cross_lingual` | | | yes | the recording |
| `instruct` (version 1) | instruction | | no | |
| `instruct2` (2 and 3) | instruction | | | the recording |
| `voice_conversion` | no language model: the tokens of the source | | | the recording |
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature
from transformers.processing_utils import ProcessorMixin
from transformers.utils import cached_file

from .audio_input import read_audio
from .ragged_rows import padded_with_mask
from .speakers_cosyvoice import SPEAKERS_NAME, CosyVoiceSpeaker, load_speakers, save_speakers
from .text_normalization_cosyvoice import TextNormalizer, default_normalizer, prepare_text


MODES = ("sft", "zero_shot", "cross_lingual", "instruct", "instruct2", "voice_conversion")
END_OF_PROMPT = "<|endofprompt|>"
# What version 3 was trained to read before everything else.
SYSTEM_PROMPT = "You are a helpful assistant."
_WITH_RECORDING = ("zero_shot", "cross_lingual", "instruct2", "voice_conversion")


class CosyVoiceProcessor(ProcessorMixin):
    r"""Tokenizer, feature extractor and known speakers.

    Args:
        feature_extractor ([`CosyVoiceFeatureExtractor`]): of recordings.
        tokenizer: of the text.
        version (`int`): 1, 2 or 3. Version 3 has its system prompt and `<|endofprompt|>` put before every text.
        system_prompt (`str`): of version 3.

    Attributes:
        speakers (`dict[str, CosyVoiceSpeaker]`): saved and loaded with the processor, as `speakers.safetensors`.
        normalizer: of numbers and the like, see `text_normalization_cosyvoice.py`; wetext where it is installed.
    """

    def __init__(
        self,
        feature_extractor=None,
        tokenizer=None,
        version: int = 2,
        system_prompt: str = SYSTEM_PROMPT,
        **kwargs,
    ) -> None:
        if version not in (1, 2, 3):
            raise ValueError(f"version: expected 1, 2 or 3, got {version!r}")
        self.version, self.system_prompt = version, system_prompt
        super().__init__(feature_extractor, tokenizer, **kwargs)
        self.speakers: dict[str, CosyVoiceSpeaker] = {}
        self.normalizer: TextNormalizer | None = default_normalizer()

    # -- texts -------------------------------------------------------------------------------------------------------
    def split_text(self, text: str, normalize: bool = True) -> list[str]:
        """Sentences of a text, normalised; each is synthesised on its own. A text with `<|` and `|>` in it is left
        whole, as it is."""
        return prepare_text(text, self._count_tokens, True, normalize, self.normalizer)

    def normalize_text(self, text: str, normalize: bool = True) -> str:
        """The text of a prompt, normalised and whole."""
        return "".join(prepare_text(text, self._count_tokens, False, normalize, self.normalizer))

    def _count_tokens(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _ids(self, text: str) -> Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)

    # -- recordings and speakers -------------------------------------------------------------------------------------
    def prompt_features(
        self, audio: Sequence[Any], sampling_rate: int | None = None, compatibility: str | None = None
    ) -> BatchFeature:
        """What the model's `encode_prompt` takes, of a list of recordings (see [`read_audio`] of `audio_input.py`)."""
        recordings = [read_audio(item, sampling_rate) for item in audio]
        waveforms, rates = [waveform for waveform, _ in recordings], [rate for _, rate in recordings]
        return self.feature_extractor(waveforms, sampling_rate=rates, compatibility=compatibility)

    def add_speaker(
        self, name: str, prompt: Any, prompt_text: str | None = None, row: int = 0, normalize: bool = True
    ) -> None:
        """Remember a voice by name.

        Args:
            prompt ([`CosyVoicePrompt`]): of the model's `encode_prompt`; `row` of it.
            prompt_text (`str`, *optional*): what the recording says, for the mode `zero_shot`.

        Raises:
            ValueError: an empty name.
        """
        if not name:
            raise ValueError("name: expected at least one character")
        text = None if prompt_text is None else self._zero_shot_text(self.normalize_text(prompt_text, normalize))
        self.speakers[name] = CosyVoiceSpeaker(
            embedding=prompt.speaker_embedding[row].cpu(),
            speech_ids=prompt.speech_ids[row][prompt.speech_mask[row].bool()].cpu(),
            mel=prompt.mel[row][prompt.mel_mask[row].bool()].cpu(),
            **({} if text is None else {"text_ids": self._ids(text)}),
        )

    def mix_speakers(self, name: str, shares: dict[str, float]) -> None:
        """Remember the voice between others: the weighted mean of their normalised embeddings.

        Raises:
            KeyError: an unknown speaker. ValueError: shares that do not sum to a positive number.
        """
        total = sum(shares.values())
        if not total > 0:
            raise ValueError(f"shares: expected a positive sum, got {shares}")
        rows = [
            share / total * torch.nn.functional.normalize(self.known_speaker(speaker).embedding, dim=0)
            for speaker, share in shares.items()
        ]
        self.speakers[name] = CosyVoiceSpeaker(embedding=torch.stack(rows).sum(0))

    def known_speaker(self, name: str) -> CosyVoiceSpeaker:
        """The speaker of this name.

        Raises:
            KeyError: an unknown one.
        """
        if name not in self.speakers:
            raise KeyError(f"speaker: expected one of {sorted(self.speakers)}, got {name!r}")
        return self.speakers[name]

    # -- inputs of generate ------------------------------------------------------------------------------------------
    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        mode: str | Sequence[str] | None = None,
        speaker: str | CosyVoiceSpeaker | Sequence[str | CosyVoiceSpeaker | None] | None = None,
        prompt_audio: Any = None,
        prompt_text: str | Sequence[str | None] | None = None,
        instruct: str | Sequence[str | None] | None = None,
        source_audio: Any = None,
        sampling_rate: int | None = None,
        normalize: bool = True,
        compatibility: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        """Inputs of the model's `generate`. What is given as a list must have one entry for each row; the rest holds
        for all rows.

        Args:
            text: what is to be said.
            mode: see the head of this file; by default what the other arguments make of it: with `source_audio`
                `voice_conversion`, with `instruct` `instruct2` (`instruct` in version 1), with a prompt's text
                `zero_shot`, with a recording alone `cross_lingual`, else `sft`.
            speaker: a known one, in place of `prompt_audio` and `prompt_text`.
            prompt_audio: a recording of the voice, see [`read_audio`]. prompt_text: what it says.
            instruct: how to speak.
            source_audio: speech whose words are kept.
            sampling_rate: Hz, of arrays.
            normalize: write numbers out, tidy Chinese, end the text in a full stop, see [`split_text`].
            compatibility (`"upstream"`, *optional*): the prompt's spectrogram at the rate at which upstream takes it,
                which is wrong for version 1; no text beside those given, neither `<|endofprompt|>` nor the system
                prompt; what a known speaker says in place of the instruction of `instruct2`.

        Raises:
            ValueError: lists of different lengths, an unknown mode, or one whose arguments are missing.
            KeyError: an unknown speaker. AudioError: audio that cannot be used.
        """
        rows = _rows(
            text=text,
            mode=mode,
            speaker=speaker,
            prompt_audio=prompt_audio,
            prompt_text=prompt_text,
            instruct=instruct,
            source_audio=source_audio,
        )
        for row in rows:
            if isinstance(row["speaker"], str):
                row["speaker"] = self.known_speaker(row["speaker"])
            row["mode"] = self._mode(row)
        converts = [row["mode"] == "voice_conversion" for row in rows]
        if any(converts) and not all(converts):
            raise ValueError("mode: expected voice_conversion for all rows or for none")
        data = self._voices(rows, sampling_rate, compatibility)
        if converts[0]:
            recordings = [read_audio(row["source_audio"], sampling_rate) for row in rows]
            waveforms, rates = [waveform for waveform, _ in recordings], [rate for _, rate in recordings]
            return BatchFeature(data | self.feature_extractor.source_features(waveforms, rates))
        texts, prompts = zip(*(self._texts(row, normalize, compatibility) for row in rows), strict=True)
        data |= padded_with_mask("input_ids", list(texts), "attention_mask")
        data |= padded_with_mask("prompt_input_ids", list(prompts), "prompt_attention_mask")
        modes = [row["mode"] for row in rows]
        data["lm_reads_prompt_speech"] = torch.tensor([int(mode == "zero_shot") for mode in modes])
        data["lm_reads_speaker"] = torch.tensor([int(mode != "instruct") for mode in modes])
        return BatchFeature(data)

    def _mode(self, row: dict[str, Any]) -> str:
        """The mode of a row, checked against its arguments."""
        known = row["speaker"]
        has_recording = row["prompt_audio"] is not None or (known is not None and len(known.speech_ids) > 0)
        has_text = bool(row["prompt_text"]) or (known is not None and len(known.text_ids) > 0)
        mode = row["mode"]
        if mode is None:
            if row["source_audio"] is not None:
                mode = "voice_conversion"
            elif row["instruct"]:
                mode = "instruct" if self.version == 1 else "instruct2"
            elif has_recording:
                mode = "zero_shot" if has_text else "cross_lingual"
            else:
                mode = "sft"
        if mode not in MODES:
            raise ValueError(f"mode: expected one of {MODES}, got {mode!r}")
        if (mode == "instruct") != (self.version == 1) and mode in ("instruct", "instruct2"):
            raise ValueError(f"mode: expected {'instruct' if self.version == 1 else 'instruct2'}, got {mode!r}")
        if known is not None and row["prompt_audio"] is not None:
            raise ValueError("prompt_audio: expected none beside speaker")
        if known is None and row["prompt_audio"] is None:
            raise ValueError(f"speaker: expected a known one, or prompt_audio; known are {sorted(self.speakers)}")
        if mode in _WITH_RECORDING and not has_recording:
            raise ValueError(f"speaker: expected one with a recording for the mode {mode!r}")
        if mode in ("sft", "instruct") and known is None:
            raise ValueError(f"speaker: expected a known one for the mode {mode!r}; known are {sorted(self.speakers)}")
        if mode == "zero_shot" and not has_text:
            raise ValueError("prompt_text: expected what the recording says for the mode 'zero_shot'")
        if mode in ("instruct", "instruct2") and not row["instruct"]:
            raise ValueError(f"instruct: expected an instruction for the mode {mode!r}")
        if mode == "voice_conversion" and row["source_audio"] is None:
            raise ValueError("source_audio: expected speech for the mode 'voice_conversion'")
        if mode != "voice_conversion" and row["text"] is None:
            raise ValueError(f"text: expected one for the mode {mode!r}")
        return mode

    def _texts(self, row: dict[str, Any], normalize: bool, compatibility: str | None) -> tuple[Tensor, Tensor]:
        """Ids of the text, and of what comes before it."""
        mode, known = row["mode"], row["speaker"]
        # As upstream, a text ends in a full stop, and a prompt as it was written.
        text = "".join(self.split_text(row["text"], normalize))
        if compatibility == "upstream":
            return self._ids(text), self._upstream_prompt(row, normalize)
        before = torch.zeros(0, dtype=torch.long)
        if mode == "zero_shot":
            if known is not None and not row["prompt_text"]:
                before = known.text_ids
            else:
                before = self._ids(self._zero_shot_text(self.normalize_text(row["prompt_text"], normalize)))
        elif mode in ("instruct", "instruct2"):
            instruct = self._instruct_text(row, normalize)
            if END_OF_PROMPT not in instruct:
                instruct += END_OF_PROMPT
                if self.version == 3:
                    instruct = f"{self.system_prompt} {instruct}"
            before = self._ids(instruct)
        elif self.version == 3 and END_OF_PROMPT not in text:
            text = f"{self.system_prompt}{END_OF_PROMPT}{text}"
        return self._ids(text), before

    def _upstream_prompt(self, row: dict[str, Any], normalize: bool) -> Tensor:
        """Ids of what upstream puts before the text: what is given, or all that a known prompt says."""
        mode, known = row["mode"], row["speaker"]
        if mode in ("zero_shot", "instruct2") and known is not None:
            return known.text_ids
        if mode == "zero_shot":
            return self._ids(self.normalize_text(row["prompt_text"], normalize))
        return self._ids(self._instruct_text(row, normalize) if mode in ("instruct", "instruct2") else "")

    def _instruct_text(self, row: dict[str, Any], normalize: bool) -> str:
        """An instruction, of which upstream writes numbers out in version 1 alone."""
        return self.normalize_text(row["instruct"], normalize) if row["mode"] == "instruct" else row["instruct"]

    def _zero_shot_text(self, prompt_text: str) -> str:
        if self.version == 3 and END_OF_PROMPT not in prompt_text:
            return f"{self.system_prompt}{END_OF_PROMPT}{prompt_text}"
        return prompt_text

    def _voices(
        self, rows: list[dict[str, Any]], sampling_rate: int | None, compatibility: str | None
    ) -> dict[str, Tensor]:
        """Recordings as features, known speakers as they are; of `sft` and `instruct` the speaker alone."""
        data: dict[str, Tensor] = {}
        recorded = [number for number, row in enumerate(rows) if row["prompt_audio"] is not None]
        mels: list[Tensor] = [torch.zeros(0, self.feature_extractor.feature_size) for _ in rows]
        if recorded:
            features = self.prompt_features(
                [rows[number]["prompt_audio"] for number in recorded], sampling_rate, compatibility
            )
            for name in ("prompt_features", "prompt_fbank"):
                for key in (name, f"{name}_mask"):
                    value = features[key]
                    data[key] = value.new_zeros(len(rows), *value.shape[1:])
                    data[key][recorded] = value
            for place, number in enumerate(recorded):
                mels[number] = features["prompt_mel"][place][features["prompt_mel_mask"][place].bool()]
        known = [row["speaker"] for row in rows]
        if any(speaker is not None for speaker in known):
            size = next(speaker for speaker in known if speaker is not None).embedding.shape
            empty = torch.zeros(0, dtype=torch.long)
            speech = []
            for number, speaker in enumerate(known):
                uses_recording = speaker is not None and rows[number]["mode"] in _WITH_RECORDING
                speech.append(speaker.speech_ids if uses_recording else empty)
                if uses_recording:
                    mels[number] = speaker.mel
            data |= padded_with_mask("prompt_speech_ids", speech, "prompt_speech_mask")
            data["speaker_embedding"] = torch.stack(
                [torch.zeros(size) if speaker is None else speaker.embedding for speaker in known]
            )
        return data | padded_with_mask("prompt_mel", mels)

    # -- files -------------------------------------------------------------------------------------------------------
    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> Any:
        """As in transformers, and `speakers.safetensors` if there are speakers."""
        saved = super().save_pretrained(save_directory, **kwargs)
        if self.speakers:
            save_speakers(Path(save_directory) / SPEAKERS_NAME, self.speakers)
        return saved

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "CosyVoiceProcessor":
        """As in transformers, and the speakers of `speakers.safetensors`, if there is one."""
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        path = cached_file(
            pretrained_model_name_or_path,
            SPEAKERS_NAME,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **{name: kwargs[name] for name in names if name in kwargs},
        )
        if path is not None:
            processor.speakers = load_speakers(Path(path))
        return processor


def _rows(**arguments: Any) -> list[dict[str, Any]]:
    """One dictionary a row; a list has one entry for each, anything else holds for all.

    Raises:
        ValueError: lists of different lengths, or without an entry.
    """
    lists = {name: value for name, value in arguments.items() if isinstance(value, list | tuple)}
    sizes = {len(value) for value in lists.values()}
    if len(sizes) > 1 or 0 in sizes:
        found = {name: len(value) for name, value in lists.items()}
        raise ValueError(f"expected lists of one length, at least 1, got {found}")
    return [
        {name: value[row] if name in lists else value for name, value in arguments.items()}
        for row in range(sizes.pop() if sizes else 1)
    ]


CosyVoiceProcessor.register_for_auto_class()
