"""Items to a padded batch."""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence


class SpeechRecognitionCollator:
    """Pads features with 0 and labels with -100.

    Args:
        pad_to_multiple_of (`int`): the batch is padded to a multiple of this many frames (1: to its longest item),
            which limits the number of shapes that a compiled model sees.
    """

    def __init__(self, pad_to_multiple_of: int = 1):
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Collate.

        Args:
            items: dictionaries with `input_features` `(frames, bins)` and `labels` `(tokens,)`.

        Returns:
            `input_features` float32 `(batch, frames, bins)`, `attention_mask` int64 `(batch, frames)` with 1 =
            real frame, `labels` int64 `(batch, tokens)` with -100 = padding.
        """
        frames = torch.tensor([item["input_features"].shape[0] for item in items])
        features = pad_sequence([item["input_features"] for item in items], batch_first=True, padding_value=0.0)
        extra = -features.shape[1] % self.pad_to_multiple_of
        if extra:
            features = torch.nn.functional.pad(features, (0, 0, 0, extra))
        return {
            "input_features": features,
            "attention_mask": (torch.arange(features.shape[1]) < frames[:, None]).long(),
            "labels": pad_sequence([item["labels"] for item in items], batch_first=True, padding_value=-100),
        }
