"""What a recogniser understands of waveforms."""

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from hf_speechllm.models.resampling import resample


# Nobody understands less; what is shorter is an empty text.
SHORTEST_SECONDS = 0.1


@torch.no_grad()
def listen(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    waveforms: Sequence[Tensor],
    sampling_rate: int,
    batch_size: int = 32,
    progress: str | None = None,
) -> list[str]:
    """Texts of waveforms, in batches of similar length.

    Args:
        model, processor: a recogniser in evaluation mode, with its own choice of decoding.
        waveforms: `(samples,)` each, at `sampling_rate`; a waveform of less than 0.1 s has an empty text.
        progress (*optional*): name of a progress bar.
    """
    rate = processor.feature_extractor.sampling_rate
    texts = [""] * len(waveforms)
    heard = [row for row, waveform in enumerate(waveforms) if len(waveform) >= SHORTEST_SECONDS * sampling_rate]
    heard.sort(key=lambda row: -len(waveforms[row]))
    with tqdm(total=len(heard), unit="utterance", desc=progress, disable=progress is None) as bar:
        for start in range(0, len(heard), batch_size):
            rows = heard[start : start + batch_size]
            audio = [resample(waveforms[row].float().cpu(), sampling_rate, rate).numpy() for row in rows]
            inputs = processor(audio=audio, sampling_rate=rate, return_tensors="pt").to(model.device)
            output = model.generate(**inputs, return_dict_in_generate=True)
            decoded = processor.batch_decode(output.sequences, skip_special_tokens=True)
            for row, text in zip(rows, decoded, strict=True):
                texts[row] = text
            bar.update(len(rows))
    return texts
