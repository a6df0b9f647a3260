"""Encoder state of a streaming recogniser: what attention and convolutions remember between two chunks.

The state is a value: it goes into a step and a new one comes out. Several streams share a batch, each at its own
position; the rows of the caches are right-aligned, and `key_mask` says which columns of a row are real.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class EncoderStreamingState:
    """Caches of all layers.

    Args:
        keys, key_biases, values (`list` of `(b, h, s, d)`, `(b, h, s)` or `None`, `(b, h, s, d)`): one entry a layer;
            the keys carry their absolute position (see `conformer.py`).
        convolutions (`list` of `(b, kernel - 1, c)` or `None`): inputs of the convolution modules.
        key_mask (`(b, s)`, bool): True = a cached frame of this stream.
        offsets (`(b,)`, int64): encoder frames that each stream has produced.
    """

    keys: list[Tensor]
    key_biases: list[Tensor | None]
    values: list[Tensor]
    convolutions: list[Tensor | None]
    key_mask: Tensor
    offsets: Tensor

    def to_tensors(self) -> dict[str, Tensor]:
        """A flat dictionary of tensors, to be saved for instance with safetensors."""
        tensors = {"key_mask": self.key_mask, "offsets": self.offsets}
        for name in ("keys", "key_biases", "values", "convolutions"):
            for layer, tensor in enumerate(getattr(self, name)):
                if tensor is not None:
                    tensors[f"{name}.{layer}"] = tensor.contiguous()
        return tensors

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], num_layers: int) -> "EncoderStreamingState":
        """Inverse of [`to_tensors`]."""
        per_layer = {
            field.name: [tensors.get(f"{field.name}.{layer}") for layer in range(num_layers)]
            for field in fields(cls)
            if field.name not in ("key_mask", "offsets")
        }
        return cls(key_mask=tensors["key_mask"], offsets=tensors["offsets"], **per_layer)


def right_align(tensor: Tensor, shift: Tensor, dim: int) -> Tensor:
    """Move each row `shift[b]` places to the right along `dim`; what leaves on the right re-enters on the left.

    Args:
        tensor: batch first. shift (`(b,)`, int64): number of invalid columns at the right end of each row.
    """
    length = tensor.shape[dim]
    index = (torch.arange(length, device=tensor.device)[None] - shift[:, None]) % max(length, 1)
    shape = [1] * tensor.dim()
    shape[0], shape[dim] = tensor.shape[0], length
    return tensor.gather(dim, index.reshape(shape).expand_as(tensor))
