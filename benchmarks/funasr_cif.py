"""Integrate-and-fire over 1000 frames of 512 channels against the rule of FunASR's `CifPredictorV2` (`cif_v1`)."""

from pathlib import Path

import torch
from funasr_peer import import_funasr
from timing import Comparison, compare
from torch import Tensor

from hf_speechllm.models.cif import fire_cumulative, integrate


FRAMES, CHANNELS = 1000, 512


def cif(checkout: Path) -> list[Comparison]:
    """Weights and frames to embeddings and firing track; forward alone as in recognition, and with backward."""
    upstream = import_funasr(checkout, "funasr.models.paraformer.cif_predictor").cif_v1

    def run_ours(hidden: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor]:
        firing = fire_cumulative(alphas)
        return integrate(hidden, alphas, firing, int(alphas.detach().sum(dim=-1).floor().max())), firing.peaks

    def run_peer(hidden: Tensor, alphas: Tensor) -> tuple[Tensor, Tensor]:
        return upstream(hidden, alphas, 1.0)

    results = []
    for batch in (1, 8):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(batch, FRAMES, CHANNELS, generator=generator)
        # About one token in four frames.
        alphas = (torch.randn(batch, FRAMES, generator=generator) - 1.2).sigmoid()
        upstream_grad = torch.randn(batch, FRAMES, CHANNELS, generator=generator)

        def with_backward(run, hidden=hidden, alphas=alphas, grad=upstream_grad) -> tuple[Tensor, Tensor]:
            hidden, alphas = hidden.clone().requires_grad_(), alphas.clone().requires_grad_()
            embeddings, _ = run(hidden, alphas)
            (embeddings * grad[:, : embeddings.shape[1]]).sum().backward()
            return hidden.grad, alphas.grad

        with torch.no_grad():
            (theirs, their_peaks), (mine, my_peaks) = run_peer(hidden, alphas), run_ours(hidden, alphas)
            width = mine.shape[1]
            # Upstream's width is the rounded sum, ours the tokens that fire.
            assert (theirs[:, :width] - mine).abs().max() < 1e-3 and not theirs[:, width:].any()
            assert torch.equal(their_peaks, my_peaks)
            forward_peer = lambda h=hidden, a=alphas: run_peer(h, a)  # noqa: E731
            forward_ours = lambda h=hidden, a=alphas: run_ours(h, a)  # noqa: E731
            name = f"CIF, T={FRAMES}, {CHANNELS} channels, batch {batch}"
            results.append(compare(f"{name}, forward", ">= 3", forward_peer, forward_ours, runs=15))
        for theirs, mine in zip(with_backward(run_peer), with_backward(run_ours), strict=True):
            assert (theirs - mine).abs().max() < 1e-2
        backward_peer = lambda run=with_backward: run(run_peer)  # noqa: E731
        backward_ours = lambda run=with_backward: run(run_ours)  # noqa: E731
        results.append(compare(f"{name}, with backward", ">= 2.2", backward_peer, backward_ours, runs=9))
    return results
