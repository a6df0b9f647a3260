"""U2, U2++ and U2++ MoE: one network for streaming and whole-utterance recognition, CTC and attention.

Papers: U2 (https://arxiv.org/abs/2012.05481), U2++ (https://arxiv.org/abs/2106.05642), U2++ MoE
(https://arxiv.org/abs/2404.16407). Upstream: wenet-e2e/wenet, `wenet/models/transformer`.

Shape legend: `b` batch, `f` feature frames, `t` encoder frames, `n` tokens, `v` vocabulary.

What differs from upstream: padded frames never influence real ones (`config.padding="upstream"` brings that back),
padded encoder frames are zero, the positional table has no end, evaluation uses full context instead of a random
chunk, and audio shorter than one encoder window gives an empty text instead of an error.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput, logging
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import MultiHeadAttention
from .configuration_wenet_u2pp import WenetU2ppConfig
from .conformer import (
    ConvolutionModule,
    EncoderSelfAttention,
    Subsampling,
    UnitOffsetRmsNorm,
    chunk_attention_mask,
    make_feed_forward,
    make_norm,
    sinusoidal_positions,
)
from .generation_wenet_u2pp import WenetU2ppGenerationMixin
from .mixture_of_experts import ExpertRouter, StackedExperts
from .streaming import EncoderStreamingState, right_align


logger = logging.get_logger(__name__)

# Logit of blank on padded frames (all others stay below it), so that a greedy decoder reads nothing there.
_PADDED_BLANK_LOGIT = 0.0
_PADDED_OTHER_LOGIT = -1.0e4


@dataclass
class WenetU2ppEncoderOutput(BaseModelOutput):
    """
    Args:
        last_hidden_state (`(b, t, hidden_size)`): zero on padded frames (unless `config.padding="upstream"`).
        attention_mask (`(b, t)`, bool): True = real encoder frame.
        router_logits (`tuple` of `(frames, experts)`): one per routed layer, with `output_router_logits=True`.
    """

    attention_mask: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class WenetU2ppDecoderOutput(ModelOutput):
    """
    Args:
        last_hidden_state (`(b * k, n, hidden_size)`).
        past: per layer the self-attention keys and values `(b * k, kv, s, d)`.
        router_logits: with `output_router_logits=True`.
    """

    last_hidden_state: Tensor | None = None
    past: list[tuple[Tensor, Tensor]] | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class WenetU2ppOutput(ModelOutput):
    """
    Args:
        loss (scalar): joint loss, with `labels`.
        logits (`(b, t, v)`): CTC logits; padded frames read blank.
        loss_ctc, loss_att, accuracy (scalars): parts of the loss, and the left decoder's teacher-forced accuracy.
        decoder_logits, right_decoder_logits (`(b, n + 1, v)`): with `labels`.
        encoder_last_hidden_state (`(b, t, hidden_size)`), encoder_attention_mask (`(b, t)`, bool, True = real).
        hidden_states, attentions, router_logits: of the encoder, when asked for.
        decoder_router_logits: of the left and the right decoder, when asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    loss_ctc: Tensor | None = None
    loss_att: Tensor | None = None
    accuracy: Tensor | None = None
    decoder_logits: Tensor | None = None
    right_decoder_logits: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_attention_mask: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None
    decoder_router_logits: tuple[Tensor, ...] | None = None


class GlobalCmvn(nn.Module):
    """`(x - mean) * inverse_std` with stored statistics of the training set."""

    def __init__(self, input_size: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(input_size))
        self.register_buffer("inverse_std", torch.ones(input_size))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) * self.inverse_std


