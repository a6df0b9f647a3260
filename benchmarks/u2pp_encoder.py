"""Encoder of AISHELL's U2++ (12 x 256), whole utterance and streaming, and a training step, against WeNet."""

from pathlib import Path

import torch
from timing import Comparison, compare
from wenet_peer import build_pair

from hf_speechllm.cpu_inference import pack_linear_weights, unpack_linear_weights


def encoder(checkout: Path) -> list[Comparison]:
    results = []
    for sdpa in (False, True):
        peer, ours = build_pair(checkout, use_sdpa=sdpa)
        for seconds, goal in ((10, ">= 1.1"), (60, ">= 1.15" if sdpa else ">= 1.3")):
            features = torch.randn(1, 100 * seconds, 80, generator=torch.Generator().manual_seed(0)) * 3 + 10
            lengths = torch.tensor([features.shape[1]])
            with torch.inference_mode():
                run_peer = lambda f=features, n=lengths, p=peer: p.encoder(f, n, decoding_chunk_size=-1)[0]  # noqa: E731
                run_ours = lambda f=features, o=ours: o.model.encoder(f).last_hidden_state  # noqa: E731
                assert (run_peer() - run_ours()).abs().max() < 1e-3
                name = f"encoder 12 x 256, {seconds} s, against WeNet {'use_sdpa' if sdpa else 'eager'}"
                results.append(compare(name, goal, run_peer, run_ours, runs=7))
                pack_linear_weights(ours)
                assert (run_peer() - run_ours()).abs().max() < 1e-3
                results.append(compare(f"{name}, ours packed", "", run_peer, run_ours, runs=7))
                unpack_linear_weights(ours)
    return results


def streaming(checkout: Path) -> list[Comparison]:
    """10 s in chunks of 16 encoder frames, 4 left chunks: WeNet's `forward_chunk` against ours."""
    peer, ours = build_pair(checkout)
    features = torch.randn(1, 1000, 80, generator=torch.Generator().manual_seed(0)) * 3 + 10

    def run_ours() -> torch.Tensor:
        state, outputs = ours.model.encoder.initial_state(), []
        for first in range(0, features.shape[1] - 6, 64):
            output, _, state = ours.model.encoder.forward_chunk(
                features[:, first : first + 67], state, max_past_frames=64
            )
            outputs.append(output)
        return torch.cat(outputs, dim=1)

    with torch.inference_mode():
        run_peer = lambda: peer.encoder.forward_chunk_by_chunk(features, 16, 4)[0]  # noqa: E731
        assert (run_peer() - run_ours()).abs().max() < 1e-3
        name = "streaming encoder, 10 s, chunk 16, 4 left"
        results = [compare(name, ">= 1.2", run_peer, run_ours, runs=7)]
        pack_linear_weights(ours)
        assert (run_peer() - run_ours()).abs().max() < 1e-3
        return [*results, compare(f"{name}, ours packed", ">= 1.2", run_peer, run_ours, runs=7)]


def training_step(checkout: Path) -> list[Comparison]:
    """Forward and backward of the joint loss, full context and a chunk mask, dropout on, 8 utterances of 6 to 10 s."""
    results = []
    generator = torch.Generator().manual_seed(0)
    frames = torch.tensor([1000, 960, 900, 860, 800, 740, 680, 600])
    features = torch.randn(8, 1000, 80, generator=generator) * 3 + 10
    labels = torch.randint(3, 4233, (8, 20), generator=generator)
    mask = (torch.arange(1000) < frames[:, None]).long()
    features = features * mask[..., None]
    peer, ours = build_pair(checkout)
    batch = {
        "feats": features,
        "feats_lengths": frames,
        "target": labels,
        "target_lengths": torch.full((8,), 20),
        "langs": None,
        "tasks": None,
    }

    def run_peer(seed: int) -> float:
        torch.manual_seed(seed)
        loss = peer(batch, torch.device("cpu"))["loss"]
        loss.backward()
        peer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def run_ours(seed: int) -> float:
        torch.manual_seed(seed)
        loss = ours(features, mask, labels, decoding_chunk_size=0).loss
        loss.backward()
        ours.zero_grad(set_to_none=True)
        return float(loss.detach())

    def draws_a_chunk(seed: int) -> bool:
        return ours.model.encoder.draw_dynamic_chunk(249, torch.Generator().manual_seed(seed))[0] < 249

    for kind, chunked in (("full context", False), ("dynamic chunk", True)):
        seed = next(seed for seed in range(100) if draws_a_chunk(seed) == chunked)
        peer.eval(), ours.eval()
        assert abs(run_peer(seed) - run_ours(seed)) < 1e-2
        peer.train(), ours.train()
        results.append(
            compare(
                f"training step, 8 x 6-10 s, {kind}",
                ">= 1.2",
                lambda s=seed: run_peer(s),
                lambda s=seed: run_ours(s),
                runs=3,
            )
        )
    return results
