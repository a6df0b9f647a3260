"""Training sequences of CosyVoice's language models."""

import pytest
import torch
from tiny_cosyvoice_lm import END_OF_PROMPT, QWEN, SPEECH_SIZE, TEXT_SIZE, TRANSFORMER

from hf_speechllm.data.cosyvoice_lm_examples import (
    IGNORED,
    SpeakerLmCollator,
    SpeakerLmDataset,
    SpeechLmCollator,
    SpeechLmDataset,
    SpeechPair,
    can_interleave,
    one_stream,
    preference_rows,
    two_streams,
)
from hf_speechllm.models.configuration_cosyvoice_lm import CosyVoiceLmConfig
from hf_speechllm.models.configuration_cosyvoice_transformer_lm import CosyVoiceTransformerLmConfig
from hf_speechllm.train.preference_log_probs import answer_log_probs, dpo_loss


CONFIG = CosyVoiceLmConfig(version=2, **QWEN)
SPEECH = [TEXT_SIZE + (token % SPEECH_SIZE) for token in range(40)]
SPOKEN = [token % SPEECH_SIZE for token in range(40)]


def test_one_stream():
    example = one_stream(CONFIG, [3, 4], SPOKEN[:3], [9])
    assert example.input_ids == [
        CONFIG.start_token_id,
        9,
        3,
        4,
        CONFIG.task_token_id,
        *SPEECH[:3],
        CONFIG.end_token_id,
    ]
    assert example.labels == [IGNORED] * 5 + [*SPEECH[:3], CONFIG.end_token_id]


