"""The `text-to-speech` pipeline of CosyVoice: a text of any length to one waveform.

A configuration names it in `custom_pipelines`, so that

    pipeline("text-to-speech", model=MODEL, trust_remote_code=True)

finds it; with the package, `CosyVoiceTextToSpeechPipeline(model=MODEL)` does the same.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForTextToWaveform, AutoProcessor, Pipeline, PreTrainedModel

from .streaming_cosyvoice import SpeechStreamBatch


_VOICE = (
    "mode",
    "speaker",
    "prompt_audio",
    "prompt_text",
    "instruct",
    "source_audio",
    "sampling_rate",
    "compatibility",
)


class CosyVoiceTextToSpeechPipeline(Pipeline):
    r"""Text in, waveform out.

    Inputs of a call, alone or in a list: a text; a dictionary with `text` and any of the options below, which then
    hold for it alone; for voice conversion, a dictionary with `source_audio`.

    Options of a call or of the constructor:
        mode, speaker, prompt_audio, prompt_text, instruct, source_audio, sampling_rate: see [`CosyVoiceProcessor`].
        normalize (`bool`, defaults to True): write numbers out and split the text into sentences. Each sentence is
            synthesised on its own, all sentences of a text in one batch.
        max_batch_size (`int`, defaults to 8): sentences of a text that are computed together.
        seed (`int`, *optional*): with it, the same text gives the same waveform, in whatever batch.
        anything else (`speed`, `temperature`, `do_sample`, `num_steps`, ...) goes to the model's `generate`.

    Returns:
        `{"audio": (samples,) float32, "sampling_rate": int}`; no samples for a text without words.
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
            model = AutoModelForTextToWaveform.from_pretrained(model).eval()
        if processor is None:
            raise ValueError("processor: expected a CosyVoiceProcessor beside a model that is given as an object")
        kwargs.setdefault("task", "text-to-speech")
        kwargs.setdefault("device", model.device)
        super().__init__(model=model, processor=processor, **kwargs)

    def _sanitize_parameters(
        self,
        normalize: bool | None = None,
        max_batch_size: int | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> tuple[dict, dict, dict]:
        preprocess = {name: kwargs.pop(name) for name in _VOICE if name in kwargs}
        if normalize is not None:
            preprocess["normalize"] = normalize
        forward = {**kwargs.pop("generate_kwargs", {}), **kwargs}
        if max_batch_size is not None:
            if max_batch_size < 1:
                raise ValueError(f"max_batch_size: expected at least 1, got {max_batch_size}")
            forward["max_batch_size"] = max_batch_size
        if seed is not None:
            forward["seed"] = seed
        if "compatibility" in preprocess:
            forward["compatibility"] = preprocess["compatibility"]
        return preprocess, forward, {}

    def preprocess(self, inputs: str | dict[str, Any], normalize: bool = True, **voice: Any) -> dict[str, Any]:
        """Inputs of `generate`, a row for each sentence; `None` for a text without words."""
        item = {"text": inputs} if isinstance(inputs, str) else dict(inputs)
        text = item.pop("text", None)
        unknown = set(item) - set(_VOICE)
        if unknown:
            raise ValueError(f"inputs: expected text and any of {_VOICE}, got {sorted(unknown)}")
        voice = {**voice, **item}
        if text is None:
            return {"inputs": dict(self.processor(**voice)), "compatibility": voice.get("compatibility")}
        sentences = self.processor.split_text(text, normalize)
        if not sentences:
            return {"inputs": None, "compatibility": None}
        prompt_text = voice.get("prompt_text")
        if prompt_text is not None:
            voice["prompt_text"] = self.processor.normalize_text(prompt_text, normalize)
        rows = self.processor(text=sentences, **voice, normalize=False)
        return {"inputs": dict(rows), "compatibility": voice.get("compatibility")}

    def _forward(
        self,
        model_inputs: dict[str, Any],
        max_batch_size: int = 8,
        seed: int | None = None,
        compatibility: str | None = None,
        **generate_kwargs: Any,
    ) -> dict[str, list[torch.Tensor]]:
        inputs = model_inputs["inputs"]
        compatibility = model_inputs["compatibility"] or compatibility
        waveforms: list[torch.Tensor] = []
        if inputs is None:
            return {"waveforms": waveforms}
        rows = len(next(iter(inputs.values())))
        for start in range(0, rows, max_batch_size):
            part = {name: value[start : start + max_batch_size] for name, value in inputs.items()}
            options = dict(generate_kwargs)
            if seed is not None:
                options["generator"] = [
                    torch.Generator().manual_seed(seed + row)
                    for row in range(start, min(start + max_batch_size, rows))
                ]
            output = self.model.generate(**part, compatibility=compatibility, **options)
            masks = output.waveform_mask.bool()
            waveforms += [row[mask].cpu() for row, mask in zip(output.waveform, masks, strict=True)]
        return {"waveforms": waveforms}

    def postprocess(self, model_outputs: dict[str, list[torch.Tensor]]) -> dict[str, Any]:
        """The sentences one after the other."""
        pieces = model_outputs["waveforms"]
        audio = torch.cat(pieces) if pieces else torch.zeros(0)
        return {"audio": audio.float().numpy(), "sampling_rate": self.model.config.sampling_rate}

    def __call__(self, inputs: Any = None, **kwargs: Any) -> dict[str, Any] | list[dict[str, Any]]:
        if inputs is None:
            inputs = {}
        return super().__call__(inputs, **kwargs)

    def stream(
        self, inputs: str | dict[str, Any], chunk_tokens: int | None = None, **options: Any
    ) -> Iterator[np.ndarray]:
        """Pieces of the waveform, `(samples,)` float32, while it is computed: one sentence after the other.

        Args:
            inputs, options: of a call, without `speed`; also `num_left_chunks` and `cache_dtype` of
                [`SpeechStreamBatch`].
            chunk_tokens (`int`, *optional*): speech tokens between two pieces, see [`SpeechStreamBatch`].
        """
        for (piece,) in self.stream_batch([inputs], chunk_tokens, **options):
            yield piece

    def stream_batch(
        self, inputs: Sequence[str | dict[str, Any]], chunk_tokens: int | None = None, **options: Any
    ) -> Iterator[list[np.ndarray]]:
        """The same for several texts, which are computed together.

        Args:
            inputs: as those of a list in a call. chunk_tokens, options: see [`stream`].

        Yields:
            the next piece of every text, `(samples,)` float32 each; without samples where there is none, as after its
            end. At least one has samples.

        Raises:
            ValueError: texts with different `compatibility`.
        """
        preprocess, forward, _ = self._sanitize_parameters(**options)
        forward = {**self._forward_params, **forward}
        forward.pop("max_batch_size", None)
        seed = forward.pop("seed", None)
        default = forward.pop("compatibility", None)
        texts = [self.preprocess(item, **{**self._preprocess_params, **preprocess}) for item in inputs]
        ways = {text["compatibility"] or default for text in texts if text["inputs"] is not None}
        if len(ways) > 1:
            raise ValueError(f"compatibility: expected the same for all texts of a stream, got {ways}")
        batch = SpeechStreamBatch(self.model, chunk_tokens, compatibility=next(iter(ways), default), **forward)
        sentences = [self._sentences(text["inputs"], seed) for text in texts]
        text_of: dict[int, int] = {}
        while True:
            for number, waiting in enumerate(sentences):
                sentence = None if number in text_of.values() else next(waiting, None)
                if sentence is not None:
                    (handle,) = batch.add(*sentence)
                    text_of[handle] = number
            if not text_of:
                return
            pieces = [np.zeros(0, dtype=np.float32) for _ in texts]
            for handle, piece in batch.step().items():
                pieces[text_of[handle]] = piece.waveform.cpu().numpy()
                if piece.is_last:
                    del text_of[handle]
            if any(len(piece) for piece in pieces):
                yield pieces

    def _sentences(
        self, inputs: dict[str, torch.Tensor] | None, seed: int | None
    ) -> Iterator[tuple[dict[str, torch.Tensor], list[torch.Generator] | None]]:
        """Rows of a text, one by one, with the generators that a call has for them."""
        for row in range(0 if inputs is None else len(next(iter(inputs.values())))):
            sentence = {name: value[row : row + 1].to(self.device) for name, value in inputs.items()}
            yield sentence, None if seed is None else [torch.Generator().manual_seed(seed + row)]
