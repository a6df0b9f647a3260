"""Sampling of units alone: the text of an answer is the most likely one, what is spoken is drawn.

An answer of a unit language model is text with tags, and units between `<sosp>` and `<eosp>`. The most likely unit may
repeat without end, and drawn text loses its tags; so the two want different decoding.
"""

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from .unit_string import END_OF_SPEECH, START_OF_SPEECH


class GreedyText(LogitsProcessor):
    """Leaves only the most likely token possible, except behind a `<sosp>` that no `<eosp>` has closed.

    For `generate(do_sample=True, logits_processor=LogitsProcessorList([GreedyText.of(tokenizer)]))`: temperature,
    `top_k` and `top_p` come after it, and so change the units alone. Each row is judged by its own ids.

    Args:
        start_of_speech_id, end_of_speech_id (`int`): of the two tokens.
        units (`LogitsProcessor`, *optional*): changes the scores in speech alone, e.g. `RepetitionAwareSampling`.
    """

    def __init__(self, start_of_speech_id: int, end_of_speech_id: int, units: LogitsProcessor | None = None) -> None:
        self.start_of_speech_id, self.end_of_speech_id, self.units = start_of_speech_id, end_of_speech_id, units

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, units: LogitsProcessor | None = None) -> "GreedyText":
        """For the ids of a tokenizer; `units` as above.

        Raises:
            ValueError: a tokenizer without `<sosp>` or `<eosp>`.
        """
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in (START_OF_SPEECH, END_OF_SPEECH) if token not in vocabulary]:
            raise ValueError(f"tokenizer: expected {START_OF_SPEECH} and {END_OF_SPEECH}, got none for {missing}")
        return cls(vocabulary[START_OF_SPEECH], vocabulary[END_OF_SPEECH], units)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores `(batch, tokens)` after ids `(batch, any)`, int64; -inf is impossible."""
        # Place 0 stands for never, and before the first id of a prompt that is given as embeddings.
        places = torch.arange(input_ids.shape[1] + 1, device=input_ids.device)
        opened, closed = (
            torch.where(nn.functional.pad(input_ids == index, (1, 0)), places, 0).amax(dim=1)
            for index in (self.start_of_speech_id, self.end_of_speech_id)
        )
        best = scores.argmax(dim=-1, keepdim=True)
        text = torch.full_like(scores, float("-inf")).scatter(1, best, scores.gather(1, best))
        drawn = scores if self.units is None else self.units(input_ids, scores)
        return torch.where((opened > closed)[:, None], drawn, text)
