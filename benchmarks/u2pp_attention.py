"""One relative-attention block (projections included) against upstream's eager formula, WeNet's own class."""

from pathlib import Path

import torch
from timing import Comparison, compare
from wenet_peer import build_pair

from hf_speechllm.models.conformer import sinusoidal_positions


def attention(checkout: Path) -> list[Comparison]:
    peer, ours = build_pair(checkout, num_blocks=1)
    theirs, mine = peer.encoder.encoders[0].self_attn, ours.model.encoder.layers[0].self_attn
    results = []
    for frames, goal in ((500, ">= 2.5"), (1500, ">= 5")):
        hidden = torch.randn(1, frames, 256, generator=torch.Generator().manual_seed(0))
        table = sinusoidal_positions(torch.arange(frames), 256)[None]
        mask = torch.ones(1, 1, frames, dtype=torch.bool)
        query, key = torch.randn(2, 1, 4, frames, 64, generator=torch.Generator().manual_seed(1)).unbind()

        def core_peer(query=query, key=key, mask=mask, table=table) -> torch.Tensor:
            """Scores, mask, softmax and sum as `RelPositionMultiHeadedAttention` computes them."""
            position = theirs.linear_pos(table).view(1, -1, 4, 64).transpose(1, 2)
            query = query.transpose(1, 2)
            with_u = (query + theirs.pos_bias_u).transpose(1, 2)
            with_v = (query + theirs.pos_bias_v).transpose(1, 2)
            content = torch.matmul(with_u, key.transpose(-2, -1))
            scores = (content + torch.matmul(with_v, position.transpose(-2, -1))) / 8.0
            hidden_keys = mask.unsqueeze(1).eq(0)
            weights = torch.softmax(scores.masked_fill(hidden_keys, -float("inf")).float(), dim=-1)
            return torch.matmul(weights.masked_fill(hidden_keys, 0.0), key).transpose(1, 2)

        def core_ours(query=query, key=key, table=table) -> torch.Tensor:
            folded, bias = mine.fold_positions(key, table)
            return mine.attend_with_key_bias(query, folded, key, bias, None)[0]

        with torch.inference_mode():
            block_peer = lambda h=hidden, m=mask, t=table: theirs(h, h, h, m, t)[0]  # noqa: E731
            block_ours = lambda h=hidden, t=table: mine(h, None, t)[0]  # noqa: E731
            assert (block_peer() - block_ours()).abs().max() < 1e-4
            assert (core_peer() - core_ours()).abs().max() < 1e-4
            results.append(compare(f"attention core, T={frames}", goal, core_peer, core_ours))
            results.append(compare(f"attention with its projections, T={frames}", "", block_peer, block_ours))
    return results
