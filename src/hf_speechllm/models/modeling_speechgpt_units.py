"""Speech units: the cluster to which each HuBERT frame of a recording belongs (`speechgpt_units`).

Upstream: 0nutation/SpeechGPT, `speechgpt/utils/speech2unit/speech2unit.py`; the network is fairseq's HuBERT
(https://arxiv.org/abs/2106.07447), here transformers' own.

Shape legend: `b` batch, `s` samples, `t` frames, `d` width of the network, `k` clusters.

What differs from upstream: recordings of different lengths go together and give what they give alone; layers after the
chosen one are not computed; a recording longer than `max_chunk_samples` is by default computed in overlapping pieces
that know each other (`seamless_chunks`); one that is too short for a frame has no units and is no error.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import HubertModel, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.utils import ModelOutput

from .configuration_speechgpt_units import SpeechGptUnitsConfig
from .unit_string import parse_unit_string, unit_string
from .window_convolution import WindowConv1d


__all__ = [
    *("SpeechGptUnitsFeatures", "SpeechGptUnitsModel", "SpeechGptUnitsOutput"),
    *("merge_repeats", "parse_unit_string", "unit_string"),
]

# Windows of the first convolution, while the statistics of a long recording are gathered.
_STATISTICS_FRAMES = 1 << 15
# Of the first convolution's output, the largest of all, that are computed at once: they stay in the caches of a CPU.
_TILE_VALUES = 1 << 21
# What a CPU computes at once: more only drives the activations out of its caches, less leaves it idle between calls.
_CPU_SAMPLES = 160_000
# Entries of the matrix of distances that are computed at once.
_DISTANCES = 1 << 24


@dataclass
class SpeechGptUnitsFeatures(ModelOutput):
    """
    Args:
        last_hidden_state (`(b, t, d)`): output of the chosen layer, zero on padded frames.
        attention_mask (`(b, t)`, bool): True = real frame.
    """

    last_hidden_state: Tensor | None = None
    attention_mask: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """Frames of each recording, `(b,)` int64."""
        return self.attention_mask.sum(dim=-1)


@dataclass
class SpeechGptUnitsOutput(ModelOutput):
    """
    Args:
        unit_ids (`(b, t)`, int64): cluster of each frame, -1 = padding.
        lengths (`(b,)`, int64): frames of each recording.
        reduced_ids (`(b, n)`, int64): the same without adjacent repeats, -1 = padding.
        durations (`(b, n)`, int64): how many frames each of `reduced_ids` stands for, 0 on padding.
        reduced_lengths (`(b,)`, int64): reduced units of each recording.
    """

    unit_ids: Tensor | None = None
    lengths: Tensor | None = None
    reduced_ids: Tensor | None = None
    durations: Tensor | None = None
    reduced_lengths: Tensor | None = None


def merge_repeats(unit_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Run-length encoding of the units of each recording.

    Args:
        unit_ids (`(b, t)`, int64), lengths (`(b,)`): units, and how many of them are real.
    Returns:
        the first of every run `(b, n)` padded with -1, the lengths of the runs `(b, n)` padded with 0, and how many
        runs there are `(b,)`.
    """
    valid = torch.arange(unit_ids.shape[1], device=unit_ids.device) < lengths[:, None]
    starts = valid.clone()
    starts[:, 1:] &= unit_ids[:, 1:] != unit_ids[:, :-1]
    counts = starts.sum(dim=1)
    place = (starts.cumsum(dim=1) - 1).clamp_min(0)
    longest = int(counts.max()) if counts.numel() else 0
    reduced = unit_ids.new_full((len(unit_ids), longest), -1)
    rows, columns = starts.nonzero(as_tuple=True)
    reduced[rows, place[rows, columns]] = unit_ids[rows, columns]
    durations = unit_ids.new_zeros((len(unit_ids), longest))
    if longest:
        durations.scatter_add_(1, place, valid.long())
    return reduced, durations, counts


def _padded(rows: list[Tensor]) -> SpeechGptUnitsFeatures:
    hidden = pad_sequence(rows, batch_first=True)
    counts = torch.tensor([len(row) for row in rows], device=hidden.device)
    return SpeechGptUnitsFeatures(hidden, torch.arange(hidden.shape[1], device=hidden.device) < counts[:, None])


