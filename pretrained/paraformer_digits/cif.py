"""Continuous integrate-and-fire (https://arxiv.org/abs/1905.11235): weights over frames become embeddings of tokens.

Every frame `t` has a weight `a_t` in 0..1. The weights accumulate; whenever the sum passes a whole number, a token
fires: its embedding is the weighted sum of the frames since the last one, and the firing frame is split between two.

Two rules are in use upstream, equal but for rounding as long as no weight exceeds 1:

* cumulative (`cif_v1`, Paraformer): `P_t = float32(cumsum64(a))`, a token fires where `floor(P_t)` rises. A frame
  fires one token even if the floor rises by two; the others are lost.
* sequential (`cif`, BiCif and WeNet): `i += a_t`; from `threshold` on a token fires and `i -= 1`. Here a rise by two
  leaves the second one to the next frame.

Both are computed without a loop over frames: with `F_t` the whole numbers passed by frame `t`, the sequential rule has
fired `min(F_t, fired_{t-1} + 1)` tokens, which is `t + cummin_t(F_t - t)`.

Shape legend: `b` batch, `t` frames, `n` tokens, `c` channels.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


# A sum of weights that cannot be scaled to anything.
_NO_WEIGHT = 1e-6


class Firing(NamedTuple):
    """
    Args:
        fires (`(b, t)`, bool): frames at which a token fires.
        remainders (`(b, t)`): part of a firing frame's weight that goes to the next token; differentiable.
        peaks (`(b, t)`, float32): upstream's firing track, see `fire_cumulative` and `fire_sequential`.
    """

    fires: Tensor
    remainders: Tensor
    peaks: Tensor


def fire_cumulative(alphas: Tensor) -> Firing:
    """Upstream's parallel rule on weights `(b, t)` float32. `peaks`: fraction of `P_t`, plus 1 where it fires."""
    # Double precision in the sum only: upstream casts it to float32 before it looks for whole numbers.
    passed = alphas.double().cumsum(dim=1).float()
    whole = passed.detach().floor()
    fires = torch.diff(whole, dim=1, prepend=torch.zeros_like(whole[:, :1])) > 0
    # In this order, upstream's rounding.
    peaks = fires + passed - whole
    return Firing(fires, peaks - peaks.detach().floor(), peaks)


def fire_sequential(alphas: Tensor, threshold: float = 1.0, step: float = 1.0) -> Firing:
    """Upstream's loop on weights `(b, t)` float32. `peaks` is what has accumulated, before `step` is taken away."""
    passed = alphas.double().cumsum(dim=1)
    fired = _tokens_fired(passed.detach(), threshold, step)
    before = torch.nn.functional.pad(fired, (1, 0))[:, :-1]
    peaks = passed - before * step
    # A firing frame gives its token what it lacks to 1, whatever the threshold; upstream's cell keeps `i - 1`.
    return Firing(fired > before, (passed - fired * step).to(alphas.dtype), peaks.to(alphas.dtype))


def fire_rounded(alphas: Tensor, threshold: float = 1.0, step: float = 1.0) -> Firing:
    """`fire_sequential` with upstream's rounding: float32, one addition after the other.

    Weights scaled to a whole sum make their last token fire or not by the last bit. Slow; for comparisons only.
    """
    weights = alphas.detach().float().cpu().numpy()
    held, unit = np.zeros(len(weights), np.float32), np.float32(step)
    peaks, remainders = np.empty_like(weights), np.empty_like(weights)
    for frame in range(weights.shape[1]):
        peaks[:, frame] = held + weights[:, frame]
        held = np.where(peaks[:, frame] >= np.float32(threshold), peaks[:, frame] - unit, peaks[:, frame])
        remainders[:, frame] = held
    fires = torch.as_tensor(peaks >= np.float32(threshold), device=alphas.device)
    # The values are those of the loop; the gradient is that of a running sum.
    passed = alphas.cumsum(dim=1)
    gradient = passed - passed.detach()
    track = torch.as_tensor(peaks, device=alphas.device).to(alphas.dtype)
    return Firing(fires, torch.as_tensor(remainders, device=alphas.device).to(alphas.dtype) + gradient, track)


def _tokens_fired(passed: Tensor, threshold: float, step: float) -> Tensor:
    """Tokens that the loop has fired by each frame, `(b, t)`, for the weights' running sum `(b, t)`."""
    frames = torch.arange(1, passed.shape[1] + 1, device=passed.device, dtype=passed.dtype)
    reached = ((passed + (step - threshold)) / step).floor().clamp_min(0.0)
    if not passed.shape[1]:
        return reached
    return torch.minimum((reached - frames).cummin(dim=1).values, torch.zeros_like(frames)) + frames


