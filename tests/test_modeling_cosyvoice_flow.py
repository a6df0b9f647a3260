"""CosyVoice's flows: an item of a batch equals the item alone, a stream the whole; and what training relies on."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_cosyvoice_flow import NO_DROPOUT, TINY, Speech, batch_inputs, pad_rows, speech, tiny_flow
from transformers import AutoModel

from hf_speechllm.hub import clean_process
from hf_speechllm.models import causal_token_to_mel, modeling_cosyvoice_flow
from hf_speechllm.models.causal_cache import CausalCache, chunk_visibility
from hf_speechllm.models.configuration_cosyvoice2_flow import CosyVoice2FlowConfig
from hf_speechllm.models.configuration_cosyvoice3_flow import CosyVoice3FlowConfig
from hf_speechllm.models.configuration_cosyvoice_flow import CosyVoiceFlowConfig
from hf_speechllm.models.flow_matching import FlowMatchingDraws, draw_flow_matching, fixed_noise, time_steps
from hf_speechllm.models.modeling_cosyvoice_flow import fade_in


VERSIONS = (1, 2, 3)
CAUSAL = (2, 3)
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
# Euler steps of the streams and their wholes, to save time.
STEPS = 4
every_version = pytest.mark.parametrize("version", VERSIONS)
every_causal_version = pytest.mark.parametrize("version", CAUSAL)
# Tokens and prompt tokens: shorter than a chunk, no prompt, more than version 1 stretches at once.
LENGTHS = ((5, 3), (17, 0), (46, 6))


def rows_of(model) -> list[Speech]:
    return [speech(model, *lengths, seed=index) for index, lengths in enumerate(LENGTHS)]


def noise_of(model) -> dict[str, torch.Tensor]:
    """Version 1 has no noise of its own."""
    if model.config.model_type != "cosyvoice_flow":
        return {}
    return {"noise": torch.randn(1, 120, model.config.num_mel_bins, generator=torch.Generator().manual_seed(9))}


@pytest.fixture
def padded_on_cpu(monkeypatch):
    """A CPU takes mixed lengths apart; here they are padded, as on a GPU."""
    for module in (causal_token_to_mel, modeling_cosyvoice_flow):
        monkeypatch.setattr(module, "lengths_to_encode_apart", lambda features, mask: None)


# -- alone and in a batch ---------------------------------------------------------------------------------------------
def check_batch_equals_alone(version: int, **options) -> None:
    model = tiny_flow(version)
    rows = rows_of(model)
    output = model.generate_mel(**batch_inputs(rows), **noise_of(model), **options)
    assert output.mel.dtype == torch.float32
    for row, item in enumerate(rows):
        alone = model.generate_mel(item.tokens, **item.prompt(), **noise_of(model), **options)
        assert bool(alone.mel_mask.all())
        frames = alone.mel.shape[1]
        assert output.mel_mask[row].tolist() == [True] * frames + [False] * (output.mel.shape[1] - frames)
        torch.testing.assert_close(output.mel[row, :frames], alone.mel[0], **TOLERANCE)
        assert not output.mel[row, frames:].any()


@every_version
def test_item_of_a_batch_equals_the_item_alone(version, padded_on_cpu):
    check_batch_equals_alone(version)


@every_version
def test_item_of_a_batch_taken_apart_equals_the_item_alone(version):
    check_batch_equals_alone(version)


@every_causal_version
def test_chunked_item_of_a_batch_equals_the_item_alone(version, padded_on_cpu):
    check_batch_equals_alone(version, streaming=True)


@every_version
def test_every_input_matters(version):
    model = tiny_flow(version)
    item, other = speech(model, 12, 5, seed=0), speech(model, 12, 5, seed=1)
    mel = model.generate_mel(item.tokens, **item.prompt(), **noise_of(model)).mel
    for name, value in (("token_ids", other.tokens), *((key, value) for key, value in other.prompt().items())):
        changed = {"token_ids": item.tokens, **item.prompt(), **noise_of(model)} | {name: value}
        assert (model.generate_mel(**changed).mel - mel).abs().max() > 1e-3, name
    doubled = {**item.prompt(), "speaker_embedding": 2 * item.speaker}
    again = model.generate_mel(item.tokens, **doubled, **noise_of(model)).mel
    torch.testing.assert_close(again, mel, **TOLERANCE)


@every_version
def test_noise_is_an_argument(version):
    model = tiny_flow(version)
    item = speech(model, 9, 4, seed=0)
    first, second, other = (
        model.generate_mel(item.tokens, **item.prompt(), generator=torch.Generator().manual_seed(seed)).mel
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second) and not torch.allclose(first, other)
    with pytest.raises(ValueError, match="noise: expected"):
        model.generate_mel(item.tokens, **item.prompt(), noise=torch.zeros(1, 2, 8))


@every_causal_version
def test_default_noise_is_fixed_and_leaves_the_global_generator_alone(version):
    model = tiny_flow(version)
    item = speech(model, 9, 4, seed=0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = model.generate_mel(item.tokens, **item.prompt()).mel
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, model.generate_mel(item.tokens, **item.prompt()).mel)


def test_fixed_noise_is_that_of_upstream_and_goes_on():
    torch.manual_seed(0)
    expected = torch.randn(1, 80, 15000)
    assert torch.equal(fixed_noise(15000, 80, torch.device("cpu")), expected.transpose(1, 2))
    longer = fixed_noise(15010, 80, torch.device("cpu"))
    assert torch.equal(longer[:, :15000], expected.transpose(1, 2))
    assert torch.equal(longer[:, 15000:], torch.randn(1, 80, 15000)[:, :, :10].transpose(1, 2))
    longer.zero_()
    assert fixed_noise(1, 80, torch.device("cpu")).any(), "what was given out is the memory of what is kept"


@every_version
def test_without_guidance_the_unconditional_half_is_not_computed(version):
    model = tiny_flow(version, guidance_scale=0.0)
    same = tiny_flow(version, guidance_scale=1e-12)
    item = speech(model, 9, 4, seed=0)
    sizes = []
    model.estimator.register_forward_pre_hook(lambda module, arguments: sizes.append(len(arguments[0])))
    mel = model.generate_mel(item.tokens, **item.prompt(), **noise_of(model)).mel
    assert sizes == [1] * 10
    torch.testing.assert_close(mel, same.generate_mel(item.tokens, **item.prompt(), **noise_of(model)).mel)


def test_time_steps_cover_the_way():
    for schedule in ("cosine", "linear"):
        steps = time_steps(7, schedule)
        assert steps[0][0] == 0.0 and sum(steps[-1]) == pytest.approx(1.0, abs=1e-6)
        assert sum(step for _, step in steps) == pytest.approx(1.0, abs=1e-6)
    assert [step for _, step in time_steps(4, "cosine")] == sorted(step for _, step in time_steps(4, "cosine"))
    with pytest.raises(ValueError, match="num_steps"):
        time_steps(0, "cosine")


# -- streams ----------------------------------------------------------------------------------------------------------
def streamed(model, item: Speech, sizes: list[int]) -> torch.Tensor:
    """The mel of a stream that gets `sizes` tokens at a time, the last size again and again."""
    state, pieces, done, step = model.start_stream(**item.prompt(), num_steps=STEPS), [], 0, 0
    while done < item.tokens.shape[1]:
        size = sizes[min(step, len(sizes) - 1)]
        is_last = done + size >= item.tokens.shape[1]
        piece, state = model.stream_mel(state, item.tokens[:, done : done + size], is_last=is_last)
        pieces.append(piece.mel)
        done, step = done + size, step + 1
    return torch.cat(pieces, dim=1)


@every_causal_version
@pytest.mark.parametrize("sizes", [[1], [4], [5], [7, 0, 1, 13], [100]], ids=str)
@pytest.mark.parametrize("lengths", [(30, 6), (30, 8), (21, 0), (2, 13), (1, 0)], ids=str)
def test_stream_equals_the_whole(version, sizes, lengths):
    model = tiny_flow(version)
    item = speech(model, *lengths, seed=3)
    whole = model.generate_mel(item.tokens, **item.prompt(), streaming=True, num_steps=STEPS).mel
    torch.testing.assert_close(streamed(model, item, sizes), whole, **TOLERANCE)


@every_causal_version
def test_a_stream_is_not_the_whole_without_chunks(version):
    """Otherwise the test above would say nothing about chunks."""
    model = tiny_flow(version)
    item = speech(model, 30, 6, seed=3)
    whole = model.generate_mel(item.tokens, **item.prompt(), num_steps=STEPS).mel
    assert (streamed(model, item, [5]) - whole).abs().max() > 1e-3


@every_causal_version
def test_pieces_come_as_soon_as_a_chunk_and_its_lookahead_are_there(version):
    model = tiny_flow(version)
    item = speech(model, 20, 5, seed=0)
    state, frames = model.start_stream(**item.prompt(), num_steps=1), []
    for index in range(20):
        piece, state = model.stream_mel(state, item.tokens[:, index : index + 1], is_last=index == 19)
        frames.append(piece.mel.shape[1])
    # 5 tokens of the prompt: the chunks of 4 end 3, 7, 11, … new tokens later, and are seen 3 tokens after that.
    expected = [0] * 20
    expected[5], expected[9], expected[13], expected[17], expected[19] = 6, 8, 8, 8, 10
    assert frames == expected


@every_causal_version
def test_hop_of_a_stream_does_not_change_that_of_the_next(version):
    """Upstream doubles the hop while it speaks, up to fourfold, in the model itself: later requests start with it."""
    model = tiny_flow(version)
    item = speech(model, 40, 0, seed=0)
    given = []
    for _ in range(2):
        state, frames = model.start_stream(**item.prompt(), num_steps=1), []
        for index in range(40):
            piece, state = model.stream_mel(state, item.tokens[:, index : index + 1], is_last=index == 39)
            frames.append(piece.mel.shape[1])
        given.append(frames)
    assert given[0] == given[1] and {count for count in given[0][:-1] if count} == {8}


@every_causal_version
def test_several_streams_in_one_batch(version):
    """Rows get different numbers of tokens in every step, and end at different times."""
    model = tiny_flow(version)
    rows = [speech(model, *lengths, seed=index) for index, lengths in enumerate(((30, 6), (3, 0), (19, 8)))]
    inputs = batch_inputs(rows)
    prompts = {name: value for name, value in inputs.items() if not name.startswith("token")}
    state = model.start_stream(**prompts, num_steps=STEPS)
    generator = torch.Generator().manual_seed(1)
    done, pieces = [0, 0, 0], [[], [], []]
    while done != [30, 3, 19]:
        pushed = []
        for row, item in enumerate(rows):
            size = int(torch.randint(0, 9, (), generator=generator))
            pushed.append(item.tokens[:, done[row] : done[row] + size])
            done[row] = min(done[row] + size, item.tokens.shape[1])
        ids, mask = pad_rows(pushed)
        endings = [done[row] == item.tokens.shape[1] for row, item in enumerate(rows)]
        output, state = model.stream_mel(state, ids, mask, is_last=endings)
        for row in range(3):
            pieces[row].append(output.mel[row][output.mel_mask[row]])
            assert not output.mel[row][~output.mel_mask[row]].any()
    for row, item in enumerate(rows):
        whole = model.generate_mel(item.tokens, **item.prompt(), streaming=True, num_steps=STEPS).mel
        torch.testing.assert_close(torch.cat(pieces[row])[None], whole, **TOLERANCE)


@every_causal_version
def test_work_of_a_stream_is_linear(version):
    """Every frame goes through the velocity network once per step, however long the history is."""
    model = tiny_flow(version)
    item = speech(model, 40, 8, seed=0)
    frames = []
    model.estimator.register_forward_pre_hook(lambda module, arguments: frames.append(arguments[0].shape[1]))
    streamed(model, item, [4])
    assert sum(frames) == STEPS * 2 * 48 and max(frames) <= 16


@every_causal_version
def test_a_voice_is_computed_once(version):
    """The complete chunks of the prompt belong to the beginning of the stream, which sentences share."""
    model = tiny_flow(version)
    item = speech(model, 9, 11, seed=0)
    voice = model.start_stream(**item.prompt(), num_steps=STEPS)
    assert voice.frames == [16]
    for seed in (1, 2):
        tokens = speech(model, 9, 0, seed=seed).tokens
        output, _ = model.stream_mel(voice.clone(), tokens, is_last=True)
        whole = model.generate_mel(tokens, **item.prompt(), streaming=True, num_steps=STEPS).mel
        torch.testing.assert_close(output.mel, whole, **TOLERANCE)


@every_causal_version
@pytest.mark.parametrize("frames", [0, 3, 9, 17])
def test_prompt_whose_mel_is_shorter_than_its_tokens(version, frames):
    """What is behind the mel is part of the output, as upstream has it."""
    model = tiny_flow(version)
    item = speech(model, 9, 11, seed=0)
    item.prompt_mel = item.prompt_mel[:, :frames]
    whole = model.generate_mel(item.tokens, **item.prompt(), streaming=True, num_steps=STEPS).mel
    assert whole.shape[1] == 40 - frames
    torch.testing.assert_close(streamed(model, item, [5]), whole, **TOLERANCE)


@every_causal_version
def test_a_cloned_state_continues_twice(version):
    model = tiny_flow(version)
    item = speech(model, 24, 6, seed=0)
    state = model.start_stream(**item.prompt())
    first, state = model.stream_mel(state, item.tokens[:, :12])
    fork = state.clone()
    other = speech(model, 12, 0, seed=7).tokens
    torch.testing.assert_close(
        torch.cat([first.mel, model.stream_mel(fork, other, is_last=True)[0].mel], dim=1),
        model.generate_mel(torch.cat([item.tokens[:, :12], other], dim=1), **item.prompt(), streaming=True).mel,
        **TOLERANCE,
    )
    torch.testing.assert_close(
        torch.cat([first.mel, model.stream_mel(state, item.tokens[:, 12:], is_last=True)[0].mel], dim=1),
        model.generate_mel(item.tokens, **item.prompt(), streaming=True).mel,
        **TOLERANCE,
    )


@every_causal_version
def test_stream_with_its_own_noise(version):
    model = tiny_flow(version)
    item = speech(model, 12, 4, seed=0)
    noise = torch.randn(1, 32, 8, generator=torch.Generator().manual_seed(0))
    whole = model.generate_mel(item.tokens, **item.prompt(), noise=noise, streaming=True).mel
    output, _ = model.stream_mel(model.start_stream(**item.prompt(), noise=noise), item.tokens, is_last=True)
    torch.testing.assert_close(output.mel, whole, **TOLERANCE)
    state = model.start_stream(**item.prompt(), noise=noise[:, :20])
    with pytest.raises(ValueError, match="noise: expected at least 32"):
        model.stream_mel(state, item.tokens, is_last=True)
    drawn = model.start_stream(**item.prompt(), generator=torch.Generator().manual_seed(4))
    assert not torch.allclose(model.stream_mel(drawn, item.tokens, is_last=True)[0].mel, whole)


@every_causal_version
def test_what_a_stream_refuses(version):
    model = tiny_flow(version)
    item = speech(model, 5, 4, seed=0)
    state = model.start_stream(**item.prompt())
    _, state = model.stream_mel(state, item.tokens, is_last=True)
    with pytest.raises(ValueError, match="after the end of the stream"):
        model.stream_mel(state, item.tokens)
    with pytest.raises(ValueError, match="expected 1 rows, got 2"):
        model.stream_mel(state, item.tokens.expand(2, -1))
    changes = {"estimator_chunk_size": 0, **({"encoder_chunk_size": 0} if version == 2 else {})}
    with pytest.raises(ValueError, match="estimator_chunk_size"):
        tiny_flow(version, **changes).start_stream(**item.prompt())


def test_version_2_streams_only_where_it_is_the_same_piece_by_piece():
    item = speech(tiny_flow(2), 5, 4, seed=0)
    for changes in ({"estimator_channels": [8, 8]}, {"estimator_chunk_size": 10}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            tiny_flow(2, **changes).start_stream(**item.prompt())


def test_caches_grow_without_losing_anything():
    """More frames than a cache holds at first, rows of different lengths."""
    cache, generator = CausalCache([0, 0], chunk_size=0), torch.Generator().manual_seed(0)
    expected: list[list[torch.Tensor]] = [[], []]
    for counts in ([200, 1], [100, 7], [0, 900], [3, 3]):
        new = torch.randn(2, max(counts), 4, generator=generator)
        cache.begin(counts, new.device)
        keys, values = cache.extend_attention(0, new, -new)
        inputs = cache.extend_convolution(0, new, 2)
        cache.end()
        for row, count in enumerate(counts):
            past = torch.cat([new.new_zeros(2, 4), *expected[row]])[-2:]
            expected[row].append(new[row, :count])
            whole = torch.cat(expected[row])
            assert torch.equal(keys[row, : len(whole)], whole) and torch.equal(values[row, : len(whole)], -whole)
            assert torch.equal(inputs[row, : 2 + count], torch.cat([past, new[row, :count]]))
    assert cache.lengths == [303, 911]


def test_visibility_of_a_step():
    assert chunk_visibility([8], [4], 4, torch.device("cpu")) is None
    assert chunk_visibility([0, 0], [9, 9], 0, torch.device("cpu")) is None
    visible = chunk_visibility([2, 0], [3, 1], 2, torch.device("cpu"))
    assert visible.shape == (2, 1, 3, 5)
    assert visible[0, 0].int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    # The second row has one frame; what is padding sees something, and nobody reads it.
    assert visible[1, 0].int().tolist() == [[1, 0, 0, 0, 0]] * 3


# -- version 1's overlapping pieces -----------------------------------------------------------------------------------
def test_overlapping_stream_is_upstreams_loop():
    """Pieces of `hop + 20` tokens that advance by `hop`, each started from the overlap of the last, then faded."""
    model = tiny_flow(1)
    item = speech(model, 97, 7, seed=0)
    noise = noise_of(model)["noise"]
    overlaps, tail, expected, waiting = None, None, [], item.tokens
    while waiting.shape[1] >= 30 + 20:
        output = model.generate_mel(waiting[:, :50], **item.prompt(), noise=noise, overlaps=overlaps)
        mel = output.mel if tail is None else fade_in(output.mel, tail)
        overlaps, tail, waiting = output.overlaps, mel[:, -34:], waiting[:, 30:]
        expected.append(mel[:, :-34])
    last = model.generate_mel(waiting, **item.prompt(), noise=noise, overlaps=overlaps)
    expected.append(fade_in(last.mel, tail))
    assert len(expected) == 3

    state, pieces = model.start_stream(**item.prompt(), hop_tokens=30), []
    for index in range(0, 97, 11):
        output, state = model.stream_mel(state, item.tokens[:, index : index + 11], index + 11 >= 97, noise)
        pieces.append(output.mel)
    assert torch.equal(torch.cat(pieces, dim=1), torch.cat(expected, dim=1))
    assert torch.cat(pieces, dim=1).shape[1] == pytest.approx(model.config.num_frames(97), abs=3)


def test_fade_is_a_hamming_window():
    mel, tail = torch.zeros(1, 6, 2), torch.ones(1, 4, 2)
    window = torch.tensor([0.08 + 0.92 * 0.5 * (1 - torch.cos(torch.tensor(2 * torch.pi * n / 7))) for n in range(8)])
    faded = fade_in(mel, tail)
    torch.testing.assert_close(faded[0, :4, 0], window[4:], rtol=0, atol=1e-5)
    assert not faded[0, 4:].any()
    assert fade_in(mel[:, :2], tail).shape == (1, 2, 2)


def test_overlap_ties_a_piece_to_the_one_before():
    model = tiny_flow(1)
    item = speech(model, 30, 7, seed=0)
    first = model.generate_mel(item.tokens, **item.prompt(), **noise_of(model))
    prompt_frames = item.prompt_mel.shape[1]
    assert first.overlaps[0].noise.shape == (prompt_frames + 34, 8)
    other = torch.randn(1, 120, 8, generator=torch.Generator().manual_seed(3))
    tied = model.generate_mel(item.tokens, **item.prompt(), noise=other, overlaps=first.overlaps)
    assert torch.equal(tied.overlaps[0].noise[:prompt_frames], first.overlaps[0].noise[:prompt_frames])
    assert not torch.equal(tied.mel, model.generate_mel(item.tokens, **item.prompt(), noise=other).mel)


# -- training ---------------------------------------------------------------------------------------------------------
def training_batch(model, lengths=((9, 16), (6, 11), (4, 7))) -> dict[str, torch.Tensor]:
    """Targets; those of versions 2 and 3 have as many frames as their tokens say."""
    generator = torch.Generator().manual_seed(0)
    ratio = None if model.config.model_type == "cosyvoice_flow" else model.config.token_mel_ratio
    tokens, mels = [], []
    for count, frames in lengths:
        tokens.append(torch.randint(30, (1, count), generator=generator))
        mels.append(torch.randn(1, ratio * count if ratio else frames, 8, generator=generator))
    ids, token_mask = pad_rows(tokens)
    mel, mel_mask = pad_rows(mels)
    return {
        "speech_token_ids": ids,
        "speech_token_mask": token_mask,
        "mel": mel,
        "mel_mask": mel_mask,
        "speaker_embedding": torch.randn(len(lengths), 6, generator=generator),
    }


def draws_for(batch: dict[str, torch.Tensor], **changes) -> FlowMatchingDraws:
    lengths = batch["mel_mask"].sum(dim=1)
    draws = draw_flow_matching(batch["mel"], lengths, 0.3, 0.5, 0.3, 0.0, torch.Generator().manual_seed(2))
    for name, value in changes.items():
        setattr(draws, name, value)
    return draws


def row_of(batch: dict[str, torch.Tensor], draws: FlowMatchingDraws, row: int) -> tuple[dict, FlowMatchingDraws]:
    tokens, frames = (int(batch[name][row].sum()) for name in ("speech_token_mask", "mel_mask"))
    alone = {name: value[row : row + 1] for name, value in batch.items()}
    for name, size in (("speech_token_ids", tokens), ("speech_token_mask", tokens), ("mel", frames)):
        alone[name] = alone[name][:, :size]
    alone["mel_mask"] = alone["mel_mask"][:, :frames]
    rows = slice(row, row + 1)
    return alone, FlowMatchingDraws(
        draws.times[rows],
        draws.noise[rows, :frames],
        draws.keep_conditions[rows],
        draws.prompt_frames[rows],
        draws.streaming,
    )


@every_version
def test_training_loss_of_a_batch_is_that_of_its_rows(version):
    """And with `padding="upstream"` it is not, where upstream lets padding leak."""
    model, upstream = tiny_flow(version), tiny_flow(version, padding="upstream")
    batch = training_batch(model)
    draws = draws_for(batch)
    with torch.no_grad():
        output, leaking = model(**batch, draws=draws), upstream(**batch, draws=draws)
        frames = batch["mel_mask"].sum(dim=1)
        losses = []
        for row in range(3):
            alone, its_draws = row_of(batch, draws, row)
            single = model(**alone, draws=its_draws)
            losses.append(single.loss)
            torch.testing.assert_close(output.velocity[row, : frames[row]], single.velocity[0], rtol=0, atol=2e-5)
    mean = (torch.stack(losses) * frames).sum() / frames.sum()
    torch.testing.assert_close(output.loss, mean, rtol=1e-5, atol=0)
    assert (abs(leaking.loss - output.loss) > 1e-5) == (version != 3)


@every_version
def test_loss_is_the_formula(version):
    """Squared error of x - (1 - sigma)z over real frames, at (1 - (1 - sigma)t)z + tx."""
    model = tiny_flow(version, sigma_min=0.1)
    batch = training_batch(model)
    draws = draws_for(batch)
    with torch.no_grad():
        output = model(**batch, draws=draws)
    mel, time, mask = batch["mel"], draws.times[:, None, None], batch["mel_mask"][..., None]
    torch.testing.assert_close(output.noisy, (1 - 0.9 * time) * draws.noise + time * mel)
    error = (output.velocity - (mel - 0.9 * draws.noise)) ** 2 * mask
    torch.testing.assert_close(output.loss, error.sum() / (mask.sum() * 8))
    for row, frames in enumerate(draws.prompt_frames.tolist()):
        assert torch.equal(output.prompt[row, :frames], mel[row, :frames]) and not output.prompt[row, frames:].any()


@every_version
def test_more_padding_changes_no_loss(version):
    """Two tokens of padding behind the longest row, and their frames."""
    model = tiny_flow(version)
    batch = training_batch(model)
    draws = draws_for(batch)
    wider = dict(batch)
    for name, width in (("speech_token_ids", 2), ("speech_token_mask", 2), ("mel_mask", 4)):
        wider[name] = torch.nn.functional.pad(batch[name], (0, width))
    wider["mel"] = torch.nn.functional.pad(batch["mel"], (0, 0, 0, 4), value=7.0)
    noise = torch.nn.functional.pad(draws.noise, (0, 0, 0, 4), value=3.0)
    with torch.no_grad():
        expected = model(**batch, draws=draws).loss
        torch.testing.assert_close(model(**wider, draws=draws_for(batch, noise=noise)).loss, expected)


@every_version
def test_rows_without_conditions_know_nothing(version):
    model = tiny_flow(version)
    batch = training_batch(model, lengths=((9, 16), (9, 16)))
    draws = draws_for(batch, keep_conditions=torch.tensor([False, True]), prompt_frames=torch.tensor([3, 3]))
    changed = {**batch, "speech_token_ids": (batch["speech_token_ids"] + 1) % 30}
    changed["speaker_embedding"] = -batch["speaker_embedding"]
    with torch.no_grad():
        before, after = model(**batch, draws=draws).velocity, model(**changed, draws=draws).velocity
    assert torch.equal(before[0], after[0])
    assert (before[1] - after[1]).abs().max() > 1e-3


@every_causal_version
def test_training_in_chunks_is_the_network_of_a_stream(version):
    model = tiny_flow(version)
    batch = training_batch(model, lengths=((20, 40),))
    with torch.no_grad():
        chunks, whole = (
            model(**batch, draws=draws_for(batch, streaming=streaming)).velocity for streaming in (True, False)
        )
    assert (chunks - whole).abs().max() > 1e-3


def test_draws_are_those_of_upstream():
    mel, lengths = torch.zeros(4000, 20, 1), torch.full((4000,), 20)
    draws = draw_flow_matching(mel, lengths, 0.2, 0.5, 0.3, 0.5, torch.Generator().manual_seed(0))
    assert draws.keep_conditions.float().mean() == pytest.approx(0.8, abs=0.03)
    assert draws.times.mean() == pytest.approx(0.5, abs=0.03) and draws.noise.std() == pytest.approx(1.0, abs=0.02)
    # No prompt in half of the rows, and in a seventh of the other half: both ends of 0..6 are included.
    assert (draws.prompt_frames == 0).float().mean() == pytest.approx(0.5 + 0.5 / 7, abs=0.03)
    assert sorted(set(draws.prompt_frames.tolist())) == [0, 1, 2, 3, 4, 5, 6]
    streaming = [
        draw_flow_matching(mel[:1], lengths[:1], 0.2, 0.5, 0.3, 0.5, torch.Generator().manual_seed(seed)).streaming
        for seed in range(200)
    ]
    assert 70 < sum(streaming) < 130


@every_version
def test_gradient_checkpointing_gives_the_same_gradients(version):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_flow(version, **NO_DROPOUT[version]).train()
        if checkpointing:
            # transformers renamed it in 5.23.
            old = model.gradient_checkpointing_enable
            getattr(model, "activation_checkpointing_enable", old)()
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        batch = training_batch(model)
        model(**batch, draws=draws_for(batch)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@every_version
def test_a_new_model_learns(version):
    torch.manual_seed(0)
    fresh = type(tiny_flow(version))(type(tiny_flow(version).config)(**TINY[version], **NO_DROPOUT[version])).train()
    batch = training_batch(fresh)
    draws = draws_for(batch)
    optimizer = torch.optim.Adam(fresh.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        loss = fresh(**batch, draws=draws).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], (losses[0], losses[-1])


@every_version
def test_lora_merged_equals_unmerged(version):
    from peft import LoraConfig, get_peft_model

    model = tiny_flow(version)
    item = speech(model, 9, 4, seed=0)
    before = model.generate_mel(item.tokens, **item.prompt(), **noise_of(model)).mel
    torch.manual_seed(1)
    tuned = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "v_proj", "fc1", "fc2"], init_lora_weights=False)
    )
    unmerged = tuned.generate_mel(item.tokens, **item.prompt(), **noise_of(model)).mel
    merged = tuned.merge_and_unload().generate_mel(item.tokens, **item.prompt(), **noise_of(model)).mel
    assert (unmerged - before).abs().max() > 1e-3
    torch.testing.assert_close(merged, unmerged, **TOLERANCE)


# -- folders ----------------------------------------------------------------------------------------------------------
@every_version
def test_saving_and_loading_changes_nothing(version, tmp_path):
    model = tiny_flow(version)
    model.save_pretrained(tmp_path / "one")
    loaded, loading = AutoModel.from_pretrained(tmp_path / "one", output_loading_info=True)
    assert type(loaded) is type(model) and not loading["missing_keys"] and not loading["unexpected_keys"]
    loaded.save_pretrained(tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes(), path.name
    item = speech(model, 9, 4, seed=0)
    assert torch.equal(
        loaded.eval().generate_mel(item.tokens, **item.prompt(), **noise_of(model)).mel,
        model.generate_mel(item.tokens, **item.prompt(), **noise_of(model)).mel,
    )


@every_version
def test_half_precision(version):
    model = tiny_flow(version)
    item = speech(model, 9, 4, seed=0)
    expected = model.generate_mel(item.tokens, **item.prompt(), **noise_of(model)).mel
    mel = model.to(torch.bfloat16).generate_mel(item.tokens, **item.prompt(), **noise_of(model)).mel
    assert mel.dtype == torch.float32
    assert (mel - expected).abs().mean() < 0.1 * expected.abs().mean()


# Loads folders by remote code; only transformers is there.
CLEAN = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("clean_process", sys.argv[1])
clean_process = importlib.util.module_from_spec(spec)
spec.loader.exec_module(clean_process)
sys.meta_path.insert(0, clean_process.PackageBlocker())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel
torch.set_num_threads(1)
found = {}
for number, folder in enumerate(sys.argv[3:]):
    inputs = load_file(folder + "/inputs.safetensors")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    found[str(number)] = model.generate_mel(**inputs).mel.contiguous()
save_file(found, sys.argv[2])
"""


