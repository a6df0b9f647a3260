"""Length regulator of CosyVoice 1's flow: encoded tokens stretched to mel frames and smoothed by convolutions.

Upstream: `cosyvoice/flow/length_regulator.py`.

Shape legend: `b` batch, `n` tokens, `t` frames, `m` mel bins. In every mask 1 = real.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .convolution import PointwiseConv1d
from .frame_convolution import FrameConv1d, FrameGroupNorm, masked


# Tokens at both ends of a new part that are stretched on their own: the overlap of two streamed pieces.
_EDGE_TOKENS = 20


class LengthRegulator(nn.Module):
    """Linear interpolation, convolutions of kernel 3 with group norm and Mish, and a projection."""

    def __init__(self, config) -> None:
        super().__init__()
        size = config.num_mel_bins
        self.invariant = config.padding == "invariant"
        self.num_frames = config.num_frames
        self.convs = nn.ModuleList(FrameConv1d(size, size, 3) for _ in range(config.num_regulator_layers))
        self.norms = nn.ModuleList(
            FrameGroupNorm(config.regulator_groups, size) for _ in range(config.num_regulator_layers)
        )
        self.out_proj = PointwiseConv1d(size, size, bias=True)

    def forward(self, hidden: Tensor, token_lengths: list[int], frame_lengths: list[int]) -> Tensor:
        """Training: `(b, n, m)` stretched to the frames of the targets, `(b, t, m)`, zero where padded."""
        device = hidden.device
        longest = max(frame_lengths)
        mask = torch.arange(longest, device=device) < torch.tensor(frame_lengths, device=device)[:, None]
        if not self.invariant:
            # Upstream stretches the padded batch as a whole, and its convolutions and norms see all of it.
            return masked(self._smooth(stretch(hidden, longest), None), mask)
        rows = [
            stretch(row[None, :tokens], frames)[0]
            for row, tokens, frames in zip(hidden, token_lengths, frame_lengths, strict=True)
        ]
        return self._smooth(pad_sequence(rows, batch_first=True), None if bool(mask.all()) else mask)

    def stretch_apart(
        self, hidden: Tensor, prompt_tokens: list[int], token_lengths: list[int], prompt_frames: list[int]
    ) -> tuple[Tensor, Tensor | None]:
        """Inference: prompt and new part of each row are stretched on their own, and the new part's ends as well.

        Args:
            hidden (`(b, n, m)`): of which the first `token_lengths[b]` are real; they begin with `prompt_tokens[b]`.
            prompt_frames: mel frames of each prompt.

        Returns:
            frames `(b, t, m)`, those of the prompt first, and their mask, `None` = no padding.
        """
        rows = []
        for row, prompt, length, frames in zip(hidden, prompt_tokens, token_lengths, prompt_frames, strict=True):
            parts = [stretch(row[None, :prompt], frames), self._stretch_new(row[None, prompt:length])]
            rows.append(torch.cat(parts, dim=1)[0])
        counts = torch.tensor([len(row) for row in rows], device=hidden.device)
        stretched = pad_sequence(rows, batch_first=True)
        mask = torch.arange(stretched.shape[1], device=hidden.device) < counts[:, None]
        mask = None if bool(mask.all()) else mask
        return self._smooth(stretched, mask), mask

    def _stretch_new(self, hidden: Tensor) -> Tensor:
        tokens = hidden.shape[1]
        frames, edge = self.num_frames(tokens), self.num_frames(_EDGE_TOKENS)
        if tokens <= 2 * _EDGE_TOKENS:
            return stretch(hidden, frames)
        head, middle, tail = hidden.split([_EDGE_TOKENS, tokens - 2 * _EDGE_TOKENS, _EDGE_TOKENS], dim=1)
        return torch.cat([stretch(head, edge), stretch(middle, frames - 2 * edge), stretch(tail, edge)], dim=1)

    def _smooth(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            hidden = masked(nn.functional.mish(norm(conv(hidden), mask)), mask)
        return masked(self.out_proj(hidden), mask)


def stretch(hidden: Tensor, num_frames: int) -> Tensor:
    """Linear interpolation over time, `(b, n, m)` → `(b, num_frames, m)`; `(b, 0, m)` where either is 0."""
    if num_frames == 0 or hidden.shape[1] == 0:
        return hidden[:, :0]
    channels_first = hidden.transpose(1, 2).contiguous()
    return nn.functional.interpolate(channels_first, size=num_frames, mode="linear").transpose(1, 2)