@pytest.mark.parametrize("words", (0, 3, 5, 7, 10))
def test_two_streams_by_hand(words):
    """Every block of 5 words is followed by 15 tokens of speech; fill is a label, never an input."""
    text, instruct = list(range(1, words + 1)), [30, END_OF_PROMPT]
    example = two_streams(CONFIG, text, SPOKEN, instruct)
    fill, end, task = CONFIG.fill_token_id, CONFIG.end_token_id, CONFIG.task_token_id
    inputs, labels = [CONFIG.start_token_id, *instruct], [IGNORED] * 3
    for block in range(words // 5):
        spoken = SPEECH[15 * block : 15 * block + 15]
        # The label of the first word of a block is what the last speech before it is to say.
        labels += [fill if block else IGNORED, *[IGNORED] * 4, *spoken]
        inputs += [*text[5 * block : 5 * block + 5], *spoken]
    rest, speech = text[words // 5 * 5 :], SPEECH[words // 5 * 15 :]
    inputs += [*rest, task, *speech, end]
    labels += [fill if words >= 5 else IGNORED, *[IGNORED] * len(rest), *speech, end]
    assert example.input_ids == inputs and example.labels == labels
    assert fill not in example.input_ids


def test_too_little_speech_is_not_divided():
    assert can_interleave(CONFIG, [1] * 5, SPOKEN[:16]) and not can_interleave(CONFIG, [1] * 5, SPOKEN[:15])
    assert can_interleave(CONFIG, [], [])
    with pytest.raises(ValueError, match="speech_ids"):
        two_streams(CONFIG, [1] * 5, SPOKEN[:15])


@pytest.mark.parametrize(("text", "speech"), [([TEXT_SIZE], [1]), ([-1], [1]), ([1], [SPEECH_SIZE])])
def test_ids_out_of_range_are_refused(text, speech):
    for layout in (one_stream, two_streams):
        with pytest.raises(ValueError, match="_ids: expected 0"):
            layout(CONFIG, text, speech * 5)


def test_layout_is_drawn_anew_in_each_epoch_and_the_same_in_each_run():
    pairs = [SpeechPair((1, 2, 3, 4, 5), tuple(SPOKEN)), SpeechPair((1, 2, 3, 4, 5), tuple(SPOKEN[:4]))] * 40
    runs = []
    for _ in range(2):
        data = SpeechLmDataset(pairs, CONFIG, seed=3)
        epochs = []
        for epoch in range(3):
            data.set_epoch(epoch)
            epochs.append([CONFIG.fill_token_id in data[index]["labels"] for index in range(len(data))])
        runs.append(epochs)
    assert runs[0] == runs[1] and runs[0][0] != runs[0][1] != runs[0][2]
    for epoch in runs[0]:
        assert not any(epoch[1::2]) and 10 < sum(epoch[::2]) < 30
    assert not any(CONFIG.fill_token_id in item["labels"] for item in SpeechLmDataset(pairs, CONFIG, 0.0))


def test_collator_pads_on_the_right():
    data = SpeechLmDataset([SpeechPair((1, 2), (3,)), SpeechPair((1,), (3, 4, 5))], CONFIG, 0.0)
    batch = SpeechLmCollator(pad_token_id=0)([data[0], data[1]])
    assert batch["attention_mask"].tolist() == [[1] * 6 + [0], [1] * 7]
    assert batch["input_ids"][0, -1] == 0 and batch["labels"][0, -1] == IGNORED
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}


def test_speaker_is_withheld_by_chance():
    config = CosyVoiceTransformerLmConfig(**TRANSFORMER)
    pairs = [SpeechPair((1, 2), (3, 4), (9,), tuple(float(i) for i in range(192)))] * 60
    data = SpeakerLmDataset(pairs, config, speaker_dropout=0.3)
    known = [item["speaker_mask"] for item in data]
    assert 30 < sum(known) < 55
    batch = SpeakerLmCollator()([data[index] for index in range(60)])
    assert batch["labels"][0].tolist() == [3, 4, SPEECH_SIZE] and batch["text_ids"][0].tolist() == [9, 1, 2]
    assert batch["speaker_mask"].tolist() == known
    withheld = batch["speaker_embedding"][batch["speaker_mask"] == 0]
    assert (withheld == 0).all() and batch["speaker_embedding"].shape == (60, 192)
    assert SpeakerLmDataset([SpeechPair((1,), (2,))], config)[0]["speaker_mask"] == 0


def test_preference_rows_share_their_prompt():
    pairs = [SpeechPair((1, 2), (3, 4), rejected_speech_ids=(5,)), SpeechPair((1,), (2,))]
    start, task, end = CONFIG.start_token_id, CONFIG.task_token_id, CONFIG.end_token_id
    assert preference_rows(pairs, CONFIG) == [
        {
            "prompt_ids": [start, 1, 2, task],
            "chosen_ids": [TEXT_SIZE + 3, TEXT_SIZE + 4, end],
            "rejected_ids": [TEXT_SIZE + 5, end],
        }
    ]


def test_log_probabilities_of_answers():
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 4, 5), torch.tensor([[-100, 2, 4, -100], [1, -100, -100, -100]])
    log_probs = logits.log_softmax(dim=-1)
    sums = torch.stack([log_probs[0, 1, 2] + log_probs[0, 2, 4], log_probs[1, 0, 1]])
    torch.testing.assert_close(answer_log_probs(logits, targets), sums)
    torch.testing.assert_close(answer_log_probs(logits, targets, "mean"), sums / torch.tensor([2.0, 1.0]))
    inverted = torch.stack([log_probs[0, [0, 3], 0].mean(), log_probs[1, 1:, 0].mean()])
    torch.testing.assert_close(answer_log_probs(logits, targets, compatibility="upstream"), inverted)
    for bad in ({"reduction": "max"}, {"compatibility": "x"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            answer_log_probs(logits, targets, **bad)


def test_dpo_loss_prefers_the_chosen():
    reference = torch.tensor([-5.0])
    even = dpo_loss(reference, reference, reference, reference, beta=0.1)
    assert even.loss == pytest.approx(0.693147, abs=1e-5) and even.chosen_rewards == 0
    better = dpo_loss(reference + 1, reference - 1, reference, reference, beta=0.1)
    assert better.loss < even.loss and better.chosen_rewards > 0 > better.rejected_rewards
    smoothed = dpo_loss(reference + 1, reference - 1, reference, reference, beta=0.1, label_smoothing=0.5)
    assert smoothed.loss > better.loss