def test_remote_code_gives_the_same(tmp_path):
    """In a fresh process without the package."""
    expected, folders = [], []
    for version in VERSIONS:
        model, folder = tiny_flow(version), tmp_path / f"v{version}"
        model.save_pretrained(folder)
        item = speech(model, 9, 4, seed=0)
        inputs = {"token_ids": item.tokens, **item.prompt(), **noise_of(model)}
        save_file(inputs, folder / "inputs.safetensors")
        expected.append(model.generate_mel(**inputs).mel)
        folders.append(str(folder))
    script = tmp_path / "clean.py"
    script.write_text(CLEAN, encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_"))}
    done = subprocess.run(
        [sys.executable, "-I", str(script), clean_process.__file__, str(tmp_path / "mels.safetensors"), *folders],
        env={**environment, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "mels.safetensors")
    for number, mel in enumerate(expected):
        torch.testing.assert_close(found[str(number)], mel, rtol=0, atol=1e-6)


# -- what is refused --------------------------------------------------------------------------------------------------
@every_version
def test_inputs_that_do_not_fit(version):
    model = tiny_flow(version)
    item = speech(model, 9, 4, seed=0)
    fitting = {"token_ids": item.tokens, **item.prompt(), **noise_of(model)}
    for changes, message in (
        ({"token_ids": item.tokens + 30}, "below 30"),
        ({"token_mask": torch.tensor([[0, *[1] * 8]])}, "real entries first"),
        ({"token_mask": torch.ones(1, 3)}, "token_mask: expected shape"),
        ({"prompt_mel": torch.zeros(1, 4, 7)}, "prompt_mel: expected"),
        ({"speaker_embedding": torch.zeros(1, 5)}, "speaker_embedding: expected"),
        ({"speaker_embedding": None}, "speaker_embedding: expected"),
        ({"prompt_token_ids": item.prompt_tokens.expand(2, -1)}, "prompt_token_ids: expected 1 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate_mel(**{**fitting, **changes})
    negative = model.generate_mel(**{**fitting, "token_ids": item.tokens.clamp(max=0) - 1}).mel
    assert torch.equal(negative, model.generate_mel(**{**fitting, "token_ids": item.tokens * 0}).mel)


def test_more_that_does_not_fit():
    causal, first = tiny_flow(2), tiny_flow(1)
    item = speech(causal, 2, 1, seed=0)
    with pytest.raises(ValueError, match="prompt_mel: expected at most"):
        causal.generate_mel(item.tokens, speaker_embedding=item.speaker, prompt_mel=torch.zeros(1, 9, 8))
    with pytest.raises(ValueError, match="expected at least 3 with more to come"):
        causal.generate_mel(item.tokens, speaker_embedding=item.speaker, is_last=False)
    nothing_yet = causal.generate_mel(
        item.tokens, prompt_token_ids=item.prompt_tokens, speaker_embedding=item.speaker, is_last=False
    )
    assert nothing_yet.mel.shape == (1, 0, 8)
    with pytest.raises(ValueError, match="tokens wherever prompt_mel has frames"):
        first.generate_mel(item.tokens, speaker_embedding=item.speaker, prompt_mel=torch.zeros(1, 9, 8))
    with pytest.raises(ValueError, match="mel: expected 18 frames"):
        causal(**{**training_batch(causal), "mel": torch.zeros(3, 17, 8)})
    with pytest.raises(ValueError, match="at least one token and one frame"):
        first(**{**training_batch(first), "mel_mask": torch.zeros(3, 16)})


@pytest.mark.parametrize(
    "kind, changes",
    [
        (CosyVoiceFlowConfig, {"estimator_channels": [12]}),
        (CosyVoiceFlowConfig, {"hidden_size": 12, "num_attention_heads": 5}),
        (CosyVoiceFlowConfig, {"regulator_groups": 3}),
        (CosyVoiceFlowConfig, {"padding": "none"}),
        (CosyVoice2FlowConfig, {"embedding_size": 8}),
        (CosyVoice2FlowConfig, {"time_schedule": "sine"}),
        (CosyVoice2FlowConfig, {"streaming_probability": 2.0}),
        (CosyVoice3FlowConfig, {"embedding_size": 512}),
        (CosyVoice3FlowConfig, {"estimator_hidden_size": 40}),
        (CosyVoice3FlowConfig, {"estimator_head_dim": 7}),
        (CosyVoice3FlowConfig, {"condition_dropout": -0.1}),
        (CosyVoice3FlowConfig, {"vocab_size": 0}),
    ],
    ids=lambda value: value.model_type if isinstance(value, type) else json.dumps(value),
)
def test_configurations_that_are_no_flow(kind, changes):
    with pytest.raises(ValueError, match=list(changes)[0].replace("num_attention_heads", "hidden_size")):
        kind(**changes)