class WenetU2ppConformerLayer(GradientCheckpointingLayer):
    """Conformer block: half feed-forward, attention, convolution, half feed-forward."""

    def __init__(self, config: WenetU2ppConfig) -> None:
        super().__init__()
        self.normalize_before = config.normalize_before
        self.half = 0.5 if config.macaron_style else 1.0
        self.self_attn = EncoderSelfAttention(config)
        self.feed_forward = make_feed_forward(config)
        self.norm_self_attn = make_norm(config.norm_type, config.hidden_size, config.norm_eps)
        self.norm_feed_forward = make_norm(config.norm_type, config.hidden_size, config.norm_eps)
        self.feed_forward_macaron = None
        if config.macaron_style:
            self.feed_forward_macaron = make_feed_forward(config)
            self.norm_feed_forward_macaron = make_norm(config.norm_type, config.hidden_size, config.norm_eps)
        self.conv = None
        if config.use_conv_module:
            self.conv = ConvolutionModule(config)
            self.norm_conv = make_norm(config.norm_type, config.hidden_size, config.norm_eps)
            self.norm_out = make_norm(config.norm_type, config.hidden_size, config.norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: Tensor | None,
        frame_mask: Tensor | None,
        past: tuple | None = None,
        past_convolution: Tensor | None = None,
    ) -> tuple[Tensor, tuple, Tensor | None]:
        """Shapes as in [`EncoderSelfAttention`] and [`ConvolutionModule`]; returns the output and both extended
        pasts."""
        if self.feed_forward_macaron is not None:
            residual = hidden_states
            hidden = self._before(self.norm_feed_forward_macaron, hidden_states)
            hidden = residual + self.half * self.dropout(self.feed_forward_macaron(hidden))
            hidden_states = self._after(self.norm_feed_forward_macaron, hidden)

        residual = hidden_states
        hidden = self._before(self.norm_self_attn, hidden_states)
        hidden, _, extended = self.self_attn(hidden, attention_mask, position_embeddings, past)
        hidden_states = self._after(self.norm_self_attn, residual + self.dropout(hidden))

        convolution = None
        if self.conv is not None:
            residual = hidden_states
            hidden, convolution = self.conv(self._before(self.norm_conv, hidden_states), frame_mask, past_convolution)
            hidden_states = self._after(self.norm_conv, residual + self.dropout(hidden))

        residual = hidden_states
        hidden = self.feed_forward(self._before(self.norm_feed_forward, hidden_states))
        hidden_states = self._after(self.norm_feed_forward, residual + self.half * self.dropout(hidden))
        if self.conv is not None:
            hidden_states = self.norm_out(hidden_states)
        return hidden_states, extended, convolution

    def _before(self, norm: nn.Module, hidden_states: Tensor) -> Tensor:
        return norm(hidden_states) if self.normalize_before else hidden_states

    def _after(self, norm: nn.Module, hidden_states: Tensor) -> Tensor:
        return hidden_states if self.normalize_before else norm(hidden_states)


class WenetU2ppTransformerLayer(GradientCheckpointingLayer):
    """Transformer encoder block: attention, feed-forward. Called like the conformer block."""

    def __init__(self, config: WenetU2ppConfig) -> None:
        super().__init__()
        self.normalize_before = config.normalize_before
        self.self_attn = EncoderSelfAttention(config)
        self.feed_forward = make_feed_forward(config)
        self.norm_self_attn = make_norm(config.norm_type, config.hidden_size, config.norm_eps)
        self.norm_feed_forward = make_norm(config.norm_type, config.hidden_size, config.norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: Tensor | None,
        frame_mask: Tensor | None,
        past: tuple | None = None,
        past_convolution: None = None,
    ) -> tuple[Tensor, tuple, None]:
        residual = hidden_states
        hidden = self.norm_self_attn(hidden_states) if self.normalize_before else hidden_states
        hidden, _, extended = self.self_attn(hidden, attention_mask, position_embeddings, past)
        hidden_states = residual + self.dropout(hidden)
        if not self.normalize_before:
            hidden_states = self.norm_self_attn(hidden_states)
        residual = hidden_states
        hidden = self.norm_feed_forward(hidden_states) if self.normalize_before else hidden_states
        hidden_states = residual + self.dropout(self.feed_forward(hidden))
        if not self.normalize_before:
            hidden_states = self.norm_feed_forward(hidden_states)
        return hidden_states, extended, None


class WenetU2ppPreTrainedModel(PreTrainedModel):
    """What all networks of the family share: loading, initialisation, length arithmetic."""

    config_class = WenetU2ppConfig
    config: WenetU2ppConfig
    base_model_prefix = "model"
    main_input_name = "input_features"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["WenetU2ppConformerLayer", "WenetU2ppTransformerLayer", "WenetU2ppDecoderLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _supports_flash_attn = False

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """Ours unless asked otherwise: on CPUs the sorted loop is never slower than `grouped_mm` on long audio.

        `set_experts_implementation` only works on classes whose modeling file contains the text
        `@use_experts_implementation`; the decorated class is in `mixture_of_experts.py`.
        """
        return super().get_correct_experts_implementation("eager" if requested_experts is None else requested_experts)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, EncoderSelfAttention) and module.relative:
            init.xavier_uniform_(module.pos_bias_u)
            init.xavier_uniform_(module.pos_bias_v)
        elif isinstance(module, StackedExperts):
            # Each expert starts as the dense layer would.
            for name, parameter in module.named_parameters(recurse=False):
                fan_in = getattr(module, name.removesuffix("_bias")).shape[-1]
                init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5)
        elif isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            # torch's own defaults, as upstream trains from; transformers' normal of 0.02 starves the front end.
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=1.0)
        elif isinstance(module, UnitOffsetRmsNorm):
            init.ones_(module.weight)
        elif isinstance(module, GlobalCmvn):
            init.zeros_(module.mean)
            init.ones_(module.inverse_std)


