"""Utterances to speech units, in batches of similar length."""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from hf_speechllm.data.manifests import Utterance
from hf_speechllm.data.waveform_batches import waveform_batches
from hf_speechllm.models.modeling_speechgpt_units import SpeechGptUnitsModel


@torch.no_grad()
def extract_units(
    model: SpeechGptUnitsModel, utterances: Sequence[Utterance], batch_seconds: float = 60.0, progress: bool = True
) -> list[dict[str, Any]]:
    """Units of each utterance.

    Args:
        model: in evaluation mode, on any device.
        utterances: their audio is decoded here, and resampled to the model's rate.
        batch_seconds: budget of a batch, padding included; an utterance that is longer is a batch of its own.

    Returns:
        one row per utterance in their order: the columns of its manifest row, and `key`, `text`, `speaker`, `units`
        (adjacent repeats removed) and `durations` (frames of each unit).

    Raises:
        AudioError: an audio file that cannot be used.
    """
    rows: list[dict[str, Any]] = [{} for _ in utterances]
    with tqdm(total=len(utterances), unit="utterance", desc="units", disable=not progress) as bar:
        for batch in waveform_batches(utterances, model.config.sampling_rate, batch_seconds):
            output = model.encode(batch.input_values.to(model.device), batch.attention_mask.to(model.device))
            for row, index in enumerate(batch.indices):
                item, length = utterances[index], int(output.reduced_lengths[row])
                rows[index] = {
                    **item.columns,
                    "key": item.key,
                    "text": item.text,
                    "speaker": item.speaker or "",
                    "units": output.reduced_ids[row, :length].tolist(),
                    "durations": output.durations[row, :length].tolist(),
                }
            bar.update(len(batch.indices))
    return rows
