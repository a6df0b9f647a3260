"""Self-attention over frames that may continue from a cache, without a positional term of its own.

Shape legend: `b` batch, `t` frames, `s` keys, `c` channels.
"""

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import eager_attention_forward
from .causal_cache import CausalCache


class CachedSelfAttention(nn.Module):
    """Projections, optional rotation, attention, projection.

    Args:
        config: of the model, names the kernel (`attn_implementation`).
        hidden_size, num_heads, head_dim (`int`): the heads may be wider or narrower than `hidden_size` in all.
        bias (`bool`): of the query, key and value projections; the output projection always has one.
    """

    cache_index = 0
    is_causal = False
    num_key_value_groups = 1

    def __init__(self, config, hidden_size: int, num_heads: int, head_dim: int, bias: bool) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.config = config
        self.head_dim = head_dim
        self.scaling = head_dim**-0.5
        self.q_proj = nn.Linear(hidden_size, inner, bias=bias)
        self.k_proj = nn.Linear(hidden_size, inner, bias=bias)
        self.v_proj = nn.Linear(hidden_size, inner, bias=bias)
        self.o_proj = nn.Linear(inner, hidden_size)

    def forward(
        self,
        hidden: Tensor,
        visible: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        cache: CausalCache | None = None,
    ) -> Tensor:
        """
        Args:
            hidden (`(b, t, c)`), visible: bool, broadcasting to `(b, heads, t, s)`; `None` = all see all.
            rotation: cosine and sine, `(1 or b, t, r)`, of the first `r` channels of queries and keys.
            cache: keys and values of earlier steps.
        """
        query, key, value = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        if rotation is not None:
            query, key = rotate(query, *rotation), rotate(key, *rotation)
        if cache is not None:
            key, value = cache.extend_attention(self.cache_index, key, value)
        heads = (part.unflatten(2, (-1, self.head_dim)).transpose(1, 2) for part in (query, key, value))
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        context, _ = attention(self, *heads, visible, scaling=self.scaling, is_causal=False)
        return self.o_proj(context.flatten(2))


def rotate(projected: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions (https://arxiv.org/abs/2104.09864) on neighbouring pairs of the first channels; the rest stays.

    Args:
        projected (`(b, t, c)`), cosine, sine (`(1 or b, t, r)`): each angle twice, for both channels of its pair.
    """
    size = cosine.shape[-1]
    turning, still = projected[..., :size].to(cosine.dtype), projected[..., size:]
    first, second = turning.unflatten(-1, (-1, 2)).unbind(-1)
    quarter_turn = torch.stack([-second, first], dim=-1).flatten(-2)
    return torch.cat([(turning * cosine + quarter_turn * sine).to(projected.dtype), still], dim=-1)