class WenetU2ppEncoder(WenetU2ppPreTrainedModel):
    """CMVN, subsampling and conformer or transformer blocks under a full, static or dynamic chunk mask."""

    _can_record_outputs = {
        "hidden_states": [
            OutputRecorder(WenetU2ppConformerLayer, index=0),
            OutputRecorder(WenetU2ppTransformerLayer, index=0),
        ],
        "attentions": OutputRecorder(EncoderSelfAttention, index=1),
        "router_logits": OutputRecorder(ExpertRouter, index=0),
    }

    def __init__(self, config: WenetU2ppConfig) -> None:
        super().__init__(config)
        layer = WenetU2ppConformerLayer if config.encoder_type == "conformer" else WenetU2ppTransformerLayer
        self.cmvn = GlobalCmvn(config.input_size) if config.has_cmvn else None
        self.subsampling = Subsampling(config)
        self.embed_dropout = nn.Dropout(config.positional_dropout)
        self.layers = nn.ModuleList(layer(config) for _ in range(config.num_hidden_layers))
        self.norm = make_norm(config.norm_type, config.hidden_size, config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def output_lengths(self, lengths: Tensor) -> Tensor:
        """Encoder frames of `lengths` feature frames."""
        return self.subsampling.output_lengths(lengths)

    def draw_dynamic_chunk(self, num_frames: int, generator: torch.Generator | None = None) -> tuple[int, int]:
        """A training chunk for a batch of `num_frames` encoder frames, as upstream draws it.

        Returns:
            chunk size in encoder frames (the whole batch in about half of all draws) and left chunks (-1 = all).
        """
        if num_frames < 2:
            return max(num_frames, 1), -1
        drawn = int(torch.randint(1, num_frames, (1,), generator=generator))
        if drawn > num_frames // 2:
            return num_frames, -1
        # Upstream allows one second of delay: 25 encoder frames at 4x subsampling.
        chunk_size = drawn % int(100.0 / self.config.subsampling_rate) + 1
        if not self.config.use_dynamic_left_chunk:
            return chunk_size, -1
        most = (num_frames - 1) // chunk_size
        return chunk_size, int(torch.randint(0, most, (1,), generator=generator)) if most > 0 else 0

    def embed(self, input_features: Tensor, offsets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """CMVN, subsampling and positions.

        Args:
            input_features (`(b, f, bins)`), offsets (`(b,)`, int64): encoder frames that came before; `None` = 0.

        Returns:
            `(b, t, hidden_size)` and the positional embeddings `(1 or b, t, hidden_size)` for the attention.
        """
        features = input_features.to(self.subsampling.out_proj.weight.dtype)
        if self.cmvn is not None:
            features = self.cmvn(features)
        hidden_states = self.subsampling(features)
        kind = self.config.position_embedding_type
        if kind == "no_pos":
            # Upstream neither scales nor adds; the relative attention then sees a table of zeros.
            zeros = hidden_states.new_zeros(1, hidden_states.shape[1], hidden_states.shape[2])
            return self.embed_dropout(hidden_states), zeros
        steps = torch.arange(hidden_states.shape[1], device=hidden_states.device)
        positions = steps[None] if offsets is None else offsets[:, None] + steps[None]
        table = sinusoidal_positions(positions, self.config.hidden_size).to(hidden_states.dtype)
        hidden_states = hidden_states * self.config.hidden_size**0.5
        if kind == "abs_pos":
            hidden_states = hidden_states + table
        return self.embed_dropout(hidden_states), self.embed_dropout(table)

    @capture_outputs
    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        decoding_chunk_size: int | None = None,
        num_left_chunks: int = -1,
        generator: torch.Generator | None = None,
        **kwargs,
    ) -> WenetU2ppEncoderOutput:
        """
        Args:
            input_features (`(b, f, bins)`), attention_mask (`(b, f)`): 1 = real frame.
            decoding_chunk_size: encoder frames per chunk; negative = full context; 0 = draw one as in training; `None`
                = draw while training and full context otherwise. Only dynamic-chunk models listen to it; a model with
                `static_chunk_size` always uses that, all others see everything.
            num_left_chunks: chunks visible before the own one; negative = all.
            generator: source of the draw (CPU); `None` uses torch's global one.
        """
        config = self.config
        batch, num_features, _ = input_features.shape
        shortest = config.right_context + 1
        if num_features < shortest:
            if attention_mask is None:
                attention_mask = input_features.new_ones(batch, num_features, dtype=torch.long)
            input_features = nn.functional.pad(input_features, (0, 0, 0, shortest - num_features))
            attention_mask = nn.functional.pad(attention_mask, (0, shortest - num_features))
        hidden_states, position_embeddings = self.embed(input_features)
        num_frames = hidden_states.shape[1]
        frame_mask = None
        if attention_mask is not None and not bool(attention_mask.all()):
            lengths = self.output_lengths(attention_mask.sum(dim=-1))
            frame_mask = torch.arange(num_frames, device=hidden_states.device) < lengths[:, None]

        visible = None if frame_mask is None else frame_mask[:, None, None, :]
        chunk_size, left = self._chunk(num_frames, decoding_chunk_size, num_left_chunks, generator)
        if chunk_size < num_frames:
            chunks = chunk_attention_mask(num_frames, chunk_size, left, hidden_states.device)[None, None]
            visible = chunks if visible is None else chunks & visible

        for layer in self.layers:
            hidden_states, _, _ = layer(hidden_states, visible, position_embeddings, frame_mask)
        if config.normalize_before and config.final_norm:
            hidden_states = self.norm(hidden_states)
        if frame_mask is None:
            frame_mask = hidden_states.new_ones(batch, num_frames, dtype=torch.bool)
        elif config.padding == "invariant":
            hidden_states = hidden_states.masked_fill(~frame_mask[..., None], 0.0)
        return WenetU2ppEncoderOutput(last_hidden_state=hidden_states, attention_mask=frame_mask)

    def _chunk(
        self, num_frames: int, decoding_chunk_size: int | None, num_left_chunks: int, generator: torch.Generator | None
    ) -> tuple[int, int]:
        if not self.config.use_dynamic_chunk:
            if self.config.static_chunk_size > 0:
                return self.config.static_chunk_size, num_left_chunks
            if decoding_chunk_size is not None and decoding_chunk_size > 0:
                logger.warning_once("decoding_chunk_size has no effect: the model was trained with full context only")
            return num_frames, -1
        if decoding_chunk_size is None:
            decoding_chunk_size = 0 if self.training else -1
        if decoding_chunk_size == 0:
            return self.draw_dynamic_chunk(num_frames, generator)
        return (num_frames, -1) if decoding_chunk_size < 0 else (decoding_chunk_size, num_left_chunks)

    def initial_state(self, batch_size: int = 1) -> EncoderStreamingState:
        """State of `batch_size` streams before their first frame."""
        weight = self.subsampling.out_proj.weight
        layers, attention = self.config.num_hidden_layers, self.layers[0].self_attn
        heads = attention.num_heads if attention.relative else attention.num_key_value_heads
        empty = weight.new_zeros(batch_size, heads, 0, attention.head_dim)
        convolution = None
        if self.config.encoder_type == "conformer" and self.config.use_conv_module and self.config.conv_causal:
            convolution = weight.new_zeros(batch_size, self.config.conv_kernel_size - 1, self.config.hidden_size)
        return EncoderStreamingState(
            keys=[empty] * layers,
            key_biases=[empty[..., 0] if attention.relative else None] * layers,
            values=[empty] * layers,
            # One tensor each: safetensors saves no shared memory.
            convolutions=[None if convolution is None else convolution.clone() for _ in range(layers)],
            key_mask=torch.zeros(batch_size, 0, dtype=torch.bool, device=weight.device),
            offsets=torch.zeros(batch_size, dtype=torch.int64, device=weight.device),
        )

    def forward_chunk(
        self,
        input_features: Tensor,
        state: EncoderStreamingState,
        attention_mask: Tensor | None = None,
        max_past_frames: int = -1,
    ) -> tuple[Tensor, Tensor, EncoderStreamingState]:
        """One chunk of every stream of a batch; equals the rows of a full pass under the same chunk mask.

        Args:
            input_features (`(b, f, bins)`): a window of `(c - 1) * rate + right_context + 1` frames for `c` encoder
                frames, the windows of a stream advancing by `c * rate`. The last one may be shorter.
            attention_mask (`(b, f)`): 1 = real; a stream whose window is all padding stands still.
            max_past_frames: encoder frames to remember for the next chunk; negative = all.

        Returns:
            `(b, c, hidden_size)`, its mask `(b, c)` (True = real), and the state for the next chunk.
        """
        batch, num_features, _ = input_features.shape
        if attention_mask is None:
            attention_mask = torch.ones(batch, num_features, dtype=torch.long, device=input_features.device)
        shortest = self.config.right_context + 1
        if num_features < shortest:
            input_features = nn.functional.pad(input_features, (0, 0, 0, shortest - num_features))
        lengths = self.output_lengths(attention_mask.sum(dim=-1))
        hidden_states, position_embeddings = self.embed(input_features, state.offsets)
        num_frames = hidden_states.shape[1]
        frame_mask = torch.arange(num_frames, device=hidden_states.device) < lengths[:, None]
        key_mask = torch.cat([state.key_mask, frame_mask], dim=1)
        everything = bool(key_mask.all())
        visible = None if everything else key_mask[:, None, None, :]

        keys, key_biases, values, convolutions = [], [], [], []
        for index, layer in enumerate(self.layers):
            hidden_states, extended, convolution = layer(
                hidden_states,
                visible,
                position_embeddings,
                None if everything else frame_mask,
                past=(state.keys[index], state.key_biases[index], state.values[index]),
                past_convolution=state.convolutions[index],
            )
            keys.append(extended[0])
            key_biases.append(extended[1])
            values.append(extended[2])
            convolutions.append(convolution)
        if self.config.normalize_before and self.config.final_norm:
            hidden_states = self.norm(hidden_states)
        hidden_states = hidden_states.masked_fill(~frame_mask[..., None], 0.0)

        # Rows that ended early within the window are moved to the right end before the caches are cut.
        shift = num_frames - lengths
        if bool(shift.any()):
            keys = [right_align(tensor, shift, 2) for tensor in keys]
            key_biases = [None if tensor is None else right_align(tensor, shift, 2) for tensor in key_biases]
            values = [right_align(tensor, shift, 2) for tensor in values]
            convolutions = [None if tensor is None else right_align(tensor, shift, 1) for tensor in convolutions]
            key_mask = right_align(key_mask, shift, 1)
        kept = key_mask.shape[1] if max_past_frames < 0 else min(key_mask.shape[1], max_past_frames)
        first = key_mask.shape[1] - kept
        left = self.config.conv_kernel_size - 1
        new_state = EncoderStreamingState(
            keys=[tensor[:, :, first:] for tensor in keys],
            key_biases=[None if tensor is None else tensor[:, :, first:] for tensor in key_biases],
            values=[tensor[:, :, first:] for tensor in values],
            convolutions=[None if t is None else t[:, t.shape[1] - left :] for t in convolutions],
            key_mask=key_mask[:, first:],
            offsets=state.offsets + lengths,
        )
        return hidden_states, frame_mask, new_state


class WenetU2ppDecoderLayer(GradientCheckpointingLayer):
    """Decoder block: causal self-attention, cross-attention, feed-forward."""

    def __init__(self, config: WenetU2ppConfig) -> None:
        super().__init__()
        self.normalize_before = config.decoder_normalize_before
        attention = (
            config,
            config.hidden_size,
            config.decoder_attention_heads,
            config.decoder_num_key_value_heads,
            config.decoder_head_dim,
        )
        self.self_attn = MultiHeadAttention(
            *attention,
            config.decoder_self_attention_dropout,
            config.decoder_query_bias,
            config.decoder_key_bias,
            config.decoder_value_bias,
        )
        self.cross_attn = MultiHeadAttention(
            *attention,
            config.decoder_cross_attention_dropout,
            config.decoder_cross_query_bias,
            config.decoder_cross_key_bias,
            config.decoder_cross_value_bias,
        )
        self.feed_forward = make_feed_forward(config, decoder=True)
        self.norm_self_attn = make_norm(config.decoder_norm_type, config.hidden_size, config.decoder_norm_eps)
        self.norm_cross_attn = make_norm(config.decoder_norm_type, config.hidden_size, config.decoder_norm_eps)
        self.norm_feed_forward = make_norm(config.decoder_norm_type, config.hidden_size, config.decoder_norm_eps)
        self.dropout = nn.Dropout(config.decoder_dropout)

    def project_memory(self, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the cross-attention, `(b, kv, t, d)` each: once per utterance, for every hypothesis and
        step."""
        cross = self.cross_attn
        key = cross.split_heads(cross.k_proj(encoder_hidden_states))
        return key, cross.split_heads(cross.v_proj(encoder_hidden_states))

    def forward(
        self,
        hidden_states: Tensor,
        memory_key: Tensor,
        memory_value: Tensor,
        memory_mask: Tensor | None,
        past: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """
        Args:
            hidden_states (`(b * k, n, hidden_size)`): `k` hypotheses of each utterance, in order.
            memory_key, memory_value: the result of [`project_memory`] of the `b` utterances, two arguments because
                reentrant checkpointing sees no tensors inside tuples. memory_mask (`(b, 1, 1, t)`, bool).
            past: self-attention keys and values `(b * k, kv, s, d)` of earlier steps; then `n` is 1.
            attention_mask (`(b * k, 1, n, n)`, bool): which tokens each one sees, instead of all before it.
        """
        residual = hidden_states
        hidden = self.norm_self_attn(hidden_states) if self.normalize_before else hidden_states
        attn = self.self_attn
        key, value = attn.split_heads(attn.k_proj(hidden)), attn.split_heads(attn.v_proj(hidden))
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        # Labels are padded on the right, so causality alone keeps padding away from real positions.
        is_causal = past is None and attention_mask is None
        hidden, _ = attn.attend(attn.split_heads(attn.q_proj(hidden)), key, value, attention_mask, is_causal)
        hidden_states = residual + self.dropout(attn.o_proj(hidden.flatten(2)))
        if not self.normalize_before:
            hidden_states = self.norm_self_attn(hidden_states)

        residual = hidden_states
        hidden = self.norm_cross_attn(hidden_states) if self.normalize_before else hidden_states
        cross = self.cross_attn
        # Hypotheses of one utterance attend to the same memory: they become queries of one row instead of copies of
        # it.
        query = cross.q_proj(hidden)
        utterances = memory_key.shape[0]
        query = query.reshape(utterances, -1, query.shape[-1])
        hidden, _ = cross.attend(cross.split_heads(query), memory_key, memory_value, memory_mask)
        hidden = cross.o_proj(hidden.flatten(2)).reshape(residual.shape)
        hidden_states = residual + self.dropout(hidden)
        if not self.normalize_before:
            hidden_states = self.norm_cross_attn(hidden_states)

        residual = hidden_states
        hidden = self.norm_feed_forward(hidden_states) if self.normalize_before else hidden_states
        hidden_states = residual + self.dropout(self.feed_forward(hidden))
        if not self.normalize_before:
            hidden_states = self.norm_feed_forward(hidden_states)
        return hidden_states, (key, value)


class WenetU2ppDecoder(WenetU2ppPreTrainedModel):
    """Transformer decoder over one direction of the text."""

    _can_record_outputs = {"router_logits": OutputRecorder(ExpertRouter, index=0)}

    def __init__(self, config: WenetU2ppConfig, num_layers: int) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_dropout = nn.Dropout(config.decoder_positional_dropout)
        self.layers = nn.ModuleList(WenetU2ppDecoderLayer(config) for _ in range(num_layers))
        self.norm = make_norm(config.decoder_norm_type, config.hidden_size, config.decoder_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def project_memory(self, encoder_hidden_states: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Cross-attention keys and values of every layer."""
        return [layer.project_memory(encoder_hidden_states) for layer in self.layers]

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor,
        memory: list[tuple[Tensor, Tensor]],
        memory_mask: Tensor | None = None,
        past: list[tuple[Tensor, Tensor]] | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs,
    ) -> WenetU2ppDecoderOutput:
        """
        Args:
            input_ids (`(b * k, n)`): framed tokens of `k` hypotheses per utterance; with `past` only the newest.
            memory: from [`project_memory`], for `b` utterances. memory_mask (`(b, t)`, bool, True = real).
            position_ids (`(b * k, n)`), attention_mask (`(b * k, n, n)`, bool): place of each token in its text and
                the tokens that it sees, where these do not simply stand in a row (a prefix tree).

        Returns:
            `last_hidden_state` `(b * k, n, hidden_size)` and, as `past`, the self-attention keys and values.
        """
        seen = 0 if past is None else past[0][0].shape[2]
        if position_ids is None:
            position_ids = torch.arange(seen, seen + input_ids.shape[1], device=input_ids.device)
        embedded = self.embed_tokens(input_ids) * self.config.hidden_size**0.5
        table = sinusoidal_positions(position_ids, self.config.hidden_size).to(embedded.dtype)
        hidden_states = self.embed_dropout(embedded + table)
        visible = None if memory_mask is None else memory_mask[:, None, None, :]
        seen_tokens = None if attention_mask is None else attention_mask[:, None]
        extended = []
        for index, layer in enumerate(self.layers):
            layer_past = None if past is None else past[index]
            hidden_states, layer_extended = layer(hidden_states, *memory[index], visible, layer_past, seen_tokens)
            extended.append(layer_extended)
        if self.config.decoder_normalize_before:
            hidden_states = self.norm(hidden_states)
        return WenetU2ppDecoderOutput(last_hidden_state=hidden_states, past=extended)


class WenetU2ppModel(WenetU2ppPreTrainedModel):
    """The network without heads: encoder and, as configured, the left-to-right and right-to-left decoders."""

    def __init__(self, config: WenetU2ppConfig) -> None:
        super().__init__(config)
        self.encoder = WenetU2ppEncoder(config)
        self.decoder = WenetU2ppDecoder(config, config.decoder_layers) if config.decoder_layers else None
        self.right_decoder = (
            WenetU2ppDecoder(config, config.right_decoder_layers) if config.right_decoder_layers else None
        )
        self.post_init()

    def forward(
        self, input_features: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> WenetU2ppEncoderOutput:
        """The encoder's output; see [`WenetU2ppEncoder.forward`]."""
        return self.encoder(input_features, attention_mask, **kwargs)


class WenetU2ppForSpeechRecognition(WenetU2ppGenerationMixin, WenetU2ppPreTrainedModel):
    """The complete recogniser: encoder, CTC head, decoders, joint loss, `generate` and `stream_step`."""

    output_modalities = ("text",)

    def __init__(self, config: WenetU2ppConfig) -> None:
        super().__init__(config)
        self.model = WenetU2ppModel(config)
        # Which heads exist depends on the configuration, so the table is the instance's, not the class's.
        self._tied_weights_keys = {
            f"{name}_head.weight": f"model.{name}.embed_tokens.weight"
            for name, layers in (("decoder", config.decoder_layers), ("right_decoder", config.right_decoder_layers))
            if layers
        }
        self.ctc_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.decoder_head = nn.Linear(config.hidden_size, config.vocab_size) if config.decoder_layers else None
        self.right_decoder_head = (
            nn.Linear(config.hidden_size, config.vocab_size) if config.right_decoder_layers else None
        )
        self.post_init()

    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        decoding_chunk_size: int | None = None,
        num_left_chunks: int = -1,
        generator: torch.Generator | None = None,
        output_router_logits: bool = False,
        return_dict: bool | None = None,
        **kwargs,
    ) -> WenetU2ppOutput | tuple:
        """
        Args:
            input_features (`(b, f, bins)`): filter banks before CMVN. attention_mask (`(b, f)`): 1 = real frame.
            labels (`(b, n)`): token ids without sentence marks, -100 = ignored, real ones first.
            decoding_chunk_size, num_left_chunks, generator: see [`WenetU2ppEncoder.forward`].

        Example:

        ```python
        >>> inputs = processor(audio=waveform, sampling_rate=16000, text="three one")
        >>> model(**inputs).loss.backward()
        ```
        """
        encoded = self.model(
            input_features,
            attention_mask,
            decoding_chunk_size=decoding_chunk_size,
            num_left_chunks=num_left_chunks,
            generator=generator,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        hidden, mask = encoded.last_hidden_state, encoded.attention_mask
        logits = self.ctc_head(hidden)
        output = WenetU2ppOutput(
            logits=self._blank_padded_frames(logits, mask),
            encoder_last_hidden_state=hidden,
            encoder_attention_mask=mask,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
            router_logits=encoded.router_logits,
        )
        if labels is not None:
            self._add_losses(output, logits, labels, output_router_logits)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _blank_padded_frames(self, logits: Tensor, frame_mask: Tensor) -> Tensor:
        padded = logits.new_full((logits.shape[-1],), _PADDED_OTHER_LOGIT)
        padded[self.config.pad_token_id] = _PADDED_BLANK_LOGIT
        return torch.where(frame_mask[..., None], logits, padded)

    def ctc_log_probs(self, encoder_hidden_states: Tensor, blank_penalty: float = 0.0) -> Tensor:
        """CTC log-probabilities `(b, t, v)`, float32. `blank_penalty` is taken from the blank's logit beforehand."""
        logits = self.ctc_head(encoder_hidden_states).float()
        if blank_penalty:
            logits[..., self.config.pad_token_id] -= blank_penalty
        return logits.log_softmax(dim=-1)

    def decoder_memory(
        self, encoder_hidden_states: Tensor, frame_mask: Tensor, logits: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the decoders attend to: the encoder's frames or, with `apply_non_blank_embedding` ("U2++ lite"), only
        those that CTC does not call blank, moved to the front; `(b, t', hidden_size)` and its mask `(b, t')`."""
        if not self.config.apply_non_blank_embedding:
            return encoder_hidden_states, frame_mask
        chosen = logits.argmax(dim=-1) != self.config.pad_token_id
        if self.config.padding == "invariant":
            chosen = chosen & frame_mask
        counts = chosen.sum(dim=1)
        width = max(int(counts.max()), 1)
        order = (~chosen).long().argsort(dim=1, stable=True)[:, :width]
        mask = torch.arange(width, device=counts.device) < counts[:, None]
        gathered = encoder_hidden_states.gather(1, order[..., None].expand(-1, -1, encoder_hidden_states.shape[-1]))
        return gathered.masked_fill(~mask[..., None], 0.0), mask

    def _add_losses(self, output: WenetU2ppOutput, logits: Tensor, labels: Tensor, output_router_logits: bool) -> None:
        config = self.config
        label_mask = labels != -100
        label_lengths = label_mask.sum(dim=-1)
        losses = []
        if config.ctc_weight > 0:
            output.loss_ctc = self._ctc_loss(logits, output.encoder_attention_mask, labels, label_lengths)
            losses.append(config.ctc_weight * output.loss_ctc)
        if config.ctc_weight < 1:
            memory, memory_mask = self.decoder_memory(
                output.encoder_last_hidden_state, output.encoder_attention_mask, logits
            )
            memory_mask = None if bool(memory_mask.all()) else memory_mask
            inputs, targets = frame_labels(labels, label_lengths, config.bos_token_id, config.eos_token_id)
            decoded = self._decode(self.model.decoder, inputs, memory, memory_mask, output_router_logits)
            output.decoder_logits = self.decoder_head(decoded.last_hidden_state)
            loss_att = self._label_smoothing_loss(output.decoder_logits, targets)
            real = targets != -100
            output.accuracy = (output.decoder_logits.argmax(-1) == targets)[real].float().mean().detach()
            routers = decoded.router_logits or ()
            if config.reverse_weight > 0:
                backward = reverse_labels(labels, label_lengths)
                inputs, targets = frame_labels(backward, label_lengths, config.bos_token_id, config.eos_token_id)
                decoded = self._decode(self.model.right_decoder, inputs, memory, memory_mask, output_router_logits)
                output.right_decoder_logits = self.right_decoder_head(decoded.last_hidden_state)
                loss_right = self._label_smoothing_loss(output.right_decoder_logits, targets)
                loss_att = (1 - config.reverse_weight) * loss_att + config.reverse_weight * loss_right
                routers += decoded.router_logits or ()
            output.loss_att = loss_att
            output.decoder_router_logits = routers or None
            losses.append((1 - config.ctc_weight) * loss_att)
        output.loss = sum(losses)

    def _decode(
        self,
        decoder: nn.Module,
        inputs: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None,
        output_router_logits: bool,
    ) -> WenetU2ppDecoderOutput:
        return decoder(inputs, decoder.project_memory(memory), memory_mask, output_router_logits=output_router_logits)

    def _ctc_loss(self, logits: Tensor, frame_mask: Tensor, labels: Tensor, label_lengths: Tensor) -> Tensor:
        """Summed over the batch and divided by its size; items too short for their labels count 0, as upstream."""
        log_probs = logits.float().log_softmax(dim=-1).transpose(0, 1)
        loss = nn.functional.ctc_loss(
            log_probs,
            labels.clamp_min(0),
            frame_mask.sum(dim=-1),
            label_lengths,
            blank=self.config.pad_token_id,
            reduction="sum",
            zero_infinity=True,
        )
        return loss / logits.shape[0]

    def _label_smoothing_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """KL divergence to `1 - s` on the target and `s / (v - 1)` elsewhere (WeNet's `LabelSmoothingLoss`).

        Written as cross-entropy minus the entropy of the smoothed target, so that no `(tokens, v)` target is built.
        """
        smoothing, vocabulary = self.config.label_smoothing, logits.shape[-1]
        real = targets != -100
        log_probs = logits[real].float().log_softmax(dim=-1)
        picked = log_probs.gather(1, targets[real][:, None])[:, 0]
        confidence, rest = 1.0 - smoothing, smoothing / (vocabulary - 1)
        cross_entropy = -(confidence * picked + rest * (log_probs.sum(dim=-1) - picked)).sum()
        negative_entropy = sum(
            count * p * torch.log(torch.tensor(p, dtype=torch.float64)).item()
            for count, p in ((1, confidence), (vocabulary - 1, rest))
            if p > 0
        )
        total = cross_entropy + negative_entropy * len(picked)
        return total / (len(picked) if self.config.length_normalized_loss else logits.shape[0])

    def tokens_per_expert(self, router_logits: tuple[Tensor, ...], num_experts_per_tok: int) -> Tensor:
        """How many frames each expert receives, `(routed layers, experts)` int64, from `output_router_logits=True`."""
        counts = [
            torch.bincount(logits.topk(num_experts_per_tok, dim=-1).indices.flatten(), minlength=logits.shape[-1])
            for logits in router_logits
        ]
        return torch.stack(counts)


def frame_labels(labels: Tensor, label_lengths: Tensor, bos: int, eos: int) -> tuple[Tensor, Tensor]:
    """Decoder inputs `[bos, y…]` padded with eos and targets `[y…, eos]` padded with -100, `(b, n + 1)` each."""
    width = int(label_lengths.max())
    labels = labels[:, :width]
    real = torch.arange(width, device=labels.device) < label_lengths[:, None]
    inputs = nn.functional.pad(labels.masked_fill(~real, eos), (1, 0), value=bos)
    targets = nn.functional.pad(labels.masked_fill(~real, -100), (0, 1), value=-100)
    return inputs, targets.scatter(1, label_lengths[:, None], eos)


def reverse_labels(labels: Tensor, label_lengths: Tensor) -> Tensor:
    """Each row's real labels in reverse order, padding (-100) stays on the right."""
    position = torch.arange(labels.shape[1], device=labels.device)
    source = label_lengths[:, None] - 1 - position
    return labels.gather(1, source.clamp_min(0)).masked_fill(source < 0, -100)


WenetU2ppForSpeechRecognition.register_for_auto_class("AutoModelForSpeechSeq2Seq")

if TYPE_CHECKING:
    # Never runs: names the pipeline so that saving a fine-tune copies its file along with the model's code.
    from .pipeline_speech_recognition import SpeechRecognitionPipeline  # noqa: F401
