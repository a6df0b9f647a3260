"""Units are drawn, text is not: alone and in batches, with every cache, in the pipeline and piece by piece."""

import pytest
import torch
from tiny_speechgpt_lm import FIRST_UNIT, NUM_UNITS, build_model, build_tokenizer
from transformers import LogitsProcessor, LogitsProcessorList, set_seed

from hf_speechllm.models.greedy_text import GreedyText
from hf_speechllm.models.pipeline_speechgpt_lm import SpeechGptPipeline
from hf_speechllm.models.processing_speechgpt_lm import SpeechGptProcessor
from hf_speechllm.models.ras_sampling import RasSettings, RepetitionAwareSampling, SeededDraw


START, END = FIRST_UNIT + NUM_UNITS, FIRST_UNIT + NUM_UNITS + 1
# Ids below are special or stand for bytes.
FIRST_TEXT = 259
PROMPTS = ("hello", "what are the causes of climate change?", "<sosp><1><2><3><eosp>")
SAMPLING = {"do_sample": True, "temperature": 2.0, "top_k": 0, "top_p": 0.9}


class Turns(LogitsProcessor):
    """Six pieces of text and then eight units, in turns; which ones is left to the model."""

    def __init__(self, prompt_length: int) -> None:
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = (input_ids.shape[1] - self.prompt_length) % 16
        allowed = torch.zeros(scores.shape[1], dtype=torch.bool)
        if place == 6:
            allowed[START] = True
        elif place == 15:
            allowed[END] = True
        elif place < 6:
            allowed[FIRST_TEXT:FIRST_UNIT] = True
        else:
            allowed[FIRST_UNIT:START] = True
        return scores.masked_fill(~allowed, float("-inf"))


@pytest.fixture(scope="module")
def model():
    return build_model()


def generate(model, *processors: LogitsProcessor, prompts=PROMPTS, seed: int = 0, **options):
    """New ids `(prompts, 48)`: three turns of each kind."""
    inputs = SpeechGptProcessor(build_tokenizer())(list(prompts))
    length = inputs["input_ids"].shape[1]
    set_seed(seed)
    found = model.generate(
        **inputs,
        **{**SAMPLING, "max_new_tokens": 48, "pad_token_id": 0, **options},
        logits_processor=LogitsProcessorList([Turns(length), *processors]),
    )
    return found[:, length:]


def test_text_is_that_of_greedy_search_and_units_follow_the_seed(model):
    greedy = generate(model, do_sample=False, temperature=None, top_k=None, top_p=None)
    greedy_text = GreedyText(START, END)
    one, same, other = (generate(model, greedy_text, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    # Up to the first unit nothing is drawn; after it the text depends on the units.
    assert torch.equal(one[:, :7], greedy[:, :7]) and torch.equal(other[:, :7], greedy[:, :7])
    for row in range(len(PROMPTS)):
        assert not torch.equal(one[row, 7:15], other[row, 7:15])
        assert not torch.equal(one[row, 7:15], greedy[row, 7:15])
    # Without it the text is drawn as well.
    assert not torch.equal(generate(model)[:, :6], greedy[:, :6])


def test_only_in_speech_there_is_a_choice(model):
    """Each row by itself: speech that is open, closed, opened again, only in another row, or behind padding."""
    rows = [
        ([0, 0, 5, START], True),
        ([START, 420, END, 5], False),
        ([START, END, START, 421], True),
        ([5, 6, 7, END], False),
        ([0, 300, 301, 302], False),
    ]
    scores = torch.randn(len(rows), 1426, generator=torch.Generator().manual_seed(0))
    scores[:, 3] = float("-inf")
    found = GreedyText(START, END)(torch.tensor([ids for ids, _ in rows]), scores)
    for row, (_, speaks) in enumerate(rows):
        if speaks:
            assert torch.equal(found[row], scores[row])
        else:
            assert torch.isfinite(found[row]).nonzero().flatten().tolist() == [int(scores[row].argmax())]
    # `generate` has no ids yet where the prompt was given as embeddings.
    assert torch.isfinite(GreedyText(START, END)(torch.zeros(2, 0, dtype=torch.long), scores[:2])).sum() == 2


def test_units_may_have_a_sampling_of_their_own(model):
    """Repetition-aware sampling forbids a unit that was the last one; text is not touched."""
    settings = RasSettings(top_p=0.9, top_k=25, window=1, threshold=1.0)
    drawn = RepetitionAwareSampling(settings, 0, FIRST_UNIT, NUM_UNITS + 2, temperature=0.05)
    options = {"temperature": 1.0, "top_p": 1.0}
    found = generate(model, GreedyText(START, END, drawn), **options)
    assert torch.equal(found[:, :7], generate(model, GreedyText(START, END))[:, :7])
    spoken = found.unflatten(1, (3, 16))[:, :, 7:15]
    assert (spoken >= FIRST_UNIT).all() and (spoken < START).all()
    assert (spoken[..., 1:] != spoken[..., :-1]).all()
    cold = generate(model, GreedyText(START, END), temperature=0.05, top_p=1.0).unflatten(1, (3, 16))[:, :, 7:15]
    assert (cold[..., 1:] == cold[..., :-1]).any()


def test_a_batch_is_one_by_one_up_to_the_draw(model):
    """With a generator per row, and so in a padded batch what alone."""
    plain = {"temperature": 1.0, "top_p": 1.0}

    def generators(*seeds: int) -> SeededDraw:
        return SeededDraw([torch.Generator().manual_seed(seed) for seed in seeds])

    together = generate(model, GreedyText(START, END), generators(0, 1, 2), **plain)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, GreedyText(START, END), generators(row), prompts=[prompt], **plain)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("options", ({"cache_implementation": "static"}, {"use_cache": False}))
def test_any_cache_gives_the_same(model, options):
    expected = generate(model, GreedyText(START, END))
    assert torch.equal(generate(model, GreedyText(START, END), **options), expected)


def test_the_ids_are_the_tokenizers():
    found = GreedyText.of(build_tokenizer())
    assert (found.start_of_speech_id, found.end_of_speech_id) == (START, END)
    tokenizer = build_tokenizer()
    tokenizer.get_vocab = lambda: {"<sosp>": 0}
    with pytest.raises(ValueError, match="<eosp>"):
        GreedyText.of(tokenizer)


def test_the_pipeline_draws_units_alone_also_piece_by_piece(model):
    pipe = SpeechGptPipeline(model=model, processor=SpeechGptProcessor(build_tokenizer()), greedy_text=True)
    length = pipe.processor("hello")["input_ids"].shape[1]
    options = {**SAMPLING, "max_new_tokens": 48, "logits_processor": [Turns(length)]}
    results = []
    for seed in (0, 1):
        set_seed(seed)
        results.append(pipe("hello", **options))
    first, second = (result["raw"].replace(" ", "").split("<sosp>")[0] for result in results)
    assert first == second and results[0]["units"] != results[1]["units"]
    set_seed(1)
    pieces = list(pipe.stream("hello", **options))
    assert [unit for piece in pieces for unit in piece.units] == results[1]["units"]
    set_seed(1)
    drawn = pipe("hello", greedy_text=False, **options)["raw"].replace(" ", "").split("<sosp>")[0]
    assert drawn != first
    assert "logits_processor" not in pipe._generate_options("speech", {"greedy_text": False})
