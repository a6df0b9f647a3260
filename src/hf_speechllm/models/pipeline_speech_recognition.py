"""The `automatic-speech-recognition` pipeline of every recogniser here.

transformers' own pipeline takes the argmax of `forward` for a class that it does not know, decodes files with the
ffmpeg program and resamples with torchaudio. This one calls the model's `generate`, reads files with soundfile, and
resamples with soxr or torch. A configuration names it in `custom_pipelines`, so that

    pipeline("automatic-speech-recognition", model=FOLDER_OR_REPO, trust_remote_code=True)

finds it. What it needs of a model: `generate(input_features, attention_mask, return_timestamps,
return_dict_in_generate, ...)` with an output of `sequences (batch, tokens)`, `sequences_lengths (batch,)`,
`token_timestamps (batch, tokens, 2)` in seconds and `token_confidences (batch, tokens)`. A model that answers more
than the text (SenseVoice) says in `prompt_lengths (batch,)` how many tokens at the start are such answers; its
processor's `post_process_transcription` turns them into entries of the result.

Two more models may help, each given as an object or as what `from_pretrained` takes. What is needed of them:
`vad.config.sampling_rate`, `vad.speech_segments(waveform (samples,), sampling_rate)` → `[(start, end), ...]` in
seconds; `punctuation.punctuate(text, tokenizer)` → text.
"""

