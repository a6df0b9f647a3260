"""Training sequences of CosyVoice's language models, and batches of them.

Upstream: `prepare_lm_input_target` of `cosyvoice/llm/llm.py`. Two layouts of a pair of text and speech, for versions 2
and 3:

* one stream: `start, instruction, text, task, speech, end`;
* two streams, for text that arrives while speech is produced: after the start (and the instruction) blocks of 5 text
  and 15 speech tokens, and at last the rest of the text, the task and the rest of the speech. At the end of a block's
  speech the model is to say *fill*: a label that is never an input.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_speechllm.models.configuration_cosyvoice_lm import CosyVoiceLmConfig
from hf_speechllm.models.configuration_cosyvoice_transformer_lm import CosyVoiceTransformerLmConfig
from hf_speechllm.models.prompts_cosyvoice_lm import speech_token_ids, text_token_ids


IGNORED = -100


@dataclass(frozen=True)
class SpeechPair:
    """What one utterance is made of.

    Args:
        text_ids: the words. speech_ids: from 0.
        instruct_ids: what comes before the words, up to `<|endofprompt|>`; version 3 wants one.
        speaker_embedding: 192 numbers, of version 1.
        rejected_speech_ids: a worse rendering of the same text, for preference learning.
    """

    text_ids: tuple[int, ...]
    speech_ids: tuple[int, ...]
    instruct_ids: tuple[int, ...] = ()
    speaker_embedding: tuple[float, ...] = ()
    rejected_speech_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class LmExample:
    """Ids and labels of one sequence, as a causal LM takes them: position `t` is compared with label `t + 1`."""

    input_ids: list[int]
    labels: list[int]


def one_stream(
    config: CosyVoiceLmConfig, text_ids: Sequence[int], speech_ids: Sequence[int], instruct_ids: Sequence[int] = ()
) -> LmExample:
    """`start, instruction, text, task, speech, end`; speech and end are learnt."""
    text = text_token_ids(config, [*instruct_ids, *text_ids])
    speech = [*speech_token_ids(config, speech_ids), config.end_token_id]
    prompt = [config.start_token_id, *text, config.task_token_id]
    return LmExample([*prompt, *speech], [*[IGNORED] * len(prompt), *speech])


def can_interleave(config: CosyVoiceLmConfig, text_ids: Sequence[int], speech_ids: Sequence[int]) -> bool:
    """Whether there is enough speech to fill a block for every full block of text."""
    text_part, speech_part = config.mix_ratio
    return not text_ids or len(speech_ids) / len(text_ids) > speech_part / text_part


def two_streams(
    config: CosyVoiceLmConfig, text_ids: Sequence[int], speech_ids: Sequence[int], instruct_ids: Sequence[int] = ()
) -> LmExample:
    """Blocks of text and speech; speech, fill and end are learnt.

    Raises:
        ValueError: too little speech, see `can_interleave`.
    """
    if not can_interleave(config, text_ids, speech_ids):
        raise ValueError(
            f"speech_ids: expected more than {config.mix_ratio[1]} tokens for {config.mix_ratio[0]} of text, "
            f"got {len(speech_ids)} for {len(text_ids)}"
        )
    text_part, speech_part = config.mix_ratio
    text, speech = text_token_ids(config, text_ids), speech_token_ids(config, speech_ids)
    inputs = [config.start_token_id, *text_token_ids(config, instruct_ids)]
    # What each input is to predict; the labels are these, one place to the right.
    targets = [IGNORED] * len(inputs)
    blocks = len(text) // text_part
    for block in range(blocks):
        spoken = speech[block * speech_part : (block + 1) * speech_part]
        inputs += [*text[block * text_part : (block + 1) * text_part], *spoken]
        targets += [*[IGNORED] * (text_part - 1), *spoken, config.fill_token_id]
    text, speech = text[blocks * text_part :], speech[blocks * speech_part :]
    inputs += [*text, config.task_token_id, *speech, config.end_token_id]
    targets += [*[IGNORED] * len(text), *speech, config.end_token_id]
    return LmExample(inputs, [IGNORED, *targets])


class PairDataset(Dataset):
    """Pairs, and a number for each that is drawn anew in each epoch that `set_epoch` tells."""

    def __init__(self, pairs: Sequence[SpeechPair], seed: int) -> None:
        self.pairs, self.seed, self.epoch = pairs, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by `Trainer` at the start of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.pairs)

    def draw(self, index: int) -> float:
        """In [0, 1), the same in each run."""
        return random.Random(f"{self.seed}:{self.epoch}:{index}").random()


class SpeechLmDataset(PairDataset):
    """Pairs as sequences of version 2 or 3.

    Args:
        pairs ([`SpeechPair`]s), config ([`CosyVoiceLmConfig`]).
        two_stream_probability (`float`): share of the pairs with enough speech that get blocks (upstream: 0.5).
        seed (`int`): of that choice, see [`PairDataset`].
    """

    def __init__(
        self,
        pairs: Sequence[SpeechPair],
        config: CosyVoiceLmConfig,
        two_stream_probability: float = 0.5,
        seed: int = 0,
    ) -> None:
        super().__init__(pairs, seed)
        self.config, self.two_stream_probability = config, two_stream_probability

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        pair = self.pairs[index]
        blocks = self.draw(index) < self.two_stream_probability
        blocks = blocks and can_interleave(self.config, pair.text_ids, pair.speech_ids)
        example = (two_streams if blocks else one_stream)(
            self.config, pair.text_ids, pair.speech_ids, pair.instruct_ids
        )
        return {"input_ids": example.input_ids, "labels": example.labels}


@dataclass(frozen=True)
class SpeechLmCollator:
    """Examples of versions 2 and 3 to a batch, padded on the right."""

    pad_token_id: int

    def __call__(self, examples: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` (1 = real), `labels`, each `(batch, longest)` int64."""
        inputs = [example["input_ids"] for example in examples]
        return {
            "input_ids": _pad(inputs, self.pad_token_id),
            "attention_mask": _pad([[1] * len(row) for row in inputs], 0),
            "labels": _pad([example["labels"] for example in examples], IGNORED),
        }


