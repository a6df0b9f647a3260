"""Utterances to speech units, in batches of similar length."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from hf_speechllm.data.manifests import Utterance
from hf_speechllm.data.waveform_batches import WaveformBatch, waveform_batches
from hf_speechllm.models.feature_extraction_s3_tokenizer import S3FeatureExtractor
from hf_speechllm.models.modeling_s3_tokenizer import S3TokenizerModel
from hf_speechllm.models.modeling_speechgpt_units import SpeechGptUnitsModel


# Units of one utterance and the frames of each.
Units = tuple[list[int], list[int]]


@torch.no_grad()
def extract_units(
    model: SpeechGptUnitsModel | S3TokenizerModel,
    utterances: Sequence[Utterance],
    batch_seconds: float = 60.0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Units of each utterance.

    Args:
        model: in evaluation mode, on any device. The tokens of an `s3_tokenizer` are kept as they are, repeats
            included, because the flow that speaks them knows no durations.
        utterances: their audio is decoded here, and resampled to the model's rate.
        batch_seconds: budget of a batch, padding included; an utterance that is longer is a batch of its own.

    Returns:
        one row per utterance in their order: the columns of its manifest row, and `key`, `text`, `speaker`, `units`
        (adjacent repeats removed, but for an `s3_tokenizer`) and `durations` (frames of each unit).

    Raises:
        AudioError: an audio file that cannot be used.
    """
    if isinstance(model, S3TokenizerModel):
        extractor = S3FeatureExtractor(feature_size=model.config.num_mel_bins)
        rate, encode = extractor.sampling_rate, partial(_speech_tokens, model, extractor)
    else:
        rate, encode = model.config.sampling_rate, partial(_reduced_units, model)
    rows: list[dict[str, Any]] = [{} for _ in utterances]
    with tqdm(total=len(utterances), unit="utterance", desc="units", disable=not progress) as bar:
        for batch in waveform_batches(utterances, rate, batch_seconds):
            for index, (units, durations) in zip(batch.indices, encode(batch), strict=True):
                item = utterances[index]
                rows[index] = {
                    **item.columns,
                    "key": item.key,
                    "text": item.text,
                    "speaker": item.speaker or "",
                    "units": units,
                    "durations": durations,
                }
            bar.update(len(batch.indices))
    return rows


def _reduced_units(model: SpeechGptUnitsModel, batch: WaveformBatch) -> list[Units]:
    output = model.encode(batch.input_values.to(model.device), batch.attention_mask.to(model.device))
    return [
        (ids[:length].tolist(), durations[:length].tolist())
        for ids, durations, length in zip(
            output.reduced_ids, output.durations, output.reduced_lengths.tolist(), strict=True
        )
    ]


def _speech_tokens(model: S3TokenizerModel, extractor: S3FeatureExtractor, batch: WaveformBatch) -> list[Units]:
    output = model.encode(**extractor(batch.waveforms).to(model.device))
    tokens = [ids[mask].tolist() for ids, mask in zip(output.token_ids, output.token_mask, strict=True)]
    return [(row, [1] * len(row)) for row in tokens]
