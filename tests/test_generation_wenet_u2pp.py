"""`generate`: four decodings against plain re-implementations; batch = alone; n-best, penalties, hot words, errors."""

import itertools
import math

import pytest
import torch
from tiny_wenet_u2pp import pad, pad_labels, tiny_features, tiny_model

from hf_speechllm.models.ctc import ctc_prefix_beam_search, token_borders
from hf_speechllm.models.generation_wenet_u2pp import DECODINGS


LENGTHS = (90, 61, 131, 33, 7, 3)
FIELDS = ("sequences", "token_timestamps", "token_confidences", "token_frames")


def model_that_ends(variant: str = "u2pp", **changes):
    """A model whose left decoder says eos now and then, so that hypotheses of several lengths compete."""
    model = tiny_model(variant, **changes)
    with torch.no_grad():
        model.decoder_head.bias[model.config.eos_token_id] += 1.5
    return model


def contains(tokens: list[int], phrase: list[int]) -> bool:
    return any(tokens[i : i + len(phrase)] == phrase for i in range(len(tokens)))


# -- an item of a batch equals the item alone -------------------------------------------------------------------------
@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize(
    "variant", ["u2pp", "moe", "lite", "one decoder", "non-causal", "other ids", "tied", "ctc only"]
)
def test_alone_equals_in_a_batch(variant, decoding):
    if variant == "ctc only" and decoding.startswith("attention"):
        pytest.skip("needs a decoder")
    model = tiny_model(variant)
    if model.decoder_head is not None:
        model = model_that_ends(variant)
    pieces = tiny_features(*LENGTHS)
    options = {"decoding": decoding, "num_beams": 4, "return_dict_in_generate": True, "length_penalty": 0.4}
    options |= {"num_return_sequences": 1 if decoding == "ctc_greedy" else 2, "hotwords": [[3, 4], [5]]}
    count = options["num_return_sequences"]
    alone = [model.generate(**pad([piece]), **options) for piece in pieces]
    for order in (range(6), [5, 2, 0, 4, 1, 3]):
        batch = model.generate(**pad([pieces[i] for i in order], extra=5), **options)
        assert batch.sequences.shape[0] == 6 * count
        for place, i in enumerate(order):
            rows = slice(place * count, (place + 1) * count)
            width = alone[i].sequences.shape[1]
            assert torch.equal(batch.sequences_lengths[rows], alone[i].sequences_lengths)
            for name in FIELDS:
                torch.testing.assert_close(batch[name][rows, :width], alone[i][name], atol=1e-4, rtol=1e-4, msg=name)
            for name in ("scores", "confidences"):
                torch.testing.assert_close(batch[name][rows], alone[i][name], atol=5e-4, rtol=1e-4, msg=name)
    lengths = {tuple(output.sequences_lengths.tolist()) for output in alone}
    assert len(lengths) > 2, "the items should differ"


@pytest.mark.parametrize("decoding", DECODINGS)
def test_format_of_the_output(decoding):
    model, inputs = model_that_ends(), pad(tiny_features(*LENGTHS))
    options = {"decoding": decoding, "length_penalty": 1.0}
    output = model.generate(**inputs, **options, return_dict_in_generate=True)
    plain = model.generate(**inputs, **options)
    assert torch.equal(plain, output.sequences) and plain.dtype == torch.int64
    assert torch.equal(model.generate(**inputs, **options, return_timestamps=True).sequences, plain)
    frames = model.model.encoder.output_lengths(torch.tensor(LENGTHS)).clamp_min(0)
    for row, length in enumerate(output.sequences_lengths.tolist()):
        assert output.sequences[row, length:].tolist() == [0] * (plain.shape[1] - length)
        assert bool((output.token_frames[row, length:] == -1).all())
        assert bool((output.token_timestamps[row, length:] == 0).all())
        peaks, stamps = output.token_frames[row, :length].tolist(), output.token_timestamps[row, :length]
        assert peaks == sorted(peaks) and all(0 <= peak < int(frames[row]) for peak in peaks)
        expected = token_borders(peaks, LENGTHS[row] * 0.01, 0.04)
        torch.testing.assert_close(stamps, torch.tensor(expected).reshape(length, 2))
        assert bool(
            ((output.token_confidences[row, :length] > 0) & (output.token_confidences[row] <= 1)[:length]).all()
        )
        assert 0 < float(output.confidences[row]) <= 1
    assert output.sequences_lengths.max() > 2