def integrate(
    hidden_states: Tensor, alphas: Tensor, firing: Firing, num_tokens: int, keep_incomplete: bool = False
) -> Tensor:
    """Embeddings of the first `num_tokens` tokens.

    Args:
        hidden_states (`(b, t, c)`), alphas (`(b, t)`), firing: of these weights.
        keep_incomplete: let what has accumulated after the last firing stand as one more token.

    Returns:
        `(b, num_tokens, c)`, zero where fewer tokens fire.
    """
    if not hidden_states.shape[1] or not num_tokens:
        return hidden_states.new_zeros(hidden_states.shape[0], num_tokens, hidden_states.shape[2])
    fires = firing.fires
    token = fires.long().cumsum(dim=1) - fires.long()
    later = torch.where(fires, firing.remainders, torch.zeros_like(firing.remainders))
    embeddings = _scatter(hidden_states, [(token, alphas - later, None), (token + 1, later, fires)], num_tokens)
    if keep_incomplete:
        return embeddings
    # What has accumulated after the last firing is no token.
    complete = torch.arange(num_tokens, device=fires.device) < fires.sum(dim=1, keepdim=True)
    return embeddings.masked_fill(~complete[..., None], 0.0)


def integrate_exactly(hidden_states: Tensor, alphas: Tensor, lengths: Tensor, num_tokens: int) -> Tensor:
    """Embeddings of exactly `lengths` tokens, whatever rounding says: weights are scaled so that each token gets 1.

    A scaled weight above 1 closes as many tokens as it covers; the share of frame `t` in token `k` is the overlap of
    `[P_{t-1}, P_t]` with `[k, k + 1]`.

    Args:
        hidden_states (`(b, t, c)`), alphas (`(b, t)`, unscaled, float32), lengths (`(b,)`): tokens to make.

    Returns:
        `(b, num_tokens, c)`, zero beyond `lengths`, and everywhere in an item whose weights are all zero.
    """
    if not hidden_states.shape[1] or not num_tokens:
        return hidden_states.new_zeros(hidden_states.shape[0], num_tokens, hidden_states.shape[2])
    passed = alphas.double().cumsum(dim=1)
    total = passed[:, -1:]
    # Items without any weight keep zeros instead of dividing by them.
    total = torch.where(total > _NO_WEIGHT, total, torch.ones_like(total))
    passed = passed * (lengths[:, None] / total)
    before = torch.nn.functional.pad(passed, (1, 0))[:, :-1]
    # Whatever reaches a whole number up to rounding has reached it, so that the last token gets its last frame.
    first = (before.detach() + 1e-9).floor()
    spans = int((passed.detach() - first).max().ceil().clamp_min(1))
    shares = []
    for offset in range(spans):
        token = first + offset
        share = torch.minimum(passed, token + 1) - torch.maximum(before, token)
        # Nearly every frame belongs to its first token, few to more.
        shares.append((token.long(), share.to(alphas.dtype), share > 0 if offset else None))
    return _scatter(hidden_states, shares, num_tokens)


def _scatter(hidden_states: Tensor, shares: list[tuple[Tensor, Tensor, Tensor | None]], num_tokens: int) -> Tensor:
    """Sum of frames by token, added in float32.

    Args:
        hidden_states (`(b, t, c)`).
        shares: `token (b, t)`, `weight (b, t)` and the frames `(b, t)` that take part (`None` = all).
    """
    batch, frames, channels = hidden_states.shape
    rows = hidden_states.flatten(0, 1)
    # One more token per item collects what is beyond `num_tokens`.
    first = torch.arange(batch, device=rows.device)[:, None] * (num_tokens + 1)
    embeddings = rows.new_zeros(batch * (num_tokens + 1), channels, dtype=torch.float32)
    for token, weight, taking_part in shares:
        place, weight = (first + token.clamp_max(num_tokens)).flatten(), weight.flatten()
        if taking_part is None:
            source = rows
        else:
            chosen = taking_part.flatten().nonzero()[:, 0]
            place, weight, source = place[chosen], weight[chosen], rows[chosen]
        embeddings = embeddings.index_add(0, place, weight[:, None].float() * source.float())
    return embeddings.view(batch, num_tokens + 1, channels)[:, :num_tokens].to(hidden_states.dtype)


def dynamic_threshold(alphas: Tensor) -> Tensor:
    """The paper's threshold `sum / ceil(sum)` of each item, `(b,)` (https://arxiv.org/abs/2206.08317, section 2.2)."""
    total = alphas.sum(dim=-1)
    return total / total.ceil().clamp_min(1.0)


def append_tail(alphas: Tensor, lengths: Tensor, tail_threshold: float) -> Tensor:
    """Weights `(b, t + 1)`: one more frame, and `tail_threshold` on the first frame after each item's end.

    It lets a last token that has nearly filled fire.
    """
    longer = torch.nn.functional.pad(alphas, (0, 1))
    tail = torch.arange(longer.shape[1], device=alphas.device) == lengths[:, None]
    return longer + tail * tail_threshold