class SpeakerLmDataset(PairDataset):
    """Pairs as examples of version 1.

    Args:
        pairs ([`SpeechPair`]s), config ([`CosyVoiceTransformerLmConfig`]).
        speaker_dropout (`float`): share of the examples whose speaker is withheld, as it is in instruct mode.
        seed (`int`): of that choice, see [`PairDataset`].
    """

    def __init__(
        self,
        pairs: Sequence[SpeechPair],
        config: CosyVoiceTransformerLmConfig,
        speaker_dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(pairs, seed)
        self.config, self.speaker_dropout = config, speaker_dropout

    def __getitem__(self, index: int) -> dict[str, object]:
        pair = self.pairs[index]
        withheld = self.draw(index) < self.speaker_dropout
        known = bool(pair.speaker_embedding) and not withheld
        size = self.config.speaker_embedding_size
        return {
            "text_ids": [*pair.instruct_ids, *pair.text_ids],
            "input_ids": list(pair.speech_ids),
            "labels": [*pair.speech_ids, self.config.end_token_id],
            "speaker_embedding": list(pair.speaker_embedding) if known else [0.0] * size,
            "speaker_mask": int(known),
        }


class SpeakerLmCollator:
    """Examples of version 1 to a batch, padded on the right."""

    def __call__(self, examples: Sequence[dict[str, object]]) -> dict[str, Tensor]:
        """What the model's `forward` takes, masks with 1 = real."""
        texts, speech = ([example[name] for example in examples] for name in ("text_ids", "input_ids"))
        return {
            "text_ids": _pad(texts, 0),
            "text_mask": _pad([[1] * len(row) for row in texts], 0),
            "input_ids": _pad(speech, 0),
            "attention_mask": _pad([[1] * len(row) for row in speech], 0),
            "labels": _pad([example["labels"] for example in examples], IGNORED),
            "speaker_embedding": torch.tensor([example["speaker_embedding"] for example in examples]),
            "speaker_mask": torch.tensor([example["speaker_mask"] for example in examples]),
        }


def preference_rows(pairs: Sequence[SpeechPair], config: CosyVoiceLmConfig) -> list[dict[str, list[int]]]:
    """Rows for TRL's DPO: `prompt_ids`, `chosen_ids`, `rejected_ids`, of the pairs that have a rejected rendering.

    Upstream may interleave the two renderings of a text differently; here both are one stream, so that the prompt is
    the same.
    """
    rows = []
    for pair in pairs:
        if pair.rejected_speech_ids:
            text = text_token_ids(config, [*pair.instruct_ids, *pair.text_ids])
            rows.append(
                {
                    "prompt_ids": [config.start_token_id, *text, config.task_token_id],
                    "chosen_ids": [*speech_token_ids(config, pair.speech_ids), config.end_token_id],
                    "rejected_ids": [*speech_token_ids(config, pair.rejected_speech_ids), config.end_token_id],
                }
            )
    return rows


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(len(row) for row in rows)
    padded = torch.full((len(rows), width), value, dtype=torch.long)
    for number, row in enumerate(rows):
        padded[number, : len(row)] = torch.tensor(row, dtype=torch.long)
    return padded
