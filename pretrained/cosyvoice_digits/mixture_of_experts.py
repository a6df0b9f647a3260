"""Mixture-of-experts feed-forward layer of U2++ MoE (https://arxiv.org/abs/2404.16407; WeNet's `MoEFFNLayer`).

The router takes the top k raw logits of each frame and normalises only these with a float32 softmax; there is no
noise, no capacity limit and no balancing loss. The experts are plain two-layer networks whose weights are stacked, and
run through transformers' experts interface: `model.set_experts_implementation("eager" | "batched_mm" | "grouped_mm")`.

Shape legend: `n` frames or tokens, `d` hidden size, `f` intermediate size, `e` experts, `k` experts per token.
"""

import torch
from torch import Tensor, nn
from transformers.integrations import use_experts_implementation


class ExpertRouter(nn.Linear):
    """Linear gate without bias, `(n, d)` → router logits `(n, e)`, in the model's dtype as upstream."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__(hidden_size, num_experts, bias=False)


@use_experts_implementation(has_gate=False, has_bias=True)
class StackedExperts(nn.Module):
    """`e` two-layer feed-forward networks with stacked weights: `down(act(up(x)))`.

    Dropout follows the activation, as in the dense layer, so it is part of `act_fn`: every implementation applies it.
    """

    def __init__(
        self, config, hidden_size: int, intermediate_size: int, num_experts: int, act_fn: nn.Module, bias: bool
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.act_fn = act_fn
        self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        if bias:
            self.up_proj_bias = nn.Parameter(torch.empty(num_experts, intermediate_size))
            self.down_proj_bias = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sort the (token, expert) pairs by expert and run each expert on its slice.

        Args:
            hidden_states (`(n, d)`), top_k_index (`(n, k)`), top_k_weights (`(n, k)`).

        Returns:
            `(n, d)`: the weighted sum over the chosen experts.
        """
        num_tokens, top_k = top_k_index.shape
        order = top_k_index.reshape(-1).argsort(stable=True)
        counts = torch.bincount(top_k_index.reshape(-1), minlength=self.num_experts).tolist()
        token_of_pair = order // top_k
        grouped = hidden_states[token_of_pair]
        outputs = []
        for expert, rows in enumerate(grouped.split(counts)):
            if not len(rows):
                continue
            up_bias = self.up_proj_bias[expert] if self.has_bias else None
            down_bias = self.down_proj_bias[expert] if self.has_bias else None
            inner = self.act_fn(nn.functional.linear(rows, self.up_proj[expert], up_bias))
            outputs.append(nn.functional.linear(inner, self.down_proj[expert], down_bias))
        weighted = torch.cat(outputs) * top_k_weights.reshape(-1)[order, None].to(hidden_states.dtype)
        return torch.zeros_like(hidden_states).index_add_(0, token_of_pair, weighted.to(hidden_states.dtype))


class MixtureOfExperts(nn.Module):
    """Routed feed-forward layer, `(b, t, d)` → `(b, t, d)`. Name it as a leaf module for DeepSpeed ZeRO-3."""

    def __init__(
        self,
        config,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        num_experts_per_tok: int,
        act_fn: nn.Module,
        dropout: float,
        bias: bool,
    ) -> None:
        super().__init__()
        self.num_experts_per_tok = num_experts_per_tok
        self.router = ExpertRouter(hidden_size, num_experts)
        expert_act = nn.Sequential(act_fn, nn.Dropout(dropout))
        self.experts = StackedExperts(config, hidden_size, intermediate_size, num_experts, expert_act, bias)
        self.experts.has_bias = bias

    def route(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Chosen experts `(n, k)` in descending order of their logits, and their weights `(n, k)`, which sum to 1."""
        logits, index = torch.topk(self.router(hidden_states), self.num_experts_per_tok, dim=-1)
        return index, torch.softmax(logits, dim=-1, dtype=torch.float32).to(hidden_states.dtype)

    def forward(self, hidden_states: Tensor) -> Tensor:
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        if not len(flat):
            return hidden_states
        index, weights = self.route(flat)
        return self.experts(flat, index, weights).view_as(hidden_states)
