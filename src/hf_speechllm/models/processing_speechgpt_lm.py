"""Processor of unit language models: questions in text or speech to ids, what the model wrote back to its parts.

It owns a tokenizer and the templates, and no model: the one that turns recordings into units is given to a call.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, PreTrainedModel
from transformers.processing_utils import ProcessorMixin

from .answers_speechgpt_lm import SpeechGptAnswer, parse_answer
from .anygpt_dialogue import TEMPLATES, AnyGptAnswer, dialogue_text, parse_reply, speech_string, voice_message
from .audio_input import read_audio
from .prompts_speechgpt_lm import (
    META_INSTRUCTION,
    STYLES,
    Modality,
    SpeechGptTurn,
    Style,
    inference_prompt,
    question_with_units,
    replace_recordings,
)
from .resampling import resample
from .unit_string import START_OF_SPEECH, unit_string
from .unit_tokens import unit_token


TEMPLATE_NAMES = ("SpeechGPT", *TEMPLATES)


class SpeechGptProcessor(ProcessorMixin):
    r"""Tokenizer and templates of a unit language model.

    Args:
        tokenizer: of the model; it pads on the left for `generate`.
        template (`str`): `"SpeechGPT"`, or one of AnyGPT's, `"AnyGPT"` and `"MMGPT"`.
        style (`str`): of SpeechGPT's texts, `"released"` or `"paper"`, see [`inference_prompt`].
        prefix (`str`): the meta instruction before every dialogue of SpeechGPT.
        sampling_rate (`int`): Hz, of what the unit model reads.

    Raises:
        ValueError: an unknown template or style.
    """

    def __init__(
        self,
        tokenizer=None,
        template: str = "SpeechGPT",
        style: Style = "released",
        prefix: str = META_INSTRUCTION,
        sampling_rate: int = 16000,
        **kwargs,
    ):
        if template not in TEMPLATE_NAMES:
            raise ValueError(f"template: expected one of {TEMPLATE_NAMES}, got {template!r}")
        if style not in STYLES:
            raise ValueError(f"style: expected one of {STYLES}, got {style!r}")
        self.template, self.style, self.prefix, self.sampling_rate = template, style, prefix, sampling_rate
        super().__init__(tokenizer, **kwargs)

    def __call__(
        self,
        text: str | Sequence[str | None] | None = None,
        audio: Any = None,
        sampling_rate: int | None = None,
        units: Sequence[int] | str | Sequence[Sequence[int] | str] | Tensor | np.ndarray | None = None,
        units_model: PreTrainedModel | None = None,
        output: Modality = "speech",
        style: Style | None = None,
        history: str | Sequence[SpeechGptTurn] | None = None,
        read_paths: bool = False,
        padding: bool = True,
        return_tensors: str | None = "pt",
        **kwargs,
    ) -> BatchFeature:
        """Inputs of `generate` for one question, or for a list of them.

        Args:
            text: the question; or the instruction, where there is a recording as well.
            audio: the recording: see [`read_audio`]; a list for several questions. It needs `units_model`.
            sampling_rate: Hz, of arrays in `audio`.
            units: the recording as units or as their string, instead of `audio`; of several questions a list, or
                `(questions, units)` with negative ids as padding.
            units_model: a model with `encode`; its `reduced_ids` are what SpeechGPT reads, its first codebook what
                AnyGPT reads.
            output: the modality of the answer. Only the paper's style tells it to the model.
            style: instead of the processor's own.
            history: the dialogue before this question, the same for every question of a list.
            read_paths: replace the paths of recordings in `text`, see [`replace_recordings`].
            padding, return_tensors, kwargs: of the tokenizer.

        Returns:
            `input_ids` and `attention_mask` `(batch, tokens)`, int64, 1 = real, padded on the left.

        Raises:
            ValueError: no question, neither text nor recording, lists of different lengths, or no `units_model` for
                audio.
            AudioError: audio that cannot be read.
        """
        prompts = self.prompts(
            text, audio, sampling_rate, units, units_model, output, style, history, read_paths=read_paths
        )
        if self.template == "SpeechGPT" and not self._strips_spaces():
            # In what such a model has learned, this space belongs to the word that comes next.
            prompts = [prompt.removesuffix(" ") for prompt in prompts]
        encoded = self.tokenizer(
            prompts, padding=padding, padding_side="left", return_tensors=return_tensors, **kwargs
        )
        return BatchFeature({key: encoded[key] for key in ("input_ids", "attention_mask")})

    def prompts(
        self,
        text: str | Sequence[str | None] | None = None,
        audio: Any = None,
        sampling_rate: int | None = None,
        units: Sequence[int] | str | Sequence[Sequence[int] | str] | Tensor | np.ndarray | None = None,
        units_model: PreTrainedModel | None = None,
        output: Modality = "speech",
        style: Style | None = None,
        history: str | Sequence[SpeechGptTurn] | None = None,
        read_paths: bool = False,
    ) -> list[str]:
        """The prompts that [`__call__`] turns into ids; its arguments are explained there."""
        texts = [text] if text is None or isinstance(text, str) else list(text)
        if isinstance(units, Tensor | np.ndarray):
            units = units.tolist()
        if audio is not None:
            if units is not None:
                raise ValueError("units: expected audio or units, got both")
            spoken = self.encode_audio(audio if isinstance(audio, list) else [audio], units_model, sampling_rate)
        elif units is None:
            spoken = [None] * len(texts)
        elif isinstance(units, str) or (len(units) and isinstance(units[0], int | np.integer)):
            spoken = [self.unit_string(units)]
        else:
            spoken = [self.unit_string(row) for row in units]
        if text is None:
            texts = [None] * len(spoken)
        if len(texts) != len(spoken):
            raise ValueError(f"text: expected one for each of {len(spoken)} recordings, got {len(texts)}")
        if not texts:
            raise ValueError("processor: expected at least one question, got an empty list")
        prompts = []
        for words, said in zip(texts, spoken, strict=True):
            is_spoken = said is not None
            if read_paths and words is not None:
                typed, words = words, replace_recordings(words, lambda path: self.encode_audio([path], units_model)[0])
                is_spoken = is_spoken or words != typed
            if words is None and said is None:
                raise ValueError("processor: expected text, audio or units for every question")
            prompts.append(self._prompt(words, said, is_spoken, output, style or self.style, history or ()))
        return prompts

    def _prompt(
        self,
        words: str | None,
        said: str | None,
        is_spoken: bool,
        output: Modality,
        style: Style,
        history: str | Sequence[SpeechGptTurn],
    ) -> str:
        if self.template != "SpeechGPT":
            template = TEMPLATES[self.template]
            message = words if said is None else (voice_message(said) if words is None else f"{words} {said}")
            if isinstance(history, str):
                end = dialogue_text([(message, None)], template).removeprefix(template.system)
                return (history or template.system) + end
            before = [(turn.question_units or turn.question, turn.answer) for turn in history]
            return dialogue_text([*before, (message, None)], template)
        question = words if said is None else question_with_units(words, said)
        asked: Modality = "speech" if is_spoken else "text"
        return inference_prompt(question, history, style, (asked, output), self.prefix)

    def _strips_spaces(self) -> bool:
        """Whether units swallow the spaces beside them, as in the tokenizers of published models; their ids are those
        of upstream."""
        index = self.tokenizer.convert_tokens_to_ids(START_OF_SPEECH)
        token = self.tokenizer.added_tokens_decoder.get(index)
        return token is not None and token.rstrip

    # -- speech ------------------------------------------------------------------------------------------------------
    def unit_string(self, units: Sequence[int] | Tensor | str) -> str:
        """Units as this template writes them; a string stays as it is."""
        if isinstance(units, str):
            return units
        return unit_string(units) if self.template == "SpeechGPT" else speech_string(units)

    def read_audio(self, audio: Any, sampling_rate: int | None = None) -> Tensor:
        """Mono waveform `(samples,)`, float32, at `self.sampling_rate`.

        Args:
            audio, sampling_rate: see [`read_audio`] of `audio_input.py`.

        Raises:
            AudioError: audio that cannot be used, or an unknown rate.
        """
        waveform, rate = read_audio(audio, sampling_rate)
        return resample(waveform, rate, self.sampling_rate)

    @torch.no_grad()
    def encode_audio(
        self, audio: Sequence[Any], units_model: PreTrainedModel | None, sampling_rate: int | None = None
    ) -> list[str]:
        """Strings of units of recordings, encoded together.

        Raises:
            ValueError: no `units_model`. AudioError: see [`read_audio`].
        """
        if units_model is None:
            raise ValueError("units_model: expected the model that turns audio into units, got none")
        waveforms = [self.read_audio(item, sampling_rate) for item in audio]
        lengths = torch.tensor([len(waveform) for waveform in waveforms])
        values = pad_sequence(waveforms, batch_first=True).to(units_model.device)
        mask = (torch.arange(values.shape[1]) < lengths[:, None]).long().to(units_model.device)
        if self.template == "SpeechGPT":
            rows = units_model.encode(values, mask).reduced_ids
        else:
            # AnyGPT reads the first codebook, with its repeats.
            rows = units_model.encode(values, mask, num_quantizers=1).audio_codes[:, 0]
        return [self.unit_string(row.tolist()) for row in rows]

    # -- answers -----------------------------------------------------------------------------------------------------
    def parse(self, text: str, prompt: str | None = None) -> SpeechGptAnswer | AnyGptAnswer:
        """The last answer in a decoded text, or the one with which `text` goes on after `prompt`; see
        [`parse_answer`]. Its units are those for which the tokenizer has a token: `<2024>` in a text may be a year."""
        if self.template != "SpeechGPT":
            return parse_reply(text)
        answer = parse_answer(text, prompt)
        return dataclasses.replace(answer, units=[unit for unit in answer.units if self._has_unit(unit)])

    def _has_unit(self, unit: int) -> bool:
        token = unit_token(unit)
        index = self.tokenizer.convert_tokens_to_ids(token)
        return index is not None and self.tokenizer.convert_ids_to_tokens(index) == token

    def decode(self, token_ids: Tensor | Sequence[int], skip_special_tokens: bool = True, **kwargs) -> str:
        """Text of one sequence of ids."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)

    def batch_decode(
        self, sequences: Tensor | Sequence[Sequence[int]], skip_special_tokens: bool = True, **kwargs
    ) -> list[str]:
        """Texts of sequences of ids."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens, **kwargs) for row in sequences]

    def post_process_answers(
        self, sequences: Tensor | Sequence[Sequence[int]]
    ) -> list[SpeechGptAnswer | AnyGptAnswer]:
        """Answers in what `generate` gave: prompts with their continuations, or continuations alone."""
        return [self.parse(text) for text in self.batch_decode(sequences)]


SpeechGptProcessor.register_for_auto_class()