class SpeechGptUnitsModel(PreTrainedModel):
    """HuBERT up to one layer, and the codebook over it."""

    config_class = SpeechGptUnitsConfig
    config: SpeechGptUnitsConfig
    # Not "hubert": that part alone is no model of this configuration.
    base_model_prefix = "model"
    main_input_name = "input_values"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["HubertEncoderLayer", "HubertEncoderLayerStableLayerNorm", "ParametrizedConv1d"]
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: SpeechGptUnitsConfig) -> None:
        super().__init__(config)
        self.hubert = HubertModel(config.hubert_config)
        for layer in self.hubert.feature_extractor.conv_layers:
            layer.conv.__class__ = WindowConv1d
        self.register_buffer("codebook", torch.zeros(config.num_units, config.hidden_size))
        # As loading sets it, so that a model saved, loaded and saved again has the same configuration.
        config.hubert_config.dtype = self.dtype
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SpeechGptUnitsModel):
            init.zeros_(module.codebook)

    # -- units -------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def encode(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        max_chunk_samples: int | None = None,
        seamless_chunks: bool | None = None,
    ) -> SpeechGptUnitsOutput:
        """Units of recordings.

        Args:
            input_values (`(b, s)`, float32, 16 kHz), attention_mask (`(b, s)`): 1 = real sample, real ones first.
            max_chunk_samples, seamless_chunks: of the configuration by default; see [`extract_features`].

        Raises:
            ValueError: see [`extract_features`].

        Example:

        ```python
        >>> inputs = feature_extractor(waveform, sampling_rate=16000, return_tensors="pt")
        >>> units = model.encode(**inputs)
        >>> unit_string(units.reduced_ids[0])
        '<sosp><189><63><991><eosp>'
        ```
        """
        features = self.extract_features(
            input_values, attention_mask, max_chunk_samples=max_chunk_samples, seamless_chunks=seamless_chunks
        )
        lengths = features.lengths
        unit_ids = self.quantize(features.last_hidden_state).masked_fill(~features.attention_mask, -1)
        return SpeechGptUnitsOutput(unit_ids, lengths, *merge_repeats(unit_ids, lengths))

    @torch.no_grad()
    def quantize(self, features: Tensor) -> Tensor:
        """The nearest row of the codebook for each vector: argmin of |x|^2 - 2 x C + |C|^2, in float32.

        Args:
            features (`(..., d)`).
        Returns:
            `(...)` int64, 0 to `k - 1`.
        """
        centres = self.codebook.float()
        squares = centres.square().sum(dim=1)
        rows = features.float().reshape(-1, features.shape[-1])
        ids = [
            (piece.square().sum(dim=1, keepdim=True) - 2 * piece @ centres.T + squares).argmin(dim=1)
            for piece in rows.split(max(1, _DISTANCES // len(centres)))
        ]
        return torch.cat(ids).view(features.shape[:-1])

    # -- features ----------------------------------------------------------------------------------------------------
    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        layer: int | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> SpeechGptUnitsFeatures | tuple:
        """Output of a layer, in one pass over whole recordings however long they are.

        Args:
            input_values (`(b, s)`), attention_mask (`(b, s)`): 1 = real sample, real ones first; `None` = all real.
            layer: from 1; `config.layer` by default.

        Raises:
            ValueError: a layer that the network does not have, or a mask that does not cover a beginning.
        """
        lengths = self._sample_lengths(input_values, attention_mask)
        features = self._one_pass(self._waveforms(input_values, lengths), lengths, self._checked_layer(layer))
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return features if return_dict else features.to_tuple()

    def extract_features(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        layer: int | None = None,
        max_chunk_samples: int | None = None,
        seamless_chunks: bool | None = None,
    ) -> SpeechGptUnitsFeatures:
        """Output of a layer; recordings longer than `max_chunk_samples` in pieces.

        Seamless pieces: the convolutions see what they would see in one pass, and a group norm takes the statistics of
        the whole recording, so that the vectors that enter the transformer are those of one pass (up to rounding).
        Self-attention and the positional convolution see the piece and `config.context_samples` on either side of it
        in place of the whole recording: this is where seamless pieces may differ from one pass, by an amount that
        depends on how far a trained network looks. Not seamless: every piece alone, as upstream does.

        Args:
            input_values (`(b, s)`), attention_mask (`(b, s)`): 1 = real sample, real ones first; `None` = all real.
            layer: from 1; `config.layer` by default.
            max_chunk_samples, seamless_chunks: of the configuration by default.

        Raises:
            ValueError: a layer that the network does not have, a mask that does not cover a beginning, or pieces that
                are too short for a frame.
        """
        config = self.config
        layer = self._checked_layer(layer)
        size = config.max_chunk_samples if max_chunk_samples is None else max_chunk_samples
        seamless = config.seamless_chunks if seamless_chunks is None else seamless_chunks
        if size < config.receptive_field:
            raise ValueError(f"max_chunk_samples: expected at least {config.receptive_field}, got {size}")
        lengths = self._sample_lengths(input_values, attention_mask)
        waveforms = self._waveforms(input_values, lengths)
        is_long = lengths > size
        if not bool(is_long.any()):
            return self._one_pass(waveforms, lengths, layer)
        rows: list[Tensor | None] = [None] * len(waveforms)
        in_pieces = self._seamless_pieces if seamless else self._separate_pieces
        for row in is_long.nonzero().flatten().tolist():
            rows[row] = in_pieces(waveforms[row : row + 1, : lengths[row]], size, layer)
        short = (~is_long).nonzero().flatten()
        if len(short):
            together = self._one_pass(waveforms[short, : lengths[short].max()], lengths[short], layer)
            for row, frames, count in zip(short.tolist(), together.last_hidden_state, together.lengths, strict=True):
                rows[row] = frames[:count]
        return _padded(rows)

    def _checked_layer(self, layer: int | None) -> int:
        layer, layers = self.config.layer if layer is None else layer, len(self.hubert.encoder.layers)
        if not 1 <= layer <= layers:
            raise ValueError(f"layer: expected 1..{layers}, got {layer}")
        return layer

    def _sample_lengths(self, input_values: Tensor, attention_mask: Tensor | None) -> Tensor:
        if input_values.dim() != 2:
            raise ValueError(f"input_values: expected (batch, samples), got {tuple(input_values.shape)}")
        batch, samples = input_values.shape
        if attention_mask is None:
            return torch.full((batch,), samples, device=input_values.device)
        if attention_mask.shape != input_values.shape:
            raise ValueError(
                f"attention_mask: expected the shape of input_values {tuple(input_values.shape)}, got "
                f"{tuple(attention_mask.shape)}"
            )
        lengths = attention_mask.long().sum(dim=1)
        if not torch.equal(torch.arange(samples, device=lengths.device) < lengths[:, None], attention_mask.bool()):
            raise ValueError("attention_mask: expected ones, then zeros, in every row (padding on the right)")
        return lengths

    def _waveforms(self, input_values: Tensor, lengths: Tensor) -> Tensor:
        """What enters the network: in its dtype, each recording normalised by itself if the configuration says so."""
        waveforms = input_values
        if self.config.normalize:
            waveforms, eps = torch.zeros_like(input_values), self.config.normalize_eps
            for row, length in enumerate(lengths.tolist()):
                if length:
                    values = input_values[row, :length]
                    waveforms[row, :length] = nn.functional.layer_norm(values, (length,), eps=eps)
        return waveforms.to(self.dtype)

    # -- pieces of a long recording ----------------------------------------------------------------------------------
    def _separate_pieces(self, waveform: Tensor, size: int, layer: int) -> Tensor:
        """Upstream's way: every piece of `waveform` `(1, s)` as a recording of its own; `(t, d)`.

        What is left at the end may be too short for a frame, where upstream fails: it is left out.
        """
        pieces = [piece for piece in waveform.split(size, dim=1) if piece.shape[1] >= self.config.receptive_field]
        return torch.cat([self._one_recording(piece, None, layer)[0] for piece in pieces])

    def _seamless_pieces(self, waveform: Tensor, size: int, layer: int) -> Tensor:
        """Pieces with context and with the statistics of the whole; `(t, d)`."""
        config = self.config
        hop, frames = config.hop_length, config.num_frames(waveform.shape[1])
        step, context = max(1, size // hop), -(-config.context_samples // hop)
        statistics = self._statistics(waveform, [waveform.shape[1]])
        found = []
        for first in range(0, frames, step):
            last = min(first + step, frames)
            start, end = max(0, first - context), min(frames, last + context)
            samples = waveform[:, start * hop : (end - 1) * hop + config.receptive_field]
            hidden = self._one_recording(samples, statistics, layer)[0]
            found.append(hidden[first - start : last - start])
        return torch.cat(found)

    # -- the network -------------------------------------------------------------------------------------------------
    def _one_pass(self, waveforms: Tensor, lengths: Tensor, layer: int) -> SpeechGptUnitsFeatures:
        """Layer `layer` of recordings `(b, s)`, each as if it were alone."""
        if len(lengths):
            waveforms = waveforms[:, : lengths.max()]
        limit = None
        if waveforms.device.type == "cpu" and not torch.is_grad_enabled():
            limit = _CPU_SAMPLES
        if self.config.hubert_config.conv_pos_batch_norm and bool((lengths != waveforms.shape[1]).any()):
            # It turns the zeros after a recording into something else, for a convolution that sees them.
            limit = 0
        if limit is None or len(waveforms) < 2 or waveforms.numel() <= limit:
            return self._one_batch(waveforms, lengths, layer)
        batches: list[list[int]] = []
        counts = lengths.tolist()
        for row in sorted(range(len(counts)), key=lambda row: -counts[row]):
            if not batches or (len(batches[-1]) + 1) * counts[batches[-1][0]] > limit:
                batches.append([])
            batches[-1].append(row)
        rows: list[Tensor | None] = [None] * len(waveforms)
        for batch in batches:
            found = self._one_batch(waveforms[batch, : counts[batch[0]]], lengths[batch], layer)
            for row, frames, count in zip(batch, found.last_hidden_state, found.lengths.tolist(), strict=True):
                rows[row] = frames[:count]
        return _padded(rows)

    def _one_batch(self, waveforms: Tensor, lengths: Tensor, layer: int) -> SpeechGptUnitsFeatures:
        """The same in one go."""
        config = self.config
        counts = torch.tensor([config.num_frames(length) for length in lengths.tolist()], device=waveforms.device)
        if bool((lengths == waveforms.shape[1]).all()):
            frames = int(counts[0]) if len(counts) else 0
            mask = torch.ones((len(waveforms), frames), dtype=torch.bool, device=waveforms.device)
            if not frames or not len(waveforms):
                return SpeechGptUnitsFeatures(waveforms.new_zeros((*mask.shape, config.hidden_size)), mask)
            return SpeechGptUnitsFeatures(self._one_recording(waveforms, None, layer), mask)
        short = config.receptive_field - waveforms.shape[1]
        if short > 0:
            waveforms = nn.functional.pad(waveforms, (0, short))
        statistics = self._statistics(waveforms, lengths.tolist())
        hidden = self.hubert.feature_projection(self._convolve(waveforms, statistics))
        mask = torch.arange(hidden.shape[1], device=hidden.device) < counts[:, None]
        hidden = self._transform(hidden, mask, layer)
        longest = int(counts.max())
        hidden, mask = hidden[:, :longest], mask[:, :longest]
        return SpeechGptUnitsFeatures(hidden.masked_fill(~mask[..., None], 0.0), mask)

    def _one_recording(self, waveforms: Tensor, statistics: tuple[Tensor, Tensor] | None, layer: int) -> Tensor:
        """`(b, t, d)` of recordings of one length, or of a part of one whose norm takes the statistics given."""
        return self._transform(self.hubert.feature_projection(self._convolve(waveforms, statistics)), None, layer)

    def _statistics(self, waveforms: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """Mean and variance `(b, channels)` of the first convolution's output over each recording, without padding.

        `None` where the network has no norm over time. The convolution is linear: its output has the mean W m + b and
        the variances diag(W C W^T) for windows of the waveform with the mean m and the covariance C.
        """
        if self.config.hubert_config.feat_extract_norm != "group":
            return None
        conv = self.hubert.feature_extractor.conv_layers[0].conv
        kernel, step = conv.kernel_size[0], conv.stride[0]
        weight = conv.weight[:, 0].double()
        means, variances = [], []
        for waveform, length in zip(waveforms, lengths, strict=True):
            windows = waveform[: max(length, kernel)].unfold(0, kernel, step)
            total, products = weight.new_zeros(kernel), weight.new_zeros(kernel, kernel)
            for part in windows.split(_STATISTICS_FRAMES):
                part = part.double()
                total, products = total + part.sum(dim=0), products + part.T @ part
            mean = total / len(windows)
            covariance = products / len(windows) - mean[:, None] * mean
            means.append(weight @ mean if conv.bias is None else weight @ mean + conv.bias.double())
            variances.append(((weight @ covariance) * weight).sum(dim=1).clamp_min(0.0))
        return torch.stack(means).float(), torch.stack(variances).float()

    def _convolve(self, waveforms: Tensor, statistics: tuple[Tensor, Tensor] | None) -> Tensor:
        """`(b, t, channels)` of the feature extractor. `statistics` stand in for those that a group norm over time
        would take itself."""
        layers = self.hubert.feature_extractor.conv_layers
        in_tiles = waveforms.device.type == "cpu" and not torch.is_grad_enabled()
        if in_tiles and all(isinstance(layer.conv, WindowConv1d) for layer in layers):  # no adapters around them
            if statistics is None:
                statistics = self._statistics(waveforms, [waveforms.shape[1]] * len(waveforms))
            return self._convolve_in_tiles(waveforms, statistics)
        if statistics is None:
            return self.hubert.feature_extractor(waveforms).transpose(1, 2)
        scale, shift = self._norm(*statistics)
        hidden = layers[0].conv(waveforms[:, None])
        hidden = layers[0].activation(hidden.float() * scale[..., None] + shift[..., None]).to(hidden.dtype)
        for layer in layers[1:]:
            hidden = layer(hidden)
        return hidden.transpose(1, 2)

    def _norm(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """What the group norm multiplies by and adds, `(b, channels)`."""
        norm = self.hubert.feature_extractor.conv_layers[0].layer_norm
        scale = (variance + norm.eps).rsqrt() * norm.weight.float()
        return scale, norm.bias.float() - mean * scale

    def _convolve_in_tiles(self, waveforms: Tensor, statistics: tuple[Tensor, Tensor] | None) -> Tensor:
        """The same on a CPU: a few recordings, or a stretch of one, at a time through all layers."""
        config = self.config
        frames = config.num_frames(waveforms.shape[1])
        output = waveforms.new_empty((len(waveforms), frames, config.hubert_config.conv_dim[-1]))
        tile = _TILE_VALUES * config.hubert_config.conv_stride[0] // config.hubert_config.conv_dim[0]  # samples
        rows, step = max(1, tile // waveforms.shape[1]), max(1, tile // config.hop_length)
        for row in range(0, len(waveforms), rows):
            some = slice(row, row + rows)
            norm = None if statistics is None else self._norm(*(value[some, None] for value in statistics))
            for first in range(0, frames, step):
                last = min(first + step, frames)
                end = (last - 1) * config.hop_length + config.receptive_field
                samples = waveforms[some, first * config.hop_length : end]
                output[some, first:last] = self._convolve_tile(samples, norm)
        return output

    def _convolve_tile(self, samples: Tensor, norm: tuple[Tensor, Tensor] | None) -> Tensor:
        """`(b, t, channels)` of all layers; `norm`: what the group norm multiplies by and adds, `(b, 1, channels)`, or
        `None` where every layer has a norm over channels."""
        first, *others = self.hubert.feature_extractor.conv_layers
        if norm is None:
            hidden = samples[..., None]
            for layer in (first, *others):
                hidden = layer.activation(layer.layer_norm(layer.conv.convolve(hidden).to(samples.dtype)))
            return hidden
        hidden = first.conv.convolve(samples[..., None])
        hidden = first.activation(torch.addcmul(norm[1], hidden.float(), norm[0]).to(samples.dtype))
        for layer in others:
            hidden = layer.conv.convolve(hidden, layer.activation)
        return hidden

    def _transform(self, hidden: Tensor, mask: Tensor | None, layer: int) -> Tensor:
        """Layers 1 to `layer` of the transformer on `(b, t, d)`; `mask` `(b, t)`, bool, True = real frame.

        `HubertModel` itself computes all layers, and applies the final norm of a pre-norm network to the last one.
        """
        encoder = self.hubert.encoder
        if mask is not None:
            hidden = hidden.masked_fill(~mask[..., None], 0.0)
            # A recording without a frame attends to its first padded one; attention over nothing is not a number.
            mask = mask | ((torch.arange(mask.shape[1], device=mask.device) == 0) & ~mask[:, :1])
        attention_mask = create_bidirectional_mask(config=encoder.config, inputs_embeds=hidden, attention_mask=mask)
        hidden = hidden + encoder.pos_conv_embed(hidden)
        if not encoder.config.do_stable_layer_norm:
            hidden = encoder.layer_norm(hidden)
        hidden = encoder.dropout(hidden)
        for block in encoder.layers[:layer]:
            hidden = block(hidden, attention_mask=attention_mask)
        return hidden


SpeechGptUnitsModel.register_for_auto_class("AutoModel")
