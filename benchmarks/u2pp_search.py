"""CTC prefix beam search and attention rescoring against WeNet's, on identical inputs with identical results."""

from pathlib import Path

import torch
from timing import Comparison, compare
from torch import Tensor
from wenet_peer import build_pair, import_wenet

from hf_speechllm.models.ctc import ctc_prefix_beam_search
from hf_speechllm.models.generation_wenet_u2pp import NBest


def ctc_like(batch: int, frames: int, vocabulary: int) -> Tensor:
    """Log-probabilities that look like CTC's: mostly blank, short runs of tokens, some ambiguity."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, frames, vocabulary, generator=generator) * 3.0
    logits[..., 0] += 8.0 * (torch.rand(batch, frames, generator=generator) > 0.3)
    return ((logits + logits.roll(1, dims=1)) / 1.4).log_softmax(dim=-1)


def spiky_ctc(batch: int, frames: int, vocabulary: int) -> Tensor:
    """Log-probabilities of a trained model's kind: a token with two rivals every 4 to 10 frames, else blank."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(batch, frames, vocabulary, generator=generator)
    logits[..., 0] += 9.0
    for row in logits:
        frame = 3
        while frame < frames:
            first, second, third = torch.randint(3, vocabulary, (3,), generator=generator).tolist()
            margin = 6.0 * float(torch.rand(1, generator=generator))
            row[frame, [first, second, third]] += torch.tensor([16.0, 16.0 - margin, 12.0 - margin])
            row[frame, 0] -= 3.0 * float(torch.rand(1, generator=generator))
            frame += int(torch.randint(4, 11, (1,), generator=generator))
    return logits.log_softmax(dim=-1)


def prefix_beam(checkout: Path) -> list[Comparison]:
    import_wenet(checkout)
    from wenet.models.transformer.search import ctc_prefix_beam_search as peer_search

    results = []
    for batch, frames, goal in ((1, 125, ">= 7"), (1, 500, ">= 7"), (16, 125, ">= 12")):
        log_probs, lengths = ctc_like(batch, frames, 4233), torch.full((batch,), frames)
        run_peer = lambda p=log_probs, n=lengths: peer_search(p, n, 10)  # noqa: E731
        run_ours = lambda p=log_probs, n=lengths: ctc_prefix_beam_search(p, n, 10, 0)  # noqa: E731
        for theirs, ours in zip(run_peer(), run_ours(), strict=True):
            assert [list(prefix) for prefix in theirs.nbest] == ours.tokens
            assert theirs.nbest_scores == ours.scores and theirs.nbest_times == ours.frames
        results.append(
            compare(f"prefix beam, V=4233, beam 10, T={frames}, batch {batch}", goal, run_peer, run_ours, runs=5)
        )
    return results


def rescoring(checkout: Path) -> list[Comparison]:
    """Second pass alone, both decoders: the n-best lists (10) of a prefix beam search of 8 utterances of 4 to 8 s.

    Like real ones these lists share most of their beginnings, which is what the prefix tree of ours exploits."""
    peer, ours = build_pair(checkout)
    from wenet.models.transformer.search import DecodeResult, attention_rescoring

    lengths = torch.tensor([200, 190, 175, 160, 150, 130, 115, 100])
    hidden = torch.randn(8, 200, 256, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(200) < lengths[:, None]
    found = ctc_prefix_beam_search(spiky_ctc(8, 200, 4233), lengths, 10, 0)
    searches = [NBest(result.tokens, result.scores, result.frames) for result in found]

    def run_peer() -> list:
        inputs = [
            DecodeResult(s.tokens[0], nbest=s.tokens, nbest_scores=s.scores, nbest_times=s.frames) for s in searches
        ]
        return attention_rescoring(peer, inputs, hidden, lengths, 0.5, 0.3)

    def run_ours() -> list[NBest]:
        return ours._rescore(searches, hidden * mask[..., None], mask, 0.5, 0.3)

    with torch.inference_mode():
        for theirs, found in zip(run_peer(), run_ours(), strict=True):
            assert list(theirs.tokens) == found.tokens[0] and abs(theirs.score - found.scores[0]) < 1e-2
        return [compare("rescoring, 8 utterances, n-best 10, bidirectional", ">= 1.5", run_peer, run_ours, runs=5)]
