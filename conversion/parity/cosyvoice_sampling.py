"""Repetition-aware sampling against upstream: candidates, fall-back, seeded draws; and the cross-fade."""

from pathlib import Path

import torch

from hf_speechllm.models.cross_fade import cross_fade, hamming_window
from hf_speechllm.models.ras_sampling import RasSettings, nucleus, ras_probabilities, repeated, two_step_draw

from .case import Case


def check_sampling(case: Case, work: Path) -> None:
    """Check every value of a sampling case."""
    params = case.facts["params"]
    settings = RasSettings(params["top_p"], params["top_k"], params["win_size"], params["tau_r"])
    logp, history = case.tensors["logp"], case.tensors["history"]
    case.use("logp", "history")
    full = logp.softmax(dim=-1)
    ids, values, inside = nucleus(full, settings)
    width = case.tensors["nucleus.ids"].shape[1] - ids.shape[1]
    padding = {"pad": (0, width), "value": -1}
    case.compare("nucleus.ids", torch.nn.functional.pad(ids.masked_fill(~inside, -1), **padding))
    probabilities = torch.nn.functional.pad(values.masked_fill(~inside, 0.0), (0, width))
    expected = case.tensors["nucleus.probs"]
    case.compare("nucleus.probs", torch.where(expected < 0, expected, probabilities))
    again = repeated(history, logp.shape[1], settings)
    case.compare("fallback", again.gather(1, ids[:, :1])[:, 0].to(case.tensors["fallback"].dtype))
    second = logp.scatter(1, ids[:, :1], float("-inf")).softmax(dim=-1)
    # Stored only where the fall-back happens.
    case.compare("fallback.probs", second.masked_fill(case.tensors["fallback"][:, None] == 0, 0.0))
    draws = [
        [
            two_step_draw(row, past.tolist(), settings, torch.Generator().manual_seed(seed))
            for seed in range(case.tensors["draws"].shape[1])
        ]
        for row, past in zip(logp, history, strict=True)
    ]
    case.compare("draws", torch.tensor(draws))
    # Every token that was drawn must be possible in the distribution that the batched sampler draws from.
    possible = ras_probabilities(logp, history, settings).gather(1, case.tensors["draws"]) > 0
    case.record("draws/possible", None, "all", bool(possible.all()))

    before = case.tensors["fade.prev"]
    window = hamming_window(2 * before.shape[-1], before.device)
    case.use("fade.in", "fade.prev")
    case.compare("fade.out", cross_fade(case.tensors["fade.in"], before, window))
