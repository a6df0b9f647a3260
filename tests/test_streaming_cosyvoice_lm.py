"""Text that arrives token by token: the answer is that of the training layout, whatever comes when."""

import contextlib

import pytest
import torch
from tiny_cosyvoice_lm import END_OF_PROMPT, SPEECH_SIZE, build_qwen

from hf_speechllm.models.ras_sampling import RasSettings
from hf_speechllm.models.silent_tokens import SilentRun, drop_long_silence, drop_long_silences
from hf_speechllm.models.streaming_cosyvoice_lm import finish_text, push_text, start_text_stream


TEXT = [5, 9, 13, 2, 33, 21, 8, 40, 3, 17, 50, 6, 31]
qwen_versions = pytest.mark.parametrize("version", (2, 3))


def prompt(version: int, words: int) -> list[int]:
    return ([7, 11, END_OF_PROMPT] if version == 3 else []) + list(range(20, 20 + words))


def say(model, pieces: list[list[int]], **options) -> tuple[list[int], list[torch.Tensor]]:
    stream = start_text_stream(model, output_logits=True, **options)
    spoken = [token for piece in pieces for token in push_text(model, stream, piece)]
    spoken += list(finish_text(model, stream))
    assert stream.finished and len(spoken) == stream.num_speech
    return spoken, stream.logits


def layout(model, text: list[int], history: list[int], words_before: list[int], speech_before: list[int]) -> list[int]:
    """The training sequence in which the model said `history` (fill included, the end left out)."""
    config = model.config
    ids, text = [config.start_token_id], [*words_before, *text]
    if config.version == 3:
        cut = text.index(END_OF_PROMPT) + 1
        ids, text = ids + text[:cut], text[cut:]
    first = config.first_speech_token_id
    speech, blocks = list(speech_before), []
    while speech and len(text) >= 5:
        ids += [*text[:5], *(first + token for token in speech[:15])]
        text, speech = text[5:], speech[15:]
    spoken = iter(history)
    if not speech_before:
        ids, text = ids + text[:5], text[5:]
    for token in spoken:
        if token == config.fill_token_id - first:
            if len(text) < 5:
                break
            ids, text = ids + text[:5], text[5:]
        else:
            blocks.append(token)
            ids.append(first + token)
            if len(blocks) == len([entry for entry in history if entry < SPEECH_SIZE]):
                break
    return ids