import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from transformers import (
    AutomaticSpeechRecognitionPipeline,
    AutoModel,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .audio_input import AUDIO_KEYS, read_audio
from .resampling import resample


_TIMESTAMP_CHOICES = (None, False, True, "char", "word")
# Longer audio is recognised in windows unless the caller decides otherwise.
_LONGEST_WHOLE_S = 120.0
_WINDOW_S = 60.0


class SpeechRecognitionPipeline(AutomaticSpeechRecognitionPipeline):
    r"""Speech to text.

    Inputs of a call, alone or in a list: a path, the bytes of an audio file, an open binary file, a mono or
    multi-channel array or tensor at the model's rate (integers are scaled), or a dictionary with `sampling_rate` and
    `array` or `raw` at any rate, or with `bytes` or `path` (as `datasets` gives with `Audio(decode=False)`).

    Options of a call or of the constructor:
        chunk_length_s (`float`, *optional*): recognise in overlapping windows of this length; 0 = never cut. By
            default audio of more than two minutes is cut into windows of one, so that time and memory stay linear.
        stride_length_s (`float` or `(left, right)`, *optional*, defaults to `chunk_length_s / 6`): overlap on each
            side; a token counts in the window in whose inner part its middle lies.
        return_timestamps (`"char"`, `"word"` or `True`, *optional*): adds `chunks`, one per token of the model
            (`"char"`) or per word (`"word"`, `True`; every Chinese character is a word).
        return_confidence (`bool`, *optional*): adds `confidence` in 0 .. 1, the mean over the tokens, to the result
            and its chunks.
        hotwords (`list[str]`, *optional*): phrases to prefer.
        emoji (`bool`, *optional*): of a model that hears emotions and events: show them as emoji in the text.
        vad (model, folder or repository, *optional*): a detector of speech. Audio of any length is cut at the pauses
            that it finds instead of into windows; the pieces are recognised longest first, so that `batch_size` of
            about the same length share a forward pass. A folder is loaded again in every call that names it; the
            constructor loads it once.
        punctuation (`(model, tokenizer)`, folder or repository, *optional*): punctuates the text; `raw_text` then has
            the text before. The `chunks` stay as they are.
        batch_size (`int`, *optional*): utterances (or windows, or pieces) per forward pass.
        anything else (`decoding`, `num_beams`, `ctc_weight`, `decoding_chunk_size`, `hotwords_score`, `language`,
            `use_itn`, ...) goes to the model's `generate`.

    Returns:
        `{"text": str}`, with `"chunks": [{"text": str, "timestamp": (start_s, end_s)}]` and `"confidence": float` when
        asked for. SenseVoice adds `"language"`, `"emotion"`, `"events"` and `"tagged_text"`; for audio that was cut,
        the language and the emotion that most windows with speech give. Audio shorter than one analysis window gives
        an empty text.

    Raises:
        AudioError: unreadable, non-finite or oddly shaped audio.
    """

    _load_processor = True
    # The stock class sets aside the generation parameters of text decoders, which our `generate` does not have.
    _pipeline_calls_generate = False

    def _sanitize_parameters(
        self,
        chunk_length_s: float | None = None,
        stride_length_s: float | tuple[float, float] | None = None,
        return_timestamps: bool | str | None = None,
        return_confidence: bool | None = None,
        hotwords: list[str] | None = None,
        emoji: bool | None = None,
        vad: PreTrainedModel | str | os.PathLike | None = None,
        punctuation: tuple[PreTrainedModel, PreTrainedTokenizerBase] | str | os.PathLike | None = None,
        generate_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[dict, dict, dict]:
        preprocess_params, forward_params, postprocess_params = {}, {**(generate_kwargs or {}), **kwargs}, {}
        if chunk_length_s is not None:
            preprocess_params["chunk_length_s"] = chunk_length_s
        if stride_length_s is not None:
            preprocess_params["stride_length_s"] = stride_length_s
        if return_timestamps is not None:
            if return_timestamps not in _TIMESTAMP_CHOICES:
                raise ValueError(f"return_timestamps: expected 'char', 'word' or a bool, got {return_timestamps!r}")
            forward_params["return_timestamps"] = bool(return_timestamps)
            postprocess_params["return_timestamps"] = return_timestamps
        if return_confidence is not None:
            postprocess_params["return_confidence"] = return_confidence
        if emoji is not None:
            postprocess_params["emoji"] = emoji
        if vad is not None:
            if chunk_length_s:
                raise ValueError(
                    "chunk_length_s: with `vad` the pauses decide where audio is cut; give one of the two"
                )
            preprocess_params["vad"] = _load_helper(vad)
        if punctuation is not None:
            if isinstance(punctuation, str | os.PathLike):
                tokenizer = AutoTokenizer.from_pretrained(punctuation, trust_remote_code=False)
                punctuation = (_load_helper(punctuation), tokenizer)
            postprocess_params["punctuation"] = punctuation
        if hotwords is not None:
            if isinstance(hotwords, str):
                raise ValueError("hotwords: expected a list of phrases, got one string")
            if self.processor is None:
                raise ValueError("hotwords: this pipeline was made without a processor, which turns phrases into ids")
            forward_params["hotwords"] = self.processor.hotword_ids(hotwords) if hotwords else None
        if forward_params.get("num_return_sequences", 1) != 1:
            raise ValueError("num_return_sequences: the pipeline gives one text per input; call `generate` for n-best")
        return preprocess_params, forward_params, postprocess_params

    def preprocess(
        self,
        inputs: Any,
        chunk_length_s: float | None = None,
        stride_length_s: float | tuple[float, float] | None = None,
        vad: PreTrainedModel | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Yields the features of each window, with `window = (offset, keep_from, keep_to)` in seconds.

        `offset` is the start of the window in the audio; tokens are kept from `keep_from` to `keep_to`, both within
        the window. A window with `keep_from = -inf` starts a piece of speech, or the audio.
        """
        waveform, extra = self._read(inputs)
        rate = self.feature_extractor.sampling_rate
        pieces = [(0, waveform.shape[0])] if vad is None else _pieces_of_speech(waveform, rate, vad)
        windows = [
            (first + start, first + stop, keep_from, keep_to)
            for first, end in pieces
            for start, stop, keep_from, keep_to in self._windows(end - first, chunk_length_s, stride_length_s)
        ]
        for number, (start, stop, keep_from, keep_to) in enumerate(windows):
            features = self.feature_extractor(
                waveform[start:stop], sampling_rate=rate, return_tensors="pt", return_attention_mask=True
            )
            if self.dtype is not None:
                features = features.to(dtype=self.dtype)
            is_last = number == len(windows) - 1
            yield {"is_last": is_last, "window": (start / rate, keep_from, keep_to), **features, **extra}

    def _windows(
        self, num_samples: int, chunk_length_s: float | None, stride_length_s: float | tuple[float, float] | None
    ) -> Iterator[tuple[int, int, float, float]]:
        """Start and stop of each window in samples, and between which times in it tokens are kept."""
        rate = self.feature_extractor.sampling_rate
        chunk, left, right = num_samples, 0, 0
        if chunk_length_s is None:
            chunk_length_s = _WINDOW_S if num_samples > _LONGEST_WHOLE_S * rate else 0
        if chunk_length_s:
            if stride_length_s is None:
                stride_length_s = chunk_length_s / 6
            if isinstance(stride_length_s, int | float):
                stride_length_s = (stride_length_s, stride_length_s)
            # Whole output frames, so that a window sees the same frames as the complete recording.
            chunk, left, right = (
                round(seconds * rate / self._align_to) * self._align_to
                for seconds in (chunk_length_s, *stride_length_s)
            )
            if chunk <= left + right:
                raise ValueError(
                    f"chunk_length_s: expected more than both strides together, "
                    f"got {chunk_length_s} and {stride_length_s}"
                )
        start = 0
        while True:
            is_last = start + chunk >= num_samples
            keep_from = left / rate if start > 0 else -float("inf")
            keep_to = float("inf") if is_last else (chunk - right) / rate
            yield start, min(start + chunk, num_samples), keep_from, keep_to
            if is_last:
                return
            start += chunk - left - right

    def _read(self, inputs: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        """Mono waveform `(samples,)` at the model's rate, and the entries of a dictionary that are not audio."""
        own = self.feature_extractor.sampling_rate
        if not isinstance(inputs, dict):
            waveform, rate = read_audio(inputs, own)
            return resample(waveform, rate, own), {}
        waveform, rate = read_audio(inputs)
        return resample(waveform, rate, own), {k: v for k, v in inputs.items() if k not in AUDIO_KEYS}

    def _forward(
        self, model_inputs: dict[str, Any], return_timestamps: bool = False, **generate_kwargs: Any
    ) -> dict[str, Any]:
        is_last, window = model_inputs.pop("is_last"), model_inputs.pop("window")
        # A batch comes with one window per item, a single input with the bare one.
        windows = window if isinstance(window, list) else [window]
        is_cut = any(keep_from > -float("inf") or keep_to < float("inf") for _, keep_from, keep_to in windows)
        outputs = self.model.generate(
            input_features=model_inputs.pop("input_features"),
            attention_mask=model_inputs.pop("attention_mask"),
            return_timestamps=return_timestamps or is_cut,
            return_dict_in_generate=True,
            **generate_kwargs,
        )
        # `is_last` stays first: the batch size is read from the first entry.
        result = {
            "is_last": is_last,
            "window": window,
            "tokens": outputs.sequences,
            "lengths": outputs.sequences_lengths,
        }
        if outputs.token_timestamps is not None:
            result["times"] = outputs.token_timestamps
        if outputs.token_confidences is not None:
            result["confidences"] = outputs.token_confidences
        if "prompt_lengths" in outputs:
            result["prompt_lengths"] = outputs.prompt_lengths
        return {**result, **model_inputs}

    def postprocess(
        self,
        model_outputs: list[dict[str, Any]],
        return_timestamps: bool | str | None = None,
        return_confidence: bool = False,
        emoji: bool = False,
        punctuation: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None,
    ) -> dict[str, Any]:
        """Joins the windows of one input: token ids and times inside each window's own part, then text."""
        tokens, times, confidences, answered = [], [], [], []
        starts: list[int] = []  # where in `tokens` each piece of speech begins
        extra = defaultdict(list)
        for window_outputs in sorted(model_outputs, key=lambda outputs: outputs["window"][0]):
            offset, keep_from, keep_to = window_outputs.pop("window")
            if keep_from == -float("inf"):
                starts.append(len(tokens))
            length = int(window_outputs.pop("lengths"))
            window_tokens = window_outputs.pop("tokens")[0, :length].tolist()
            window_confidences = window_outputs.pop("confidences", None)
            window_times = window_outputs.pop("times", None)
            prompts = int(window_outputs.pop("prompt_lengths", 0))
            keep = range(prompts, length)
            if window_times is not None:
                window_times = window_times[0, :length].tolist()
                keep = [i for i in keep if keep_from <= sum(window_times[i]) / 2 < keep_to]
                times += [(window_times[i][0] + offset, window_times[i][1] + offset) for i in keep]
            tokens += [window_tokens[i] for i in keep]
            if prompts:
                answered.append(window_tokens[:prompts] + [window_tokens[i] for i in keep])
            if window_confidences is not None:
                confidences += [window_confidences[0, i].item() for i in keep]
            for key, value in window_outputs.items():
                if key != "is_last":
                    extra[key].append(value)

        pieces = [slice(start, end) for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True)]
        texts = [self.tokenizer.decode(tokens[p], skip_special_tokens=True, group_tokens=False) for p in pieces]
        result = {"text": _join_texts(texts)}
        if answered:
            answers = self._answers(answered, emoji)
            # Whatever a model answers, an answer is no text; only the emoji need the tags.
            result = answers if emoji else {**answers, **result}
        if return_confidence:
            result["confidence"] = _mean(confidences)
        if return_timestamps:
            result["chunks"] = [
                chunk
                for p in pieces
                for chunk in self._chunks(
                    tokens[p], times[p], confidences[p] if return_confidence else None, return_timestamps
                )
            ]
        if punctuation is not None:
            model, tokenizer = punctuation
            result["raw_text"], result["text"] = result["text"], model.punctuate(result["text"], tokenizer)
        return {**result, **extra}

    def _answers(self, windows: list[list[int]], emoji: bool) -> dict[str, Any]:
        """Text and answers of all windows: each window's tokens begin with its own answers."""
        if self.processor is None:
            raise ValueError("this pipeline was made without a processor, which knows what the model's tags mean")
        spoken = [results for results in self.processor.post_process_transcription(windows) if results["text"]]
        (result,) = self.processor.post_process_transcription([sum(windows, [])], emoji=emoji)
        for key in ("language", "emotion"):
            votes = [results[key] for results in spoken]
            if votes:
                result[key] = max(votes, key=votes.count)
        return result

    def _chunks(
        self,
        tokens: list[int],
        times: list[tuple[float, float]],
        confidences: list[float] | None,
        return_timestamps: bool | str,
    ) -> list[dict[str, Any]]:
        """Text pieces with their times; the tokenizer's offsets are positions in `tokens`."""
        key = "char" if return_timestamps == "char" else "word"
        decoded = self.tokenizer.decode(
            tokens, skip_special_tokens=True, group_tokens=False, **{f"output_{key}_offsets": True}
        )
        chunks = []
        for item in decoded[f"{key}_offsets"]:
            start, end = item["start_offset"], item["end_offset"]
            chunk = {"text": item[key], "timestamp": (round(times[start][0], 3), round(times[end - 1][1], 3))}
            if confidences is not None:
                chunk["confidence"] = _mean(confidences[start:end])
            chunks.append(chunk)
        return chunks


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _load_helper(model: PreTrainedModel | str | os.PathLike) -> PreTrainedModel:
    """The model, loaded where only its name is given. Code from a repository never runs here: load such a model
    yourself, with `trust_remote_code=True`, and pass the object."""
    if isinstance(model, str | os.PathLike):
        return AutoModel.from_pretrained(model, trust_remote_code=False).eval()
    return model


def _pieces_of_speech(waveform: torch.Tensor, rate: int, vad: PreTrainedModel) -> list[tuple[int, int]]:
    """Start and end in samples of what `vad` takes for speech, longest first; one empty piece if there is none."""
    vad_rate = vad.config.sampling_rate
    heard = waveform if vad_rate == rate else resample(waveform, rate, vad_rate)
    spans = vad.speech_segments(heard, vad_rate)
    # The last frame of a segment starts at its end, at most one window before the end of the audio.
    pieces = [(round(start * rate), min(round(end * rate), len(waveform))) for start, end in spans]
    return sorted(pieces, key=lambda piece: piece[0] - piece[1]) or [(0, 0)]


def _join_texts(texts: list[str]) -> str:
    """Pieces of speech in a row: a space between them, but not beside a Chinese or Japanese character."""
    joined = ""
    for text in texts:
        if joined and text and not (_is_cjk(joined[-1]) or _is_cjk(text[0])):
            joined += " "
        joined += text
    return joined


def _is_cjk(character: str) -> bool:
    """Ideographs, kana and full-width punctuation."""
    return "\u3000" <= character <= "\u30ff" or "\u3400" <= character <= "\u9fff" or "\uff00" <= character <= "\uffef"
