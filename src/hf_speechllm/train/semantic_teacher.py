"""A self-supervised speech model as the teacher of a codec's first level, listening to the very crops of the batch.

Upstream stores the features of whole recordings and cuts them along the wrong axis, so that they belong to other
audio than the crop (`speechtokenizer/trainer/dataset.py`); computed from the crop they cannot be misplaced.
"""

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class SemanticTeacher(nn.Module):
    """Features of a frozen `HubertModel` (or Wav2Vec2, WavLM: any model with convolutions in front and hidden states).

    Args:
        model: the teacher; it is put into evaluation mode and gets no gradient.
        layer: `"mean"` of all hidden states, the input of the first layer included (13 for a base model), or the
            number of one layer, counted from 1; 0 is the input of the first.
        hop_length: samples per frame of the codec. sampling_rate: of its audio in Hz.

    Raises:
        ValueError: a layer that is not there, or frames of another length than the codec's.
    """

    def __init__(self, model: PreTrainedModel, layer: str | int = "mean", hop_length: int = 320) -> None:
        super().__init__()
        if layer != "mean" and not (isinstance(layer, int) and 0 <= layer <= model.config.num_hidden_layers):
            raise ValueError(
                f"layer: expected 'mean' or 0..{model.config.num_hidden_layers} of the teacher, got {layer!r}"
            )
        if math.prod(model.config.conv_stride) != hop_length:
            raise ValueError(
                f"hop_length: expected that of the codec, {hop_length}, of the teacher's conv_stride, "
                f"got {math.prod(model.config.conv_stride)}"
            )
        self.model = model.eval().requires_grad_(False)
        self.layer = layer

    @property
    def hidden_size(self) -> int:
        """Channels of the features."""
        return self.model.config.hidden_size

    def train(self, mode: bool = True) -> "SemanticTeacher":
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, input_values: Tensor, attention_mask: Tensor) -> Tensor:
        """Features float `(b, frames, hidden_size)`; frame `i` begins at sample `i * hop_length`, as the codec's.

        Args:
            input_values (`(b, samples)`): at the teacher's level (mean 0, variance 1 for those that were trained so).
            attention_mask (`(b, samples)`): 1 = recorded sample. A teacher whose first convolution is normalised over
                time was trained without, and hears the zeros.
        """
        mask = attention_mask if self.model.config.feat_extract_norm == "layer" else None
        states = self.model(input_values, attention_mask=mask, output_hidden_states=True).hidden_states
        if self.layer == "mean":
            return torch.stack(states).mean(dim=0)
        return states[self.layer]
