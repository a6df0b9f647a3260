"""Utterances to what CosyVoice's language model and flow are trained on: speech tokens and speaker embeddings."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from hf_speechllm.data.manifests import Utterance
from hf_speechllm.data.waveform_batches import waveform_batches
from hf_speechllm.models.feature_extraction_campplus import CampplusFeatureExtractor
from hf_speechllm.models.feature_extraction_s3_tokenizer import S3FeatureExtractor


@torch.no_grad()
def extract_speech_tokens(
    speech_tokenizer: PreTrainedModel,
    speaker_encoder: PreTrainedModel,
    utterances: Sequence[Utterance],
    batch_seconds: float = 120.0,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Tokens and speaker of each utterance.

    Args:
        speech_tokenizer (`S3TokenizerModel`), speaker_encoder (`CampplusModel`): in evaluation mode, on one device.
        utterances: their audio is decoded here, and resampled to 16 kHz.
        batch_seconds: budget of a batch, padding included.

    Returns:
        one row per utterance in their order, with upstream's names: `utt`, `audio` (absolute path), `text`, `spk`,
        `speech_token`, `utt_embedding` (normalised) and `spk_embedding` (the mean of the speaker's, normalised; that
        of the utterance where the speaker is not known).

    Raises:
        AudioError: an audio file that cannot be used.
    """
    tokenizer_extractor = S3FeatureExtractor(feature_size=speech_tokenizer.config.num_mel_bins)
    speaker_extractor = CampplusFeatureExtractor(feature_size=speaker_encoder.config.num_mel_bins)
    device = speech_tokenizer.device
    rows: list[dict[str, Any]] = [{} for _ in utterances]
    embeddings: list[Tensor] = [torch.zeros(0)] * len(utterances)
    with tqdm(total=len(utterances), unit="utterance", desc="speech tokens", disable=not progress) as bar:
        for batch in waveform_batches(utterances, tokenizer_extractor.sampling_rate, batch_seconds):
            waveforms = batch.waveforms
            features = tokenizer_extractor(waveforms).to(device)
            tokens = speech_tokenizer.encode(**features)
            voices = speaker_encoder(**speaker_extractor(waveforms).to(device)).embeddings
            for row, index in enumerate(batch.indices):
                item = utterances[index]
                embeddings[index] = torch.nn.functional.normalize(voices[row].float().cpu(), dim=0)
                rows[index] = {
                    "utt": item.key,
                    "audio": str(item.audio),
                    "text": item.text,
                    "spk": item.speaker or "",
                    "speech_token": tokens.token_ids[row][tokens.token_mask[row]].tolist(),
                    "utt_embedding": embeddings[index].tolist(),
                }
            bar.update(len(batch.indices))
    means = speaker_means([item.speaker for item in utterances], embeddings)
    for row, item, embedding in zip(rows, utterances, embeddings, strict=True):
        row["spk_embedding"] = (embedding if item.speaker is None else means[item.speaker]).tolist()
    return rows


def speaker_means(speakers: Sequence[str | None], embeddings: Sequence[Tensor]) -> dict[str, Tensor]:
    """The normalised mean of each known speaker's embeddings."""
    groups: defaultdict[str, list[Tensor]] = defaultdict(list)
    for speaker, embedding in zip(speakers, embeddings, strict=True):
        if speaker is not None:
            groups[speaker].append(embedding)
    return {
        speaker: torch.nn.functional.normalize(torch.stack(rows).mean(dim=0), dim=0)
        for speaker, rows in groups.items()
    }