@qwen_versions
@pytest.mark.parametrize("speech_before", (0, 19, 30))
def test_every_division_of_the_text_gives_the_same(version, speech_before):
    model = build_qwen(version, seed=3)
    options = {
        "prompt_text_ids": prompt(version, 8 if speech_before else 0),
        "prompt_speech_ids": [(7 * step) % SPEECH_SIZE for step in range(speech_before)],
        "do_sample": False,
        "max_token_text_ratio": 5,
    }
    divisions = [[[token] for token in TEXT], [TEXT], [TEXT[:1], TEXT[1:8], [], TEXT[8:]], [TEXT[:7], TEXT[7:]]]
    results = [say(model, pieces, **options) for pieces in divisions]
    for spoken, logits in results[1:]:
        assert spoken == results[0][0]
        for one, other in zip(logits, results[0][1], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert 5 < len(results[0][0]) <= 5 * len(TEXT) and max(results[0][0]) < SPEECH_SIZE


@qwen_versions
def test_streams_do_not_share_anything(version):
    """Two answers, token by token in turns, are the answers alone; the draws come from their own generators."""
    model = build_qwen(version, seed=5)
    texts = [TEXT, TEXT[::-1][:11]]
    settings = {"prompt_text_ids": prompt(version, 0), "max_token_text_ratio": 6}

    def fresh(seed: int) -> dict:
        return {**settings, "generator": torch.Generator().manual_seed(seed)}

    alone = [say(model, [text], **fresh(seed))[0] for seed, text in enumerate(texts)]
    streams = [start_text_stream(model, **fresh(seed)) for seed in range(2)]
    spoken: list[list[int]] = [[], []]
    for step in range(13):
        for number, text in enumerate(texts):
            spoken[number].extend(push_text(model, streams[number], text[step : step + 1]))
    ends = [finish_text(model, stream) for stream in streams]
    running = {0, 1}
    while running:
        for number in sorted(running):
            token = next(ends[number], None)
            spoken[number].append(token) if token is not None else running.discard(number)
    assert spoken == alone and alone[0] != alone[1]


@qwen_versions
def test_history_is_a_training_sequence(version):
    """Without prompt speech: 5 text, 15 speech at most, fill; and the model reads exactly that layout."""
    model = build_qwen(version, seed=1)
    config = model.config
    stream = start_text_stream(model, prompt(version, 0), do_sample=False, output_logits=True)
    spoken = list(push_text(model, stream, TEXT[:10]))
    fill = config.fill_token_id - config.first_speech_token_id
    assert stream.history.count(fill) == 2 and stream.history[-1] == fill and stream.awaits_text
    cuts = [index for index, token in enumerate(stream.history) if token == fill]
    assert all(end - start <= 16 for start, end in zip([-1, *cuts], cuts, strict=False))
    ids = layout(model, TEXT[:10], stream.history, prompt(version, 0), [])
    with torch.no_grad():
        logits = model(torch.tensor([ids]), speech_logits_only=True).logits[0]
    assert stream.cache.get_seq_length() == len(ids)
    # The last logits are those at the last speech token, where fill was due.
    torch.testing.assert_close(logits[-1], stream.logits[-1], rtol=1e-4, atol=1e-4)
    assert [token for token in stream.history if token != fill] == spoken


@qwen_versions
def test_end_of_the_text_while_the_model_waits(version):
    """Default: rest of the text and task follow; upstream reads its last input twice."""
    model = build_qwen(version, seed=1)
    reads = []
    for compatibility in (None, "upstream"):
        stream = start_text_stream(model, prompt(version, 0), do_sample=False, compatibility=compatibility)
        if compatibility and version == 3:
            # Upstream begins without text.
            assert not stream.awaits_text
            continue
        list(push_text(model, stream, TEXT[:5]))
        before = stream.cache.get_seq_length()
        end = finish_text(model, stream)
        next(end, None)
        reads.append(stream.cache.get_seq_length() - before)
    assert reads == ([1, 2] if version == 2 else [1])


@qwen_versions
def test_prompt_speech_that_short_text_cannot_use_up(version):
    model = build_qwen(version, seed=2)
    speech = [(3 * step) % SPEECH_SIZE for step in range(40)]
    lengths = {}
    for compatibility in (None, "upstream"):
        stream = start_text_stream(
            model, prompt(version, 4), speech, do_sample=False, compatibility=compatibility, max_token_text_ratio=1
        )
        assert list(push_text(model, stream, [5, 6])) == []
        # Upstream fails when a token beyond the codebook is drawn; what was read until then is what counts here.
        with contextlib.suppress(ValueError):
            next(finish_text(model, stream), None)
        lengths[compatibility] = stream.cache.get_seq_length()
    # One block of 5 + 15; upstream drops the other 25.
    assert lengths[None] - lengths["upstream"] == 25


def test_nothing_but_speech_comes_out():
    """With a head that prefers the tokens beyond the codebook, upstream fails and ours goes on."""
    for version, bad in ((2, SPEECH_SIZE + 1), (3, SPEECH_SIZE + 7)):
        model = build_qwen(version)
        with torch.no_grad():
            model.model.norm.weight.zero_()
            model.lm_head.weight.zero_()
            if version == 2:
                model.lm_head.bias.zero_()
                model.lm_head.bias[bad] = 9.0
        options = {"prompt_text_ids": prompt(version, 0), "max_token_text_ratio": 3}
        spoken, _ = say(model, [TEXT], generator=torch.Generator().manual_seed(0), **options)
        assert spoken and max(spoken) < SPEECH_SIZE
        if version == 2:
            with pytest.raises(ValueError, match=f"said {bad}"):
                say(model, [TEXT], do_sample=False, compatibility="upstream", **options)


def test_misuse_is_refused():
    model = build_qwen(3)
    with pytest.raises(ValueError, match="endofprompt"):
        start_text_stream(model, [1, 2])
    with pytest.raises(ValueError, match="compatibility"):
        start_text_stream(model, [END_OF_PROMPT], compatibility="sideways")
    with pytest.raises(ValueError, match="speech_ids"):
        start_text_stream(model, [END_OF_PROMPT], [SPEECH_SIZE])
    stream = start_text_stream(model, [END_OF_PROMPT], sampling=RasSettings(), max_token_text_ratio=1)
    list(push_text(model, stream, [3]))
    list(finish_text(model, stream))
    for call in (lambda: list(push_text(model, stream, [3])), lambda: list(finish_text(model, stream))):
        with pytest.raises(ValueError, match="not ended"):
            call()


def test_long_silence_is_dropped_in_any_pieces():
    tokens, silent = [1, 2, 1, 1, 2, 1, 2, 9, 1, 1, 8], [1, 2]
    expected = [1, 2, 1, 9, 1, 1, 8]
    assert list(drop_long_silence(tokens, silent, 3)) == expected
    for cut in range(len(tokens)):
        run = SilentRun()
        pieces = [list(drop_long_silence(piece, silent, 3, run)) for piece in (tokens[:cut], tokens[cut:])]
        assert pieces[0] + pieces[1] == expected
    ids = torch.tensor([tokens, [9] + [1] * 5 + [0] * 5])
    mask = torch.tensor([[1] * 11, [1] * 6 + [0] * 5])
    shorter, real = drop_long_silences(ids, mask, silent, 3)
    assert shorter.tolist() == [expected, [9, 1, 1, 1, 0, 0, 0]] and real.sum(dim=1).tolist() == [7, 4]
