"""Batches of mixed lengths without computing their padding: on a CPU each utterance goes through the encoder alone, or
one behind the other where the encoder knows how.

A CPU gains little from a batch, since one utterance already keeps it busy, and pays for every padded frame. Only for
encoders whose result for an utterance does not depend on the batch, and where no gradient is needed.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


# Share of padding from which it pays to go without the batch.
_LEAST_PADDING = 0.1
# Shorter utterances are over before the weights have been read.
_LEAST_FRAMES = 16
# More frames in one product gain nothing, and their activations leave the cache.
_MOST_JOINED_FRAMES = 1024


def lengths_to_encode_apart(features: Tensor, attention_mask: Tensor | None) -> list[int] | None:
    """Frames of each utterance if the batch should be taken apart, else `None`.

    Args:
        features (`(b, t, input_size)`), attention_mask (`(b, t)`): 1 = real frame, real ones first.
    """
    if attention_mask is None or features.device.type != "cpu" or torch.is_grad_enabled() or len(features) < 2:
        return None
    lengths = attention_mask.sum(dim=-1)
    in_front = torch.arange(features.shape[1]) < lengths[:, None]
    if int(lengths.min()) < _LEAST_FRAMES or not torch.equal(in_front, attention_mask.bool()):
        return None
    padding = 1.0 - int(lengths.sum()) / in_front.numel()
    return lengths.tolist() if padding >= _LEAST_PADDING else None


def encode_apart(
    encode: Callable[[int, Tensor], Tensor], features: Tensor, lengths: list[int]
) -> tuple[Tensor, Tensor]:
    """Run `encode(row, features (1, length, input_size)) -> (1, t', c)` on each utterance.

    Returns:
        their frames `(b, t', c)`, zero where padded, and the mask `(b, t')`, bool, True = real.
    """
    return _pad([encode(row, features[row : row + 1, :length])[0] for row, length in enumerate(lengths)])


def encode_joined(
    encode: Callable[[list[Tensor]], list[Tensor]], features: Tensor, lengths: list[int]
) -> tuple[Tensor, Tensor]:
    """Run `encode([(length, input_size), …]) -> [(t', c), …]` on a few utterances at a time.

    Returns:
        as `encode_apart`.
    """
    pieces: list[Tensor] = []
    group: list[Tensor] = []
    for frames, length in zip(features, lengths, strict=True):
        if group and sum(map(len, group)) + length > _MOST_JOINED_FRAMES:
            pieces += encode(group)
            group = []
        group.append(frames[:length])
    return _pad(pieces + encode(group))


def _pad(pieces: list[Tensor]) -> tuple[Tensor, Tensor]:
    hidden = pad_sequence(pieces, batch_first=True)
    counts = torch.tensor([len(piece) for piece in pieces])
    return hidden, torch.arange(hidden.shape[1]) < counts[:, None]
