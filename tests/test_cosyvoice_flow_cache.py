"""What a stream of CosyVoice's flow keeps: bounded, in half precision, and with streams that join and leave."""

import pytest
import torch
from tiny_cosyvoice_flow import Speech, batch_inputs, pad_rows, speech, tiny_flow

from hf_speechllm.models import causal_token_to_mel
from hf_speechllm.models.causal_cache import CausalCache, chunk_visibility
from hf_speechllm.models.causal_token_to_mel import gather_streams


TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
STEPS = 2
every_version = pytest.mark.parametrize("version", (2, 3))


def streamed(model, item: Speech, size: int, **options) -> torch.Tensor:
    state, pieces = model.start_stream(**item.prompt(), num_steps=STEPS, **options), []
    for done in range(0, item.tokens.shape[1], size):
        tokens = item.tokens[:, done : done + size]
        piece, state = model.stream_mel(state, tokens, is_last=done + size >= item.tokens.shape[1])
        pieces.append(piece.mel)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("left", (-1, 0, 1, 2))
def test_visible_chunks_are_upstreams(left):
    """Against the loop of `subsequent_chunk_mask_deprecated` of `cosyvoice/utils/mask.py`, whole and in steps."""
    size, chunk = 11, 3
    expected = torch.zeros(size, size, dtype=torch.bool)
    for i in range(size):
        start = 0 if left < 0 else max((i // chunk - left) * chunk, 0)
        expected[i, start : min((i // chunk + 1) * chunk, size)] = True
    visible = chunk_visibility([0], [size], chunk, torch.device("cpu"), left)
    assert torch.equal(visible[0, 0], expected)
    for start, count in ((0, 6), (6, 3), (6, 5), (9, 2)):
        first = 0 if left < 0 else max(start // chunk - left, 0) * chunk
        step = chunk_visibility([start], [count], chunk, torch.device("cpu"), left, [first])
        part = expected[start : start + count, first : start + count]
        assert part.all() if step is None else torch.equal(step[0, 0], part)


@every_version
@pytest.mark.parametrize("left", (0, 1, 3))
def test_a_bounded_stream_is_the_whole_with_the_same_left_chunks(version, left):
    model = tiny_flow(version)
    item = speech(model, 30, 9, seed=0)
    options = {"num_left_chunks": left}
    whole = model.generate_mel(item.tokens, **item.prompt(), streaming=True, num_steps=STEPS, **options).mel
    for size in (3, 40):
        torch.testing.assert_close(streamed(model, item, size, **options), whole, **TOLERANCE)
    unbounded = model.generate_mel(item.tokens, **item.prompt(), streaming=True, num_steps=STEPS).mel
    assert (whole - unbounded).abs().max() > 1e-3


@every_version
def test_left_chunks_of_a_padded_batch(version, monkeypatch):
    """As on a GPU, where rows are padded: those whose chunks are all padding stay finite and change nothing."""
    monkeypatch.setattr(causal_token_to_mel, "lengths_to_encode_apart", lambda features, mask: None)
    model = tiny_flow(version)
    rows = [speech(model, *lengths, seed=index) for index, lengths in enumerate(((30, 6), (3, 0)))]
    options = {"streaming": True, "num_steps": STEPS, "num_left_chunks": 1}
    output = model.generate_mel(**batch_inputs(rows), **options)
    for row, item in enumerate(rows):
        alone = model.generate_mel(item.tokens, **item.prompt(), **options).mel
        torch.testing.assert_close(output.mel[row][output.mel_mask[row]][None], alone, **TOLERANCE)


@every_version
def test_a_bounded_stream_does_not_grow(version):
    model = tiny_flow(version)
    item = speech(model, 60, 20, seed=0)
    state = model.start_stream(**item.prompt(), num_steps=STEPS, num_left_chunks=2)
    sizes = []
    for done in range(0, 60, 4):
        _, state = model.stream_mel(state, item.tokens[:, done : done + 4])
        sizes.append(state.num_bytes)
    assert len(set(sizes)) == 1
    # Two chunks of 8 frames, and the edges of the convolutions.
    edges = sum(t.nbytes for cache in (*state.encoder_caches, *state.step_caches) for t in cache.inputs.values())
    assert sizes[0] - edges == 16 * state.bytes_per_frame


@every_version
def test_memory_is_counted(version):
    model = tiny_flow(version)
    item = speech(model, 8, 0, seed=0)
    state = model.start_stream(**item.prompt(), num_steps=STEPS)
    assert state.num_bytes == 0 and state.bytes_per_frame == 0
    _, state = model.stream_mel(state, item.tokens)
    config = model.config
    inner = config.estimator_num_attention_heads * config.estimator_head_dim
    layers = {2: 3, 3: 2}[version]  # a layer in each of three stages; two layers
    expected = 2 * STEPS * layers * 2 * inner * 4
    if version == 2:  # layers at half the rate, and at the rate of the frames
        expected += 2 * config.hidden_size * 4 * (config.num_hidden_layers / 2 + config.num_upsampled_layers)
    assert state.bytes_per_frame == expected
    half = model.start_stream(**item.prompt(), num_steps=STEPS, cache_dtype=torch.bfloat16)
    _, half = model.stream_mel(half, item.tokens)
    assert half.bytes_per_frame == expected / 2 and half.num_bytes < state.num_bytes


@every_version
@pytest.mark.parametrize("left", (-1, 1))
def test_a_cache_in_half_precision(version, left):
    """Near the exact one, and the same however the tokens are cut."""
    model = tiny_flow(version)
    item = speech(model, 30, 9, seed=0)
    options = {"num_left_chunks": left}
    exact = streamed(model, item, 3, **options)
    for dtype, largest in ((torch.float16, 5e-3), (torch.bfloat16, 5e-2)):
        pieces, whole = (streamed(model, item, size, cache_dtype=dtype, **options) for size in (3, 40))
        # Where two ways of rounding meet, a key may fall on either side.
        assert 0 < (pieces - exact).abs().max() < largest
        assert (pieces - whole).abs().max() < largest
    with pytest.raises(ValueError, match="cache_dtype: expected a floating type"):
        model.start_stream(**item.prompt(), cache_dtype=torch.int8)


@every_version
@pytest.mark.parametrize("left", (-1, 1))
def test_streams_join_and_leave(version, left):
    """A row that begins later, and one that is taken out, change nothing for the others."""
    model = tiny_flow(version)
    rows = [speech(model, *lengths, seed=index) for index, lengths in enumerate(((21, 6), (9, 0), (17, 9)))]
    options = {"num_steps": STEPS, "num_left_chunks": left}
    state, pieces, done = None, {0: [], 1: [], 2: []}, [0, 0, 0]
    present: list[int] = []
    for step in range(7):
        if step in (0, 1, 3):
            new = {0: 0, 1: 1, 3: 2}[step]
            begun = model.start_stream(**rows[new].prompt(), **options)
            state = begun if state is None else gather_streams([state, begun], [list(range(len(present))), [0]])
            present.append(new)
        pushed = [rows[row].tokens[:, done[row] : done[row] + 5] for row in present]
        done = [done[row] + 5 * (row in present) for row in range(3)]
        endings = [done[row] >= rows[row].tokens.shape[1] for row in present]
        output, state = model.stream_mel(state, *pad_rows(pushed), is_last=endings)
        for index, row in enumerate(present):
            pieces[row].append(output.mel[index][output.mel_mask[index]])
        kept = [index for index, ended in enumerate(endings) if not ended]
        present = [present[index] for index in kept]
        state = gather_streams([state], [kept]) if kept else None
    assert not present
    for row, item in enumerate(rows):
        whole = model.generate_mel(
            item.tokens, **item.prompt(), streaming=True, num_steps=STEPS, num_left_chunks=left
        ).mel
        torch.testing.assert_close(torch.cat(pieces[row])[None], whole, **TOLERANCE)


def test_what_cannot_be_one_batch():
    model = tiny_flow(2)
    item = speech(model, 9, 3, seed=0)
    one, other = (model.start_stream(**item.prompt(), num_steps=steps) for steps in (1, 2))
    with pytest.raises(ValueError, match="num_steps: expected 1 in every state, got 2"):
        gather_streams([one, other], [[0], [0]])
    with pytest.raises(ValueError, match="rows: expected at least one stream"):
        gather_streams([one], [[]])
    noisy = model.start_stream(**item.prompt(), num_steps=1, noise=torch.zeros(1, 100, 8))
    with pytest.raises(ValueError, match="noise: expected in all states or in none"):
        gather_streams([one, noisy], [[0], [0]])
    with pytest.raises(ValueError, match="num_left_chunks: expected -1 without streaming"):
        model.generate_mel(item.tokens, **item.prompt(), num_left_chunks=1)


@every_version
def test_the_number_of_tokens_to_the_next_piece(version):
    """One less gives nothing, that many give frames."""
    model = tiny_flow(version)
    for prompt in (0, 3, 4, 7, 8):
        item = speech(model, 40, prompt, seed=prompt)
        state, done = model.start_stream(**item.prompt(), num_steps=1), 0
        for _ in range(3):
            (needed,) = model.tokens_to_next_piece(state)
            nothing, state = model.stream_mel(state, item.tokens[:, done : done + needed - 1])
            something, state = model.stream_mel(state, item.tokens[:, done + needed - 1 : done + needed])
            done += needed
            assert nothing.mel.shape[1] == 0 and something.mel.shape[1] > 0
        _, state = model.stream_mel(state, item.tokens[:, done:], is_last=True)
        assert model.tokens_to_next_piece(state) == [0]


def test_a_bounded_cache_keeps_what_is_visible():
    """Rows of different lengths, some without frames in a step, and steps of several chunks."""
    generator = torch.Generator().manual_seed(0)
    cache, seen = CausalCache([0, 0], chunk_size=2, num_left_chunks=1), [torch.zeros(0, 3), torch.zeros(0, 3)]
    for counts in ([6, 2], [0, 2], [4, 2], [2, 8], [1, 3]):
        new = torch.randn(2, max(counts), 3, generator=generator)
        cache.begin(counts, new.device)
        keys, _ = cache.extend_attention(0, new, new)
        for row, count in enumerate(counts):
            seen[row] = torch.cat([seen[row], new[row, :count]])
            kept = seen[row][cache.firsts[row] :]
            assert torch.equal(keys[row, : len(kept)], kept)
        cache.end()
        assert cache.firsts == [max(length // 2 - 1, 0) * 2 for length in cache.lengths]
    assert cache.keys[0].shape[1] <= 4