def test_default_decoding():
    inputs = pad(tiny_features(90, 131))
    for variant, decoding in (("u2pp", "attention_rescoring"), ("ctc only", "ctc_prefix_beam_search")):
        model = tiny_model(variant)
        output = model.generate(**inputs, return_dict_in_generate=True)
        explicit = model.generate(**inputs, decoding=decoding, return_dict_in_generate=True)
        assert torch.equal(output.sequences, explicit.sequences) and torch.equal(output.scores, explicit.scores)


def test_missing_mask_means_no_padding():
    model, (features,) = tiny_model(), tiny_features(90)
    for decoding in DECODINGS:
        without = model.generate(features[None], decoding=decoding, return_dict_in_generate=True)
        with_mask = model.generate(**pad([features]), decoding=decoding, return_dict_in_generate=True)
        for name in FIELDS:
            assert torch.equal(without[name], with_mask[name])


# -- each method against its definition -------------------------------------------------------------------------------
def log_probs_of(model, inputs, **options) -> list[torch.Tensor]:
    """CTC log-probabilities of each item's real frames."""
    with torch.no_grad():
        output = model(**inputs, **options)
    return [
        logits[mask].log_softmax(-1) for logits, mask in zip(output.logits, output.encoder_attention_mask, strict=True)
    ]


