"""Supervised semantic speech tokens (S3) of CosyVoice 1, 2 and 3, and the recogniser that trains them.

The tokenizer is the lower half of a speech recogniser with a quantiser behind it: what survives is what recognition
needs. Sources: https://arxiv.org/abs/2407.05407 (vector quantisation), https://arxiv.org/abs/2412.10117 (finite scalar
quantisation); the published graphs are ONNX files, of which S3Tokenizer (`s3tokenizer/model*.py`) is a torch reading.

Shape legend: `b` batch, `t` feature frames of 10 ms, `n` tokens, `c` channels. In every mask 1 (True) = real.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .attention import MultiHeadAttention
from .configuration_s3_tokenizer import S3TokenizerConfig
from .finite_scalar_quantizer import FiniteScalarQuantizer
from .sanm import FsmnMemory


@dataclass
class S3TokenizerOutput(ModelOutput):
    """
    Args:
        token_ids (`(b, n)`, int64): tokens, 0 where padded.
        token_mask (`(b, n)`, bool): True = token.
        last_hidden_state (`(b, n, c)`): what was quantised; `None` where a recording was computed in windows.
    """

    token_ids: Tensor | None = None
    token_mask: Tensor | None = None
    last_hidden_state: Tensor | None = None


@dataclass
class S3TokenizerCtcOutput(ModelOutput):
    """
    Args:
        loss (scalar): CTC, plus the quantiser's own terms for `"vq"`.
        logits (`(b, n, vocab_size)`): of the CTC head; padded positions decode to the blank.
        token_ids (`(b, n)`, int64), token_mask (`(b, n)`, bool): as in [`S3TokenizerOutput`].
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    token_ids: Tensor | None = None
    token_mask: Tensor | None = None


