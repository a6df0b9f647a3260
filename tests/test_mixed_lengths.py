"""On a CPU, `generate` encodes utterances of mixed lengths without padding, and nothing of the result changes."""

import pytest
import tiny_funasr_paraformer
import tiny_funasr_sensevoice
import torch

from hf_speechllm.models import mixed_lengths
from hf_speechllm.models.mixed_lengths import lengths_to_encode_apart


FRAMES = (60, 17, 33)


def paraformer_batch(variant: str):
    model = tiny_funasr_paraformer.tiny_model(variant)
    size = model.config.input_size
    return model, tiny_funasr_sensevoice.pad(tiny_funasr_sensevoice.tiny_features(*FRAMES, size=size), extra=3)


@pytest.mark.parametrize(
    ("family", "most_joined", "expected"),
    [
        ("paraformer", 80, [(1, 77), (1, 33)]),
        ("bicif", 1000, [(1, 110)]),
        ("bicif", 50, [(1, 60), (1, 50)]),
        ("wenet's conformer", 80, [(1, 60), (1, 17), (1, 33)]),
        # With four prompt frames each.
        ("sensevoice", 80, [(1, 64), (1, 58)]),
    ],
)
def test_without_padding_is_the_same_as_the_batch(monkeypatch, family, most_joined, expected):
    if family == "sensevoice":
        model, pieces = tiny_funasr_sensevoice.tiny_model(), tiny_funasr_sensevoice.tiny_features(*FRAMES)
        batch, module = tiny_funasr_sensevoice.pad(pieces, extra=3), "generation_funasr_sensevoice"
    else:
        (model, batch), module = paraformer_batch(family), "generation_funasr_paraformer"
    monkeypatch.setattr(mixed_lengths, "_MOST_JOINED_FRAMES", most_joined)
    widths = []
    first = model.model if family == "wenet's conformer" else model.model.encoder.layers[0].input_layernorm
    handle = first.register_forward_hook(lambda module, args, output: widths.append(args[0].shape[:2]))
    apart = model.generate(**batch, return_dict_in_generate=True)
    assert widths == expected
    monkeypatch.setattr(f"hf_speechllm.models.{module}.lengths_to_encode_apart", lambda *args: None)
    together = model.generate(**batch, return_dict_in_generate=True)
    handle.remove()
    prompts = 4 if family == "sensevoice" else 0
    assert widths[len(expected) :] == [(len(FRAMES), max(FRAMES) + 3 + prompts)]
    assert apart.sequences.numel() and torch.equal(apart.sequences, together.sequences)
    assert torch.equal(apart.sequences_lengths, together.sequences_lengths)
    torch.testing.assert_close(apart.scores, together.scores, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(apart.token_timestamps, together.token_timestamps)


def test_upstreams_batch_keeps_its_padding():
    model, batch = paraformer_batch("paraformer")
    model.config.padding = "upstream"
    widths = []
    handle = model.model.register_forward_hook(lambda module, args, output: widths.append(len(args[0])))
    model.generate(**batch)
    handle.remove()
    assert widths == [len(FRAMES)]


def test_what_stays_a_batch():
    """Equal lengths, one utterance, real frames that do not come first, tiny ones, and whatever needs a gradient."""
    features, mask = torch.zeros(2, 40, 3), torch.ones(2, 40)
    with torch.no_grad():
        assert lengths_to_encode_apart(features, None) is None
        assert lengths_to_encode_apart(features, mask) is None
        mask[1, 20:] = 0
        assert lengths_to_encode_apart(features, mask) == [40, 20]
        assert lengths_to_encode_apart(features[1:], mask[1:]) is None
        assert lengths_to_encode_apart(features, mask.flip(1)) is None
        mask[1, 10:] = 0
        assert lengths_to_encode_apart(features, mask) is None
    mask[1, :20] = 1
    assert lengths_to_encode_apart(features, mask) is None