def test_greedy_is_the_best_path():
    model, inputs = tiny_model(), pad(tiny_features(*LENGTHS))
    output = model.generate(**inputs, decoding="ctc_greedy", return_dict_in_generate=True)
    for row, log_probs in enumerate(log_probs_of(model, inputs)):
        best, labels = log_probs.max(-1)
        tokens = [label for label, _ in itertools.groupby(labels.tolist()) if label != 0]
        length = len(tokens)
        assert output.sequences[row, :length].tolist() == tokens and output.sequences_lengths[row] == length
        assert float(output.scores[row]) == pytest.approx(float(best.sum()), abs=1e-3)
        peaks = output.token_frames[row, :length]
        torch.testing.assert_close(output.token_confidences[row, :length], best[peaks].exp(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("beam", [1, 3, 20])
def test_prefix_beam_search_is_that_of_the_log_probabilities(beam):
    model, inputs = tiny_model(), pad(tiny_features(*LENGTHS))
    output = model.generate(
        **inputs,
        decoding="ctc_prefix_beam_search",
        num_beams=beam,
        num_return_sequences=beam,
        return_dict_in_generate=True,
    )
    for row, log_probs in enumerate(log_probs_of(model, inputs)):
        (expected,) = ctc_prefix_beam_search(log_probs[None], torch.tensor([len(log_probs)]), beam, 0)
        for rank in range(beam):
            index, pick = row * beam + rank, min(rank, len(expected.tokens) - 1)
            length = int(output.sequences_lengths[index])
            assert output.sequences[index, :length].tolist() == expected.tokens[pick]
            assert output.token_frames[index, :length].tolist() == expected.frames[pick]
            assert float(output.scores[index]) == pytest.approx(expected.scores[pick], abs=1e-3)


def teacher_forced(model, decoder, head, tokens: list[int], memory: torch.Tensor) -> list[float]:
    """Log-probability of each token and of eos, one hypothesis at a time."""
    config = model.config
    inputs = torch.tensor([[config.bos_token_id, *tokens]])
    hidden = decoder(inputs, decoder.project_memory(memory)).last_hidden_state
    log_probs = head(hidden)[0].log_softmax(-1)
    return [float(log_probs[i, token]) for i, token in enumerate([*tokens, config.eos_token_id])]


@pytest.mark.parametrize("ctc_weight,reverse_weight", [(0.5, None), (0.0, 0.0), (0.3, 0.5), (2.0, 1.0)])
@pytest.mark.parametrize("variant", ["u2pp", "moe", "lite", "one decoder"])
@torch.no_grad()
def test_rescoring_is_teacher_forcing_of_each_hypothesis(variant, ctc_weight, reverse_weight):
    model, pieces = tiny_model(variant), tiny_features(*LENGTHS[:4])
    options = {"num_beams": 5, "num_return_sequences": 5, "return_dict_in_generate": True}
    output = model.generate(**pad(pieces), ctc_weight=ctc_weight, reverse_weight=reverse_weight, **options)
    reverse = model.config.reverse_weight if reverse_weight is None else reverse_weight
    use_right = reverse > 0 and variant != "one decoder"
    for row, piece in enumerate(pieces):
        encoded = model(**pad([piece]))
        memory = encoded.encoder_last_hidden_state
        if variant == "lite":
            memory = memory[:, encoded.logits[0].argmax(-1) != 0]
        (first_pass,) = ctc_prefix_beam_search(
            encoded.logits.log_softmax(-1), torch.tensor([encoded.logits.shape[1]]), 5, 0
        )
        candidates = []
        for tokens, ctc_score, frames in zip(first_pass.tokens, first_pass.scores, first_pass.frames, strict=True):
            left = teacher_forced(model, model.model.decoder, model.decoder_head, tokens, memory)
            attention, confidences = sum(left), [math.exp(p) for p in left[:-1]]
            if use_right:
                right = teacher_forced(
                    model, model.model.right_decoder, model.right_decoder_head, tokens[::-1], memory
                )
                attention = (1 - reverse) * attention + reverse * sum(right)
                confidences = [(c + math.exp(p)) / 2 for c, p in zip(confidences, right[-2::-1], strict=True)]
            total = attention + ctc_weight * ctc_score
            candidates.append((total, tokens, frames, math.exp(attention / (len(tokens) + 1)), confidences))
        candidates.sort(key=lambda candidate: candidate[0], reverse=True)
        for rank, (total, tokens, frames, confidence, confidences) in enumerate(candidates):
            index, length = row * 5 + rank, len(tokens)
            assert output.sequences[index, :length].tolist() == tokens
            assert output.token_frames[index, :length].tolist() == frames
            assert float(output.scores[index]) == pytest.approx(total, abs=1e-3)
            assert float(output.confidences[index]) == pytest.approx(confidence, abs=1e-4)
            assert output.token_confidences[index, :length].tolist() == pytest.approx(confidences, abs=1e-4)


def test_rescoring_changes_the_order_somewhere():
    model, inputs = tiny_model(), pad(tiny_features(*LENGTHS))
    first = model.generate(**inputs, decoding="ctc_prefix_beam_search", return_dict_in_generate=True)
    second = model.generate(**inputs, ctc_weight=0.1, return_dict_in_generate=True)
    assert any(
        a[:m].tolist() != b[:n].tolist()
        for a, m, b, n in zip(
            first.sequences, first.sequences_lengths, second.sequences, second.sequences_lengths, strict=True
        )
    )


@torch.no_grad()
def plain_attention_beam_search(model, features: torch.Tensor, beam: int, penalty: float) -> list[tuple]:
    """One utterance, the whole prefix decoded anew at every step; `(tokens, score)` best first."""
    config, eos = model.config, model.config.eos_token_id
    memory = model(**pad([features])).encoder_last_hidden_state
    decoder = model.model.decoder
    hypotheses = [([config.bos_token_id], 0.0, False)]
    for _ in range(memory.shape[1]):
        if all(ended for _, _, ended in hypotheses):
            break
        candidates = []
        for tokens, score, ended in hypotheses:
            if ended:
                candidates.append(([*tokens, eos], score, True))
                continue
            hidden = decoder(torch.tensor([tokens]), decoder.project_memory(memory)).last_hidden_state[:, -1]
            top = model.decoder_head(hidden)[0].log_softmax(-1).topk(min(beam, config.vocab_size))
            for value, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                candidates.append(([*tokens, token], score + value, token == eos))
        candidates.sort(key=lambda candidate: candidate[1], reverse=True)
        hypotheses = candidates[:beam]
    finished = []
    for tokens, score, _ in hypotheses:
        length = sum(token != eos for token in tokens)
        value = score / length**penalty if length else (score if penalty == 0 else -math.inf)
        finished.append(([token for token in tokens[1:] if token != eos], value))
    return sorted(finished, key=lambda pair: pair[1], reverse=True)


@pytest.mark.parametrize("beam,penalty", [(1, 0.0), (3, 0.0), (3, 1.0), (5, 0.5), (20, 0.3)])
@pytest.mark.parametrize("variant", ["u2pp", "moe", "other ids", "post-norm", "grouped queries"])
def test_attention_search_is_that_without_cache(variant, beam, penalty):
    model, pieces = model_that_ends(variant), tiny_features(*LENGTHS[:4])
    output = model.generate(
        **pad(pieces),
        decoding="attention",
        num_beams=beam,
        length_penalty=penalty,
        num_return_sequences=beam,
        return_dict_in_generate=True,
    )
    texts = set()
    for row, piece in enumerate(pieces):
        expected = plain_attention_beam_search(model, piece, beam, penalty)
        for rank, (tokens, score) in enumerate(expected):
            index = row * beam + rank
            length = int(output.sequences_lengths[index])
            assert output.sequences[index, :length].tolist() == tokens
            assert float(output.scores[index]) == pytest.approx(score, abs=1e-3)
        texts |= {tuple(tokens) for tokens, _ in expected}
    assert len(texts) > min(beam, 4) and len({len(text) for text in texts}) > 1


@torch.no_grad()
def test_attention_confidences_are_the_decoders():
    model, (features,) = model_that_ends(), tiny_features(90)
    output = model.generate(**pad([features]), decoding="attention", num_beams=3, return_dict_in_generate=True)
    tokens = output.sequences[0].tolist()
    memory = model(**pad([features])).encoder_last_hidden_state
    left = teacher_forced(model, model.model.decoder, model.decoder_head, tokens, memory)
    assert output.token_confidences[0].tolist() == pytest.approx([math.exp(p) for p in left[:-1]], abs=1e-4)
    assert float(output.confidences[0]) == pytest.approx(math.exp(sum(left) / len(left)), abs=1e-4)


def test_length_penalty_favours_long_hypotheses():
    model, inputs = model_that_ends(), pad(tiny_features(*LENGTHS[:4]))
    lengths = [
        int(model.generate(**inputs, decoding="attention", num_beams=5, length_penalty=p, return_dict_in_generate=True)
            .sequences_lengths.sum())
        for p in (0.0, 1.0, 3.0)
    ]  # fmt: skip
    assert lengths[0] <= lengths[1] <= lengths[2] and lengths[0] < lengths[2]


def test_blank_penalty_is_taken_from_the_logit():
    model, inputs = tiny_model(), pad(tiny_features(90, 61))
    with torch.no_grad():
        output = model(**inputs)
        logits = output.logits.clone()
        logits[..., 0] -= 1.5
        actual = model.ctc_log_probs(output.encoder_last_hidden_state, blank_penalty=1.5)
    real = output.encoder_attention_mask
    torch.testing.assert_close(actual[real], logits.log_softmax(-1)[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("decoding", ["ctc_greedy", "ctc_prefix_beam_search", "attention_rescoring"])
def test_blank_penalty_brings_more_tokens(decoding):
    model, inputs = tiny_model(), pad(tiny_features(*LENGTHS[:4]))
    # The decoders of the second pass know no blank: they get no say here.
    options = {"decoding": decoding, "ctc_weight": 100.0, "return_dict_in_generate": True}
    lengths = [
        model.generate(**inputs, **options, blank_penalty=p).sequences_lengths.sum() for p in (-20.0, 0.0, 20.0)
    ]
    assert lengths[0] < lengths[1] < lengths[2]
    assert lengths[0] == 0


# -- n-best -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("decoding", DECODINGS[1:])
def test_n_best(decoding):
    model, pieces = model_that_ends(), tiny_features(90, 61, 131)
    one = model.generate(**pad(pieces), decoding=decoding, num_beams=6, return_dict_in_generate=True)
    many = model.generate(
        **pad(pieces), decoding=decoding, num_beams=6, num_return_sequences=6, return_dict_in_generate=True
    )
    for row in range(3):
        rows = slice(6 * row, 6 * row + 6)
        lengths = many.sequences_lengths[rows].tolist()
        texts = [tuple(r[:n]) for r, n in zip(many.sequences[rows].tolist(), lengths, strict=True)]
        assert texts[0] == tuple(one.sequences[row, : lengths[0]].tolist())
        assert float(many.scores[6 * row]) == float(one.scores[row])
        assert many.scores[rows].tolist() == sorted(many.scores[rows].tolist(), reverse=True)
        assert len(set(texts)) == 6


def test_fewer_hypotheses_than_asked_for():
    model = tiny_model()
    output = model.generate(**pad(tiny_features(3, 90)), num_return_sequences=10, return_dict_in_generate=True)
    assert output.sequences_lengths[:10].tolist() == [0] * 10
    assert output.sequences.shape[0] == 20 and int(output.sequences_lengths[10]) > 0


# -- hot words --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("end", ["resort", "upstream"])
@pytest.mark.parametrize("decoding", ["ctc_prefix_beam_search", "attention_rescoring"])
def test_hot_words_bring_their_phrase(decoding, end):
    model, inputs = tiny_model(), pad(tiny_features(90, 131))
    beam = {"decoding": "ctc_prefix_beam_search", "num_beams": 10, "num_return_sequences": 10}
    nbest = [[t for t in row if t] for row in model.generate(**inputs, **beam).tolist()]
    for row in range(2):
        best, *others = nbest[10 * row : 10 * row + 10]
        pairs = [other[i : i + 2] for other in others for i in range(len(other) - 1)]
        phrase = next(pair for pair in pairs if not contains(best, pair))
        single = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        options = {"decoding": decoding, "num_beams": 10, "hotwords_end": end, "ctc_weight": 5.0}
        plain = model.generate(**single, **options)[0].tolist()
        weak = model.generate(**single, **options, hotwords=[phrase], hotwords_score=0.0)[0].tolist()
        strong = model.generate(**single, **options, hotwords=[phrase], hotwords_score=30.0)[0].tolist()
        assert weak == plain
        assert contains(strong, phrase)
        against = model.generate(**single, **options, hotwords=[phrase], hotwords_score=-30.0)[0].tolist()
        assert not contains(against, phrase)


def test_no_hot_words_are_none():
    model, inputs = tiny_model(), pad(tiny_features(90))
    assert torch.equal(model.generate(**inputs, hotwords=[]), model.generate(**inputs))


# -- alignment of a known text ----------------------------------------------------------------------------------------
def test_align_returns_the_text():
    model, inputs = tiny_model(), pad(tiny_features(90, 61, 131))
    rows = [[3, 3, 5], [], [2, 7, 7, 7, 1]]
    paths = model.align(inputs["input_features"], pad_labels(rows), inputs["attention_mask"])
    for path, row, log_probs in zip(paths.tolist(), rows, log_probs_of(model, inputs), strict=True):
        assert [label for label, _ in itertools.groupby(path) if label] == row
        assert not any(path[len(log_probs) :])
    with pytest.raises(ValueError, match="item 0 has 1 frames, its labels need 3"):
        model.align(tiny_features(7)[0][None], torch.tensor([[4, 4]]))


# -- errors -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "variant,options,message",
    [
        ("u2pp", {"decoding": "beam"}, "expected one of .*'beam'"),
        ("ctc only", {"decoding": "attention"}, "needs a decoder"),
        ("ctc only", {"decoding": "attention_rescoring"}, "needs a decoder"),
        ("u2pp", {"num_return_sequences": 4, "num_beams": 3}, "num_beams=3 cannot give 4"),
        ("u2pp", {"decoding": "ctc_greedy", "num_return_sequences": 2}, "cannot give 2"),
        ("u2pp", {"hotwords_end": "never"}, "hotwords_end.*'never'"),
    ],
)
def test_impossible_requests_are_refused(variant, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(variant).generate(**pad(tiny_features(30)), **options)
