"""The length predictor of Paraformer: weights of the frames, embeddings of the tokens, and finer weights for times.

Upstream: `CifPredictor`, `CifPredictorV2` (`funasr/models/paraformer/cif_predictor.py`), `CifPredictorV3`
(`funasr/models/bicif_paraformer`), `Predictor` (`wenet/models/paraformer`).

Shape legend: `b` batch, `t` encoder frames, `u` upsampled frames (`t * upsample_times`), `n` tokens, `c` channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .cif import (
    Firing,
    append_tail,
    dynamic_threshold,
    fire_cumulative,
    fire_rounded,
    fire_sequential,
    integrate,
    integrate_exactly,
)


@dataclass
class CifOutput:
    """
    Args:
        embeddings (`(b, n, c)`): of the tokens, zero beyond each item's own.
        token_lengths (`(b,)`, int64): tokens of each item.
        token_counts (`(b,)`, float32): what the length loss compares: the sum of the weights before any scaling.
        alphas (`(b, t or t + 1)`, float32): weights as integrated: with the tail, or scaled to the target length.
        peaks: upstream's firing track of these weights.
    """

    embeddings: Tensor
    token_lengths: Tensor
    token_counts: Tensor
    alphas: Tensor
    peaks: Tensor


class CifPredictor(nn.Module):
    """Convolution, weight per frame, integrate-and-fire; optionally a second, finer head for token times."""

    def __init__(self, config) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        kernel = config.cif_left_order + config.cif_right_order + 1
        self.conv = nn.Conv1d(size, size, kernel, groups=config.cif_groups)
        self.alpha_proj = nn.Linear(size, 1)
        self.dropout = nn.Dropout(config.cif_dropout)
        if config.timestamp_head is not None:
            self.upsample = nn.ConvTranspose1d(size, size, config.upsample_times, config.upsample_times)
            recurrent = config.timestamp_head == "cnn_blstm"
            self.blstm = nn.LSTM(size, size, batch_first=True, bidirectional=True) if recurrent else None
            self.alpha_proj2 = nn.Linear(2 * size if recurrent else size, 1)

    def forward(
        self, hidden_states: Tensor, frame_mask: Tensor | None, target_lengths: Tensor | None = None
    ) -> CifOutput:
        """
        Args:
            hidden_states (`(b, t, c)`), frame_mask (`(b, t)`, bool, `None` = no padding).
            target_lengths (`(b,)`, int64): tokens to make (training); `None` = as many as the weights say.
        """
        # Upstream keeps the predictor out of mixed precision: the sum of many small weights decides over tokens.
        with torch.autocast(hidden_states.device.type, enabled=False):
            hidden_states = hidden_states.to(self.conv.weight.dtype)
            return self._predict(hidden_states, frame_mask, target_lengths)

    def _predict(self, hidden_states: Tensor, frame_mask: Tensor | None, target_lengths: Tensor | None) -> CifOutput:
        config = self.config
        alphas = self.weights(self.convolve(hidden_states), frame_mask)
        counts = alphas.sum(dim=-1)
        if target_lengths is not None:
            return self._towards(hidden_states, alphas, counts, target_lengths)
        if config.cif_dynamic_threshold:
            # Integrating up to `beta` is integrating `alpha / beta` up to 1 and scaling the result back.
            beta = dynamic_threshold(alphas)
            scale = beta.clamp_min(torch.finfo(beta.dtype).tiny)[:, None]
            lengths = (counts / scale[:, 0]).round().long()
            width = int(lengths.max()) if len(lengths) else 0
            embeddings = integrate_exactly(hidden_states, alphas, lengths, width)
            embeddings = embeddings * beta[:, None, None].to(embeddings.dtype)
            return CifOutput(embeddings, lengths, counts, alphas / scale, self._fire(alphas / scale).peaks)
        if config.cif_tail_threshold > 0:
            batch_end = frame_mask is None or not config.cif_tail_mask
            ends = alphas.new_full((len(alphas),), alphas.shape[1]) if batch_end else frame_mask.sum(dim=-1)
            alphas = append_tail(alphas, ends, config.cif_tail_threshold)
            hidden_states = nn.functional.pad(hidden_states, (0, 0, 0, 1))
        lengths = alphas.sum(dim=-1).floor().long()
        firing = self._fire(alphas)
        width = int(lengths.max()) if len(lengths) else 0
        return CifOutput(integrate(hidden_states, alphas, firing, width), lengths, counts, alphas, firing.peaks)

    def convolve(self, hidden_states: Tensor) -> Tensor:
        """What the weights are read from, `(b, t, c)`."""
        config = self.config
        if not hidden_states.shape[1]:
            return hidden_states
        frames = hidden_states.transpose(1, 2)
        convolved = self.conv(nn.functional.pad(frames, (config.cif_left_order, config.cif_right_order)))
        if config.cif_residual:
            convolved = self.dropout(convolved + frames)
        return convolved.relu().transpose(1, 2)

    def weights(self, convolved: Tensor, frame_mask: Tensor | None) -> Tensor:
        """Weight of each frame, `(b, t)` float32, zero on padding."""
        alphas = self.alpha_proj(convolved)[..., 0].float().sigmoid()
        alphas = (alphas * self.config.cif_smooth_factor - self.config.cif_noise_threshold).relu()
        return alphas if frame_mask is None else alphas.masked_fill(~frame_mask, 0.0)

    def _fire(self, alphas: Tensor, targets: bool = False) -> Firing:
        if self.config.cif_integration == "cumulative":
            return fire_cumulative(alphas)
        upstream = self.config.padding == "upstream" or (targets and self.config.cif_training == "upstream")
        return (fire_rounded if upstream else fire_sequential)(alphas, self.config.cif_threshold)

    def _towards(self, hidden_states: Tensor, alphas: Tensor, counts: Tensor, lengths: Tensor) -> CifOutput:
        """Training: the weights are scaled to the length of the text."""
        width = int(lengths.max()) if len(lengths) else 0
        positive = counts.clamp_min(1e-6)
        scaled = alphas * (lengths / positive)[:, None] * (1.0 + self.config.cif_training_margin)
        firing = self._fire(scaled, targets=True)
        if self.config.cif_training == "exact":
            embeddings = integrate_exactly(hidden_states, alphas, lengths, width)
        else:
            embeddings = integrate(hidden_states, scaled, firing, width)
        return CifOutput(embeddings, lengths, counts, scaled, firing.peaks)

    def fine_weights(self, hidden_states: Tensor, frame_mask: Tensor | None) -> Tensor:
        """Weights of the second head, `(b, u)` float32, zero on padding."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return self._fine_weights(hidden_states.to(self.conv.weight.dtype), frame_mask)

    def _fine_weights(self, hidden_states: Tensor, frame_mask: Tensor | None) -> Tensor:
        config = self.config
        if not hidden_states.shape[1]:
            return hidden_states.new_zeros(len(hidden_states), 0, dtype=torch.float32)
        source = self.convolve(hidden_states) if config.timestamp_from_conv else hidden_states
        fine = self.upsample(source.transpose(1, 2)).transpose(1, 2)
        fine_mask = None if frame_mask is None else frame_mask.repeat_interleave(config.upsample_times, dim=1)
        if self.blstm is not None:
            fine = self._recur(fine, fine_mask)
        alphas = self.alpha_proj2(fine)[..., 0].float().sigmoid()
        alphas = (alphas * config.timestamp_smooth_factor - config.timestamp_noise_threshold).relu()
        return alphas if fine_mask is None else alphas.masked_fill(~fine_mask, 0.0)

    def _recur(self, fine: Tensor, fine_mask: Tensor | None) -> Tensor:
        if fine_mask is None or self.config.padding == "upstream":
            # Upstream runs the backward direction through the padding.
            return self.blstm(fine)[0]
        # Items without a frame run one frame of padding, whose weight is masked.
        lengths = fine_mask.sum(dim=-1).clamp_min(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(fine, lengths, batch_first=True, enforce_sorted=False)
        unpacked, _ = nn.utils.rnn.pad_packed_sequence(
            self.blstm(packed)[0], batch_first=True, total_length=fine.shape[1]
        )
        return unpacked

    def fine_track(
        self, hidden_states: Tensor, frame_mask: Tensor | None, token_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weights of the second head scaled to `token_lengths` `(b,)`, and their firing track, `(b, u)` each.

        Threshold and step are 1 - 1e-4, so that the last peak does not hang on rounding.
        """
        alphas = self.fine_weights(hidden_states, frame_mask)
        total = alphas.sum(dim=-1).clamp_min(torch.finfo(alphas.dtype).tiny)
        alphas = alphas * (token_lengths / total)[:, None]
        threshold = self.config.cif_threshold - 1e-4
        return alphas, fire_sequential(alphas, threshold, threshold).peaks
