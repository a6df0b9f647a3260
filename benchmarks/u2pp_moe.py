"""Mixture-of-experts layer (8 experts, top 2, 256 -> 2048) against WeNet's loop over experts."""

from pathlib import Path

import torch
from timing import Comparison, compare
from wenet_peer import build_pair


def moe(checkout: Path) -> list[Comparison]:
    peer, ours = build_pair(checkout, num_blocks=1, mlp_type="moe")
    theirs, mine = peer.encoder.encoders[0].feed_forward, ours.model.encoder.layers[0].feed_forward
    results = []
    for frames in (1, 4, 16, 64, 250, 1000, 4000):
        hidden = torch.randn(1, frames, 256, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            assert (theirs(hidden) - mine(hidden)).abs().max() < 1e-4
            results.append(
                compare(
                    f"MoE layer, {frames} frames", ">= 1", lambda h=hidden: theirs(h), lambda h=hidden: mine(h), 15
                )
            )
    return results
