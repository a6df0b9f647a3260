"""Streams of the unit vocoder: any cut of the units gives the samples of one pass, in any voice."""

import pytest
import torch
from tiny_speechgpt_lm import build_vocoder
from tiny_speechgpt_units import tiny_vocoder

from hf_speechllm.models.streaming_speechgpt_unit_vocoder import generator_reach


@pytest.mark.parametrize("kernels", ((11, 8, 8, 4, 4), (9, 8, 9, 5, 4)))
@pytest.mark.parametrize("durations", (True, False))
def test_units_one_by_one_sound_like_all_at_once(durations, kernels):
    """Any cut of the units: the samples of all pieces are those of the whole, and most of them come early."""
    vocoder = build_vocoder(durations, kernels)
    units = torch.randint(0, 1000, (70,), generator=torch.Generator().manual_seed(0)).tolist()
    whole = vocoder.synthesize(units)
    assert whole.abs().max() > 0.01
    for size in (1, 7, 33, 70):
        speaker = vocoder.start_stream()
        pieces = [speaker.push(units[start : start + size]) for start in range(0, len(units), size)]
        early = sum(map(len, pieces))
        pieces.append(speaker.push([], is_last=True))
        torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-5, atol=1e-6)
        reach = generator_reach(vocoder.config.hifigan_config) * vocoder.config.hop_length
        assert early >= len(whole) - reach - 3 * len(whole) // len(units) - 640


def test_the_reach_is_needed():
    """One frame less of context and the pieces differ: the bound is not loose by much."""
    vocoder = build_vocoder(durations=False)
    units = torch.randint(0, 1000, (70,), generator=torch.Generator().manual_seed(0)).tolist()
    whole = vocoder.synthesize(units)
    speaker = vocoder.start_stream()
    speaker._reach //= 2
    cut = torch.cat([*(speaker.push([unit]) for unit in units), speaker.push([], is_last=True)])
    assert (cut - whole).abs().max() > 1e-5


def test_nothing_said_is_no_sound():
    assert build_vocoder().start_stream().push([], is_last=True).shape == (0,)


@pytest.mark.parametrize("options", ({}, {"predict_durations": False}))
def test_options_are_those_of_synthesize(options):
    """Voices by name or by number, and durations."""
    names = {"num_speakers": 3, "speakers": ["ann", "bob", "cy"], "num_styles": 2, "styles": ["calm", "loud"]}
    vocoder, units = tiny_vocoder(**names), [3, 8, 1, 1, 9, 4, 4, 2]
    whole = vocoder.synthesize(units, "bob", "loud", **options)
    assert (whole - vocoder.synthesize(units, **options)).abs().max() > 1e-3
    for speaker, style in (("bob", "loud"), (1, 1)):
        stream = vocoder.start_stream(speaker, style, **options)
        pieces = [stream.push(units[:5]), stream.push(units[5:], is_last=True)]
        torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="speaker: expected a number or one of .*'dee'"):
        vocoder.start_stream("dee")
