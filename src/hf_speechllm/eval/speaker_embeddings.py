"""Speaker embeddings of waveforms."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_speechllm.models.feature_extraction_campplus import CampplusFeatureExtractor
from hf_speechllm.models.modeling_campplus import CampplusModel
from hf_speechllm.models.resampling import resample


# One window of the filter banks.
SHORTEST_SECONDS = 0.025


@torch.no_grad()
def embed_speakers(
    encoder: CampplusModel, waveforms: Sequence[Tensor], sampling_rate: int, batch_size: int = 32
) -> tuple[Tensor, list[int]]:
    """Embeddings, and which waveforms they are of: those of at least 25 ms.

    Args:
        encoder: in evaluation mode. waveforms: `(samples,)` each, at `sampling_rate`.

    Returns:
        `(n, embedding_size)` float32 on the CPU, and n indices in ascending order.
    """
    extractor = CampplusFeatureExtractor(feature_size=encoder.config.num_mel_bins)
    rate = extractor.sampling_rate
    rows = [row for row, waveform in enumerate(waveforms) if len(waveform) >= SHORTEST_SECONDS * sampling_rate]
    embeddings = torch.zeros(len(rows), encoder.config.embedding_size)
    # In batches of similar length.
    order = sorted(range(len(rows)), key=lambda place: -len(waveforms[rows[place]]))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        audio = [resample(waveforms[rows[place]].float().cpu(), sampling_rate, rate) for place in places]
        features = extractor(audio, sampling_rate=rate).to(encoder.device)
        embeddings[places] = encoder(**features).embeddings.float().cpu()
    return embeddings, rows