def sinusoidal_positions(length: int, channels: int) -> Tensor:
    """Whisper's table, `(length, channels)` float32: sines, then cosines."""
    steps = torch.exp(torch.arange(channels // 2) * (-math.log(10000.0) / (channels // 2 - 1)))
    phase = torch.arange(length)[:, None] * steps
    return torch.cat([phase.sin(), phase.cos()], dim=1)


def rotary_positions(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines `(length, head_dim)` float32 for rotation by halves."""
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, device=device).float() / head_dim)
    phase = torch.outer(torch.arange(length, device=device).float(), frequencies)
    return torch.cat([phase, phase], dim=-1).cos(), torch.cat([phase, phase], dim=-1).sin()


def rotate_half(heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions on `(b, h, n, d)` heads."""
    cos, sin = (table.to(heads.dtype) for table in rotary)
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


class VectorQuantizer(nn.Module):
    """The nearest of `codebook_size` entries to the direction of a vector (version 1)."""

    def __init__(self, hidden_size: int, codebook_size: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.zeros(codebook_size, hidden_size))

    def distances(self, hidden_states: Tensor) -> Tensor:
        """Squared distances `(…, codebook_size)`, float32, of normalised vectors `(…, hidden_size)` to all entries."""
        unit = nn.functional.normalize(hidden_states.float(), dim=-1)
        entries = self.codebook.float()
        return unit.square().sum(-1, keepdim=True) - 2 * unit @ entries.T + entries.square().sum(-1)

    def encode(self, hidden_states: Tensor) -> Tensor:
        """Tokens `(…)`, int64."""
        return self.distances(hidden_states).argmin(dim=-1)

    def quantize(self, hidden_states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Entries `(b, n, c)` with a straight-through gradient, and the loss that moves codebook and vectors together.

        The paper moves the codebook by averages of the vectors; here a gradient does (https://arxiv.org/abs/1711.00937),
        which needs no state beside the weights.
        """
        unit = nn.functional.normalize(hidden_states.float(), dim=-1)
        entries = self.codebook.float()[self.encode(hidden_states)]
        weight = mask[..., None] / mask.sum().clamp_min(1)
        codebook_loss = ((entries - unit.detach()).square() * weight).sum()
        commitment_loss = ((entries.detach() - unit).square() * weight).sum()
        return unit + (entries - unit).detach(), codebook_loss + 0.25 * commitment_loss


class S3TokenizerLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward network; versions 2 and 3 rotate and add a memory of the values."""

    def __init__(self, config: S3TokenizerConfig) -> None:
        super().__init__()
        size, dropout = config.hidden_size, config.attention_dropout
        self.self_attn_layer_norm = nn.LayerNorm(size, eps=config.attention_norm_eps)
        self.self_attn = MultiHeadAttention(
            config, size, config.num_attention_heads, None, None, dropout, True, False, True
        )
        self.fsmn = FsmnMemory(size, config.fsmn_kernel_size, 0, 0.0) if config.use_fsmn else None
        self.final_layer_norm = nn.LayerNorm(size, eps=config.norm_eps)
        self.fc1 = nn.Linear(size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, hidden_states: Tensor, frame_mask: Tensor | None, rotary: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """`(b, n, c)` → `(b, n, c)`; frame_mask (`(b, n)`, bool, `None` = no padding)."""
        attention = self.self_attn
        normed = self.self_attn_layer_norm(hidden_states)
        query, key = (attention.split_heads(proj(normed)) for proj in (attention.q_proj, attention.k_proj))
        values = attention.v_proj(normed)
        if rotary is not None:
            query, key = rotate_half(query, rotary), rotate_half(key, rotary)
        visible = None if frame_mask is None else frame_mask[:, None, None]
        context, _ = attention.attend(query, key, attention.split_heads(values), visible)
        update = attention.o_proj(context.flatten(2))
        if self.fsmn is not None:
            update = update + self.fsmn(values, frame_mask)[0]
        hidden_states = hidden_states + self.dropout(update)
        update = self.fc2(nn.functional.gelu(self.fc1(self.final_layer_norm(hidden_states))))
        return hidden_states + self.dropout(update)


class S3TokenizerPreTrainedModel(PreTrainedModel):
    config_class = S3TokenizerConfig
    config: S3TokenizerConfig
    base_model_prefix = "tokenizer"
    main_input_name = "input_features"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["S3TokenizerLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, VectorQuantizer):
            init.normal_(module.codebook, std=module.codebook.shape[1] ** -0.5)
        elif isinstance(module, S3TokenizerModel) and module.config.position_embedding == "sinusoidal":
            config = module.config
            init.copy_(module.positions, sinusoidal_positions(config.max_positions, config.hidden_size))


class S3TokenizerModel(S3TokenizerPreTrainedModel):
    """Log-mel spectrogram to tokens."""

    def __init__(self, config: S3TokenizerConfig) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.conv1 = nn.Conv1d(config.num_mel_bins, size, 3, stride=config.conv1_stride, padding=1)
        self.conv2 = nn.Conv1d(size, size, 3, stride=2, padding=1)
        if config.position_embedding == "sinusoidal":
            self.register_buffer("positions", sinusoidal_positions(config.max_positions, size))
        self.layers = nn.ModuleList(S3TokenizerLayer(config) for _ in range(config.num_hidden_layers))
        self.quantizer = (
            FiniteScalarQuantizer(size, config.fsq_levels, config.fsq_size)
            if config.quantizer == "fsq"
            else VectorQuantizer(size, config.codebook_size)
        )
        self.post_init()

    def hidden_states(self, input_features: Tensor, frame_mask: Tensor) -> tuple[Tensor, Tensor]:
        """What is quantised.

        Args:
            input_features (`(b, t, m)`), frame_mask (`(b, t)`, bool).
        Returns:
            `(b, n, c)`, and the mask of its frames `(b, n)`, bool.
        """
        hidden = input_features.to(self.conv1.weight.dtype).transpose(1, 2)
        for convolution in (self.conv1, self.conv2):
            hidden = nn.functional.gelu(convolution(hidden * frame_mask[:, None]))
            # A frame is real if the middle of its window is: ceil(length / stride) of them.
            frame_mask = frame_mask[:, :: convolution.stride[0]]
        hidden = hidden.transpose(1, 2)
        config, rotary = self.config, None
        if config.position_embedding == "sinusoidal":
            hidden = hidden + self.positions[: hidden.shape[1]]
        else:
            rotary = rotary_positions(hidden.shape[1], config.head_dim, config.rope_theta, hidden.device)
        padding = None if bool(frame_mask.all()) else frame_mask
        for layer in self.layers:
            hidden = layer(hidden, padding, rotary)
        return hidden, frame_mask

    def forward(self, input_features: Tensor, attention_mask: Tensor | None = None) -> S3TokenizerOutput:
        """Tokens of recordings of any length; a recording of a batch has the tokens that it has alone.

        A recording of more than `window_frames` is computed in windows, `window_stride` apart; half of what two
        windows share is taken from each.

        Args:
            input_features (`(b, t, m)`): log-mel frames of [`S3FeatureExtractor`].
            attention_mask (`(b, t)`): 1 = real frame, real ones first; `None` = all.
        """
        mask = (
            torch.ones(input_features.shape[:2], dtype=torch.bool, device=input_features.device)
            if attention_mask is None
            else attention_mask.bool()
        )
        lengths = mask.sum(dim=1)
        if input_features.shape[1] and int(lengths.max()) <= self.config.window_frames:
            longest = int(lengths.max())
            hidden, token_mask = self.hidden_states(input_features[:, :longest], mask[:, :longest])
            tokens = self.quantizer.encode(hidden).masked_fill(~token_mask, 0)
            return S3TokenizerOutput(tokens, token_mask, hidden)
        rows = [
            self._windowed(features[:length])
            for features, length in zip(input_features, lengths.tolist(), strict=True)
        ]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        counts = torch.tensor([len(row) for row in rows], device=tokens.device)
        return S3TokenizerOutput(tokens, torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None])

    def _windowed(self, features: Tensor) -> Tensor:
        """Tokens `(n,)` of one recording `(t, m)`."""
        config = self.config
        pieces = []
        overlap = config.window_frames - config.window_stride
        # No window begins where the one before it already reached the end: S3Tokenizer computes that window too, and
        # loses up to `inner` tokens, because what it has to give is shorter than what it takes from its neighbour.
        starts = range(0, max(1, len(features) - overlap), config.window_stride)
        inner = overlap // 2 // config.frames_per_token
        for start in starts:
            window = features[start : start + config.window_frames][None]
            if window.shape[1] == 0:
                return torch.zeros(0, dtype=torch.long, device=features.device)
            hidden, _ = self.hidden_states(window, torch.ones_like(window[..., 0], dtype=torch.bool))
            tokens = self.quantizer.encode(hidden)[0]
            first = inner if start else 0
            last = len(tokens) - (inner if start != starts[-1] else 0)
            pieces.append(tokens[first:last])
        return torch.cat(pieces)

    @torch.no_grad()
    def encode(self, input_features: Tensor, attention_mask: Tensor | None = None) -> S3TokenizerOutput:
        """[`forward`] without a graph."""
        return self(input_features, attention_mask)


class S3TokenizerForCTC(S3TokenizerPreTrainedModel):
    """The recogniser that trains a tokenizer: its quantised vectors, more layers, a CTC head.

    All that reaches the text passes the quantiser, so the tokens learn to carry it. Upstream has never published this
    training; the papers put the quantiser into SenseVoice's encoder and train on its recognition loss.
    """

    def __init__(self, config: S3TokenizerConfig) -> None:
        super().__init__(config)
        self.tokenizer = S3TokenizerModel(config)
        width = config.fsq_size if config.quantizer == "fsq" else config.hidden_size
        self.project_up = nn.Linear(width, config.hidden_size)
        self.recognition_layers = nn.ModuleList(S3TokenizerLayer(config) for _ in range(config.num_recognition_layers))
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.ctc_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        quantize: bool = True,
    ) -> S3TokenizerCtcOutput:
        """
        Args:
            input_features (`(b, t, m)`), attention_mask (`(b, t)`): 1 = real frame; at most `window_frames`.
            labels (`(b, l)`): ids of the text, -100 = padding.
            quantize: `False` lets the coordinates of a scalar quantiser through as they are, neither bounded nor
                rounded: a recogniser that starts from nothing learns several times faster so.

        Raises:
            ValueError: more frames than a window has.
        """
        config = self.config
        if input_features.shape[1] > config.window_frames:
            raise ValueError(
                f"input_features: expected at most {config.window_frames} frames, got {input_features.shape[1]}"
            )
        mask = (
            torch.ones(input_features.shape[:2], dtype=torch.bool, device=input_features.device)
            if attention_mask is None
            else attention_mask.bool()
        )
        hidden, token_mask = self.tokenizer.hidden_states(input_features, mask)
        quantizer = self.tokenizer.quantizer
        tokens = quantizer.encode(hidden).masked_fill(~token_mask, 0)
        quantizer_loss = None
        if config.quantizer == "fsq":
            quantized = quantizer.quantize(hidden) if quantize else quantizer.project_down(hidden)
        else:
            quantized, quantizer_loss = quantizer.quantize(hidden, token_mask)
        hidden = self.project_up(quantized.to(self.project_up.weight.dtype))
        rotary = None
        if config.position_embedding == "sinusoidal":
            hidden = hidden + self.tokenizer.positions[: hidden.shape[1]]
        else:
            rotary = rotary_positions(hidden.shape[1], config.head_dim, config.rope_theta, hidden.device)
        for layer in self.recognition_layers:
            hidden = layer(hidden, token_mask, rotary)
        logits = self.ctc_head(self.layer_norm(hidden))
        blank = torch.full_like(logits, torch.finfo(logits.dtype).min)
        blank[..., config.pad_token_id] = 0.0
        logits = torch.where(token_mask[..., None], logits, blank)
        loss = None
        if labels is not None:
            loss = self._ctc_loss(logits, token_mask, labels)
            loss = loss if quantizer_loss is None else loss + quantizer_loss
        return S3TokenizerCtcOutput(loss, logits, tokens, token_mask)

    @torch.no_grad()
    def standardize_quantizer(self, input_features: Tensor, attention_mask: Tensor) -> None:
        """Brings the coordinates of a scalar quantiser to mean 0 and variance 1 on these recordings, and changes what
        reads them so that without quantisation nothing else changes. To be called when quantisation begins."""
        hidden, mask = self.tokenizer.hidden_states(input_features, attention_mask.bool())
        mean, deviation = self.tokenizer.quantizer.standardize(hidden[mask])
        self.project_up.bias.add_((self.project_up.weight.float() @ mean).to(self.project_up.bias.dtype))
        self.project_up.weight.mul_(deviation.to(self.project_up.weight.dtype))

    def _ctc_loss(self, logits: Tensor, token_mask: Tensor, labels: Tensor) -> Tensor:
        real = labels >= 0
        return nn.functional.ctc_loss(
            logits.float().log_softmax(-1).transpose(0, 1),
            labels.masked_fill(~real, 0),
            token_mask.sum(dim=1),
            real.sum(dim=1),
            blank=self.config.pad_token_id,
            # A text that is too long for its tokens has no path; it shall not turn the batch into infinity.
            zero_infinity=True,
        )


__all__ = ["S3TokenizerForCTC", "S3TokenizerModel", "S3TokenizerOutput"]
