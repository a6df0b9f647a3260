"""The `any-to-any` pipeline of SpeechGPT: a question in text or speech, an answer in text and speech.

A configuration names it in `custom_pipelines`, so that

    pipeline("any-to-any", model=LM, units=UNITS, vocoder=VOCODER, trust_remote_code=True)

finds it; with the package, `SpeechGptPipeline(model=LM, units=UNITS, vocoder=VOCODER)` does the same. The model may as
well be the plain causal LM: only its `generate` is used. What is needed of the two helpers:
`units.encode(input_values, attention_mask)` with `reduced_ids`, and `vocoder.synthesize(units)`; for [`stream`]
`vocoder.start_stream()`, which has `push(units, is_last)`. Each is an object or the folder of a model; a
`CosyVoiceUnits` can be both.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    LogitsProcessorList,
    Pipeline,
    PreTrainedModel,
)

from .answers_speechgpt_lm import split_answer
from .audio_input import AUDIO_KEYS
from .greedy_text import GreedyText
from .prompts_speechgpt_lm import Modality, SpeechGptTurn, Style
from .streaming_speechgpt_lm import SpeechGptPiece, TextPieces, UnitStreamer
from .unit_string import parse_unit_string


# How upstream's script samples; a model's own generation configuration comes first.
_SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 50}
_MAX_NEW_TOKENS = 2048
# Where a model that would go on to speak has finished the text.
_SPEECH_TAG = "[ua]"


class SpeechGptPipeline(Pipeline):
    r"""Question in, answer out, in text and speech.

    Inputs of a call, alone or in a list: a text; a text in which the path of a recording stands behind `is input:`, or
    that is a path; an array with the option `sampling_rate`; a row of a data set (`array` or `raw` with
    `sampling_rate`, `bytes`, `path`); a dictionary with one or several of `text` (instruction or question), `audio`
    (see [`SpeechGptProcessor.read_audio`]) with `sampling_rate`, `units`, `history`.

    Options of a call or of the constructor:
        units (model or folder): turns recordings into units; needed for audio.
        vocoder (model or folder): turns units into sound; without it an answer has units and no sound.
        output (`"speech"` or `"text"`): of the answer. `"text"` stops where the model would begin to speak.
        style (`"released"` or `"paper"`): of the prompt; the processor's own by default.
        history: the dialogue before the question: `"dialogue"` of an earlier result, or complete turns.
        read_paths (`bool`, defaults to True): whether texts may name recordings by their paths. Switch it off for
            texts of strangers.
        voice (`dict`): options of the vocoder, e.g. `{"speaker": "anna"}`.
        greedy_text (`bool`, defaults to False): whether, where `generate` samples, it samples the units alone, and
            the text is the most likely one; see [`GreedyText`].
        batch_size (`int`): questions per forward pass.
        anything else (`temperature`, `max_new_tokens`, `generation_config`, ...) goes to the model's `generate`.

    Returns:
        `{"text", "transcript", "units", "question", "dialogue", "raw"}`: the answer as text and the question as text
        (None where the model wrote none), the units of the answer, the question as it stood in the prompt, the
        dialogue so far for `history`, and everything that the model wrote. With a vocoder and units also `"audio"`
        `(samples,)` float32 and `"sampling_rate"`.
    """

    _load_processor = True
    _load_tokenizer = False
    _load_feature_extractor = False
    _load_image_processor = False
    # `generate` gets what is given here and nothing else; the stock code would fill in defaults of its own.
    _pipeline_calls_generate = False

    def __init__(self, model: PreTrainedModel | str | os.PathLike, processor: Any = None, **kwargs) -> None:
        if isinstance(model, str | os.PathLike):
            processor = AutoProcessor.from_pretrained(model) if processor is None else processor
            model = AutoModelForCausalLM.from_pretrained(model).eval()
        if processor is None:
            raise ValueError("processor: expected a SpeechGptProcessor beside a model that is given as an object")
        if processor.template != "SpeechGPT":
            raise ValueError(f"processor.template: expected 'SpeechGPT', got {processor.template!r}")
        kwargs.setdefault("task", "any-to-any")
        kwargs.setdefault("device", model.device)
        super().__init__(model=model, processor=processor, **kwargs)

    def _sanitize_parameters(
        self,
        units: Any = None,
        vocoder: Any = None,
        output: Modality | None = None,
        style: Style | None = None,
        history: str | Sequence[SpeechGptTurn] | None = None,
        read_paths: bool | None = None,
        voice: dict[str, Any] | None = None,
        greedy_text: bool | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[dict, dict, dict]:
        preprocess = {"output": output, "style": style, "history": history, "read_paths": read_paths}
        preprocess = {key: value for key, value in preprocess.items() if value is not None}
        forward, postprocess = {**(generate_kwargs or {}), **kwargs}, {}
        if units is not None:
            preprocess["units"] = _load_helper(units, self.device)
        if vocoder is not None:
            postprocess["vocoder"] = _load_helper(vocoder, self.device)
        if voice is not None:
            postprocess["voice"] = voice
        if output is not None:
            forward["output"] = output
        if greedy_text is not None:
            forward["greedy_text"] = greedy_text
        if forward.get("num_return_sequences", 1) != 1:
            raise ValueError("num_return_sequences: the pipeline gives one answer per question; call `generate`")
        return preprocess, forward, postprocess

    def preprocess(
        self,
        inputs: str | dict[str, Any],
        units: Any = None,
        output: Modality = "speech",
        style: Style | None = None,
        history: str | Sequence[SpeechGptTurn] | None = None,
        read_paths: bool = True,
    ) -> dict[str, Any]:
        """Prompt of one question as ids `(1, tokens)`."""
        question = {"text": inputs} if isinstance(inputs, str) else inputs
        if not isinstance(question, dict):
            question = {"audio": inputs}
        if not question.keys().isdisjoint(AUDIO_KEYS[:-1]):
            question = {"audio": question}  # as data sets give it
        unknown = set(question) - {"text", "audio", "sampling_rate", "units", "history"}
        if unknown:
            raise ValueError(f"inputs: expected text, audio, sampling_rate, units, history; got {sorted(unknown)}")
        encoded = self.processor(
            **{"history": history, "output": output, "style": style, "read_paths": read_paths, **question},
            units_model=units,
        )
        return dict(encoded)

    def _forward(self, model_inputs: dict[str, Any], output: Modality = "speech", **generate_kwargs: Any) -> dict:
        sequences = self.model.generate(**model_inputs, **self._generate_options(output, generate_kwargs))
        # In a batch every prompt is as long as the longest.
        prompts = model_inputs["input_ids"]
        return {"prompts": prompts, "answers": sequences[:, prompts.shape[1] :]}

    def _generate_options(self, output: Modality, given: dict[str, Any]) -> dict[str, Any]:
        options = dict(given)
        config = options.get("generation_config") or self.model.generation_config
        if "do_sample" not in options and config.do_sample is None:
            options = {**_SAMPLING, **options}
        if config.max_new_tokens is None and "max_length" not in options:
            options.setdefault("max_new_tokens", _MAX_NEW_TOKENS)
        if options.get("pad_token_id", config.pad_token_id) is None:
            options["pad_token_id"] = self.processor.tokenizer.pad_token_id
        if output == "text":
            options.setdefault("stop_strings", [_SPEECH_TAG])
            options.setdefault("tokenizer", self.processor.tokenizer)
        if options.pop("greedy_text", False):
            given_processors = options.get("logits_processor") or []
            greedy_text = GreedyText.of(self.processor.tokenizer)
            options["logits_processor"] = LogitsProcessorList([*given_processors, greedy_text])
        return options

    def postprocess(
        self,
        model_outputs: dict[str, Any],
        vocoder: Any = None,
        voice: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The parts of the answer, and its sound."""
        result = self._result(model_outputs["prompts"][0], model_outputs["answers"][0])
        if vocoder is not None and result["units"]:
            with torch.no_grad():
                result["audio"] = vocoder.synthesize(result["units"], **(voice or {})).cpu().numpy()
            result["sampling_rate"] = vocoder.config.sampling_rate
        return result

    def _result(self, prompt_ids: torch.Tensor, answer_ids: torch.Tensor) -> dict[str, Any]:
        prompt, raw = self.processor.decode(prompt_ids), self.processor.decode(answer_ids)
        answer = self.processor.parse(raw, prompt)
        # Behind the meta instruction, and closed for the next turn.
        turns = prompt[max(prompt.find("[Human]"), 0) :].strip()
        dialogue = f"{turns} {split_answer(raw).strip()}<eoa>."
        return {
            "text": answer.text,
            "transcript": answer.transcript,
            "units": answer.units,
            "question": answer.question,
            "dialogue": dialogue,
            "raw": raw,
        }

    def stream(
        self,
        inputs: str | dict[str, Any],
        min_units: int = 25,
        timeout: float | None = None,
        **options: Any,
    ) -> Iterator[SpeechGptPiece]:
        """The answer to one question, piece by piece while the model writes it.

        Args:
            inputs, options: of a call.
            min_units (`int`): units between two pieces of sound; 25 are about half a second.
            timeout (`float`, *optional*): seconds to wait for the next token.

        Yields:
            [`SpeechGptPiece`]; all `text` and all `units` together are what the model wrote, all `audio` together is
            what the vocoder gives for all units. The last piece has the parsed `answer`.

        Raises:
            ValueError: see [`SpeechGptProcessor.__call__`]; queue.Empty: after `timeout`.
        """
        if min_units < 1:
            raise ValueError(f"min_units: expected at least 1, got {min_units}")
        preprocess, forward, postprocess = self._sanitize_parameters(**options)
        preprocess, forward = {**self._preprocess_params, **preprocess}, {**self._forward_params, **forward}
        postprocess = {**self._postprocess_params, **postprocess}
        model_inputs = {key: value.to(self.device) for key, value in self.preprocess(inputs, **preprocess).items()}
        output = forward.pop("output", "speech")
        streamer = UnitStreamer(timeout)
        generate_options = self._generate_options(output, forward)
        prompts, sequences = model_inputs["input_ids"], []

        def generate() -> None:
            try:
                with torch.no_grad():
                    sequences.append(self.model.generate(**model_inputs, **generate_options, streamer=streamer))
            except BaseException as error:  # the reader raises it, wherever it comes from
                streamer.fail(error)

        vocoder, voice = postprocess.get("vocoder"), postprocess.get("voice") or {}
        speaker = None if vocoder is None else vocoder.start_stream(**voice)
        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        yield from self._pieces(streamer, speaker, min_units)
        thread.join()
        new_ids = sequences[0][0, prompts.shape[1] :]
        yield SpeechGptPiece(
            answer=self.processor.parse(self.processor.decode(new_ids), self.processor.decode(prompts[0]))
        )

    def _pieces(self, ids: UnitStreamer, speaker: Any, min_units: int) -> Iterator[SpeechGptPiece]:
        tokenizer = self.processor.tokenizer
        text, waiting = TextPieces(tokenizer), []
        for index in ids:
            token = tokenizer.convert_ids_to_tokens(index)
            units = parse_unit_string(token) if token else []
            if not units:
                if piece := text.push(index):
                    yield SpeechGptPiece(text=piece)
                continue
            if piece := text.push(None):
                yield SpeechGptPiece(text=piece)
            waiting += units
            sound = None
            if speaker is not None and len(waiting) >= min_units:
                sound, waiting = speaker.push(waiting), []
            yield SpeechGptPiece(units=units, audio=sound)
        if piece := text.push(None):
            yield SpeechGptPiece(text=piece)
        if speaker is not None:
            yield SpeechGptPiece(audio=speaker.push(waiting, is_last=True))

    def __call__(self, inputs: Any, **kwargs: Any) -> dict[str, Any] | list[dict[str, Any]]:
        rate = kwargs.pop("sampling_rate", None)

        def with_rate(item: Any) -> Any:
            return {"audio": item, "sampling_rate": rate} if isinstance(item, np.ndarray | torch.Tensor) else item

        if isinstance(inputs, list) and not inputs:
            return []
        inputs = [with_rate(item) for item in inputs] if isinstance(inputs, list) else with_rate(inputs)
        return super().__call__(inputs, **kwargs)


def _load_helper(model: Any, device: torch.device) -> Any:
    """The model, loaded where only its name is given. Code from a repository never runs here: load such a model
    yourself, with `trust_remote_code=True`, and pass the object."""
    if isinstance(model, str | os.PathLike):
        return AutoModel.from_pretrained(model, trust_remote_code=False).eval().to(device)
    return model
