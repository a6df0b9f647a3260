"""Multi-head attention of the encoders and decoders: projections, head layout, and the choice of kernel.

Shape legend: `b` batch, `t` frames, `s` keys, `h` heads, `d` size of a head. In every mask True = visible.
"""

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    is_causal: bool = False,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Attention in plain torch, softmax in float32. A bool mask zeroes rows that see nothing, as upstream does."""
    if module.num_key_value_groups > 1:
        key = key.repeat_interleave(module.num_key_value_groups, dim=1)
        value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    if is_causal and attention_mask is None and query.shape[2] > 1:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    scores = torch.matmul(query, key.transpose(-2, -1)) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        weights = weights.masked_fill(~attention_mask, 0.0)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention with grouped key-value heads (WeNet's `MultiHeadedAttention`)."""

    is_causal = False

    def __init__(
        self,
        config,
        hidden_size: int,
        num_heads: int,
        num_key_value_heads: int | None,
        head_dim: int | None,
        dropout: float,
        query_bias: bool,
        key_bias: bool,
        value_bias: bool,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.num_key_value_heads = num_heads if num_key_value_heads is None else num_key_value_heads
        self.num_key_value_groups = num_heads // self.num_key_value_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = dropout
        inner, inner_kv = num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, inner, bias=query_bias)
        self.k_proj = nn.Linear(hidden_size, inner_kv, bias=key_bias)
        self.v_proj = nn.Linear(hidden_size, inner_kv, bias=value_bias)
        self.o_proj = nn.Linear(inner, hidden_size, bias=query_bias)

    def split_heads(self, projected: Tensor) -> Tensor:
        """`(b, t, h * d)` → `(b, h, t, d)`."""
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, is_causal: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Run the configured kernel on `(b, h, t, d)` heads; returns `(b, t, h, d)` and weights, if it has them."""
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=is_causal,
        )
