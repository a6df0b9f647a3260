"""Streamed decoding gives what decoding the whole gives, in every packetisation."""

from itertools import combinations

import pytest
import torch
from tiny_speechtokenizer import tiny_codec
from torch import Tensor

from hf_speechllm.models.configuration_speechtokenizer import SpeechTokenizerConfig
from hf_speechllm.models.modeling_speechtokenizer import SpeechTokenizerModel


# Kernels and dilations that look further to the left than to the right, or not at all; odd and even strides.
SHAPES = [
    {},
    {"hidden_act": "snake", "upsampling_ratios": [5, 3], "num_lstm_layers": 2},
    {"residual_kernel_size": 4, "num_residual_layers": 2, "upsampling_ratios": [3, 1, 2]},
    {"residual_kernel_size": 1, "num_lstm_layers": 0, "use_bidirectional_lstm": False},
    {"residual_kernel_size": 2, "dilation_growth_rate": 3, "num_residual_layers": 3, "upsampling_ratios": [2]},
]
every_shape = pytest.mark.parametrize("changes", SHAPES, ids=range(len(SHAPES)))


def random_codes(model: SpeechTokenizerModel, frames: int, batch: int = 1, levels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randint(model.config.codebook_size, (batch, levels, frames), generator=generator)


@torch.no_grad()
def stream(model: SpeechTokenizerModel, pieces: list[Tensor], **options) -> Tensor:
    """All samples of the pieces, the last of which ends the stream."""
    state, audio = None, []
    for index, piece in enumerate(pieces):
        samples, state = model.decode_stream(piece, state, is_last=index == len(pieces) - 1, **options)
        audio.append(samples)
    assert state is None
    return torch.cat(audio, dim=-1)


def cut(codes: Tensor, borders: tuple[int, ...]) -> list[Tensor]:
    return list(codes.tensor_split(borders, dim=-1))


@every_shape
@torch.no_grad()
def test_every_packetisation_of_a_stream(changes):
    """All 32 ways to cut 6 frames; pieces without frames among them; two streams at once."""
    model = tiny_codec(**changes)
    codes = random_codes(model, 6, batch=2)
    whole = model.decode(codes).audio_values
    for count in range(6):
        for borders in combinations(range(1, 6), count):
            streamed = stream(model, cut(codes, borders))
            torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-6)
    for borders in ((0, 0, 3, 3, 6), (6,), (0, 6, 6)):
        torch.testing.assert_close(stream(model, cut(codes, borders)), whole, rtol=0, atol=1e-6)


@every_shape
@torch.no_grad()
def test_short_streams(changes):
    """One to four frames, fewer than the edges that are reflected."""
    model = tiny_codec(**changes)
    for frames in range(1, 5):
        codes = random_codes(model, frames)
        whole = model.decode(codes).audio_values
        for size in range(1, frames + 1):
            streamed = stream(model, list(codes.split(size, dim=-1)))
            torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-6)


@every_shape
@torch.no_grad()
def test_samples_come_as_late_as_the_property_says(changes):
    """Not a sample later, and not one that a later code could still change."""
    model = tiny_codec(**changes)
    hop, frames = model.config.hop_length, 40
    codes = random_codes(model, frames)
    samples, state = model.decode_stream(codes[..., :30])
    assert samples.shape[-1] == 30 * hop - model.decoder_lookahead
    other = codes.clone()
    other[..., 30:] = (other[..., 30:] + 1) % model.config.codebook_size
    ready = samples.shape[-1]
    changed = (model.decode(other).audio_values - model.decode(codes).audio_values)[0, 0].abs()
    assert not changed[:ready].any()
    # The very next sample needs the next code.
    assert changed[ready : ready + hop].max() > 1e-7
    rest, _ = model.decode_stream(codes[..., 30:], state, is_last=True)
    assert ready + rest.shape[-1] == frames * hop


def test_lookahead_of_the_published_shape():
    with torch.device("meta"):
        model = SpeechTokenizerModel(SpeechTokenizerConfig())
    assert model.decoder_lookahead == 1203
    assert model.decoder_lookahead_ms == pytest.approx(75.19, abs=0.01)


@torch.no_grad()
def test_state_is_a_value():
    """A state can be used twice: two continuations of one beginning."""
    model = tiny_codec()
    beginning = random_codes(model, 5)
    _, state = model.decode_stream(beginning)
    for frames in (3, 4):
        ending = random_codes(model, frames)
        whole = model.decode(torch.cat((beginning, ending), dim=-1)).audio_values
        rest, _ = model.decode_stream(ending, state, is_last=True)
        torch.testing.assert_close(rest, whole[..., -rest.shape[-1] :], rtol=0, atol=1e-6)


@torch.no_grad()
def test_levels_of_a_stream():
    model = tiny_codec()
    codes = random_codes(model, 9, levels=2)
    whole = model.decode(codes, first_quantizer=1).audio_values
    streamed = stream(model, list(codes.split(2, dim=-1)), first_quantizer=1)
    torch.testing.assert_close(streamed, whole, rtol=0, atol=1e-6)


def test_stream_refuses_padding_and_ends_empty():
    model = tiny_codec()
    with pytest.raises(ValueError, match="audio_codes: expected no padding in a stream, got -1"):
        model.decode_stream(torch.full((1, 3, 2), -1))
    samples, state = model.decode_stream(torch.zeros(1, 3, 0, dtype=torch.long), is_last=True)
    assert samples.shape == (1, 1, 0) and state is None
