"""A causal LM learns to read and write speech units: new tokens, new rows, every old row as it was.

The rows of the new tokens are drawn around the mean of the old ones with (a part of) their covariance, so that the new
tokens start out about as likely as an average old one (https://nlp.stanford.edu/~johnhew/vocab-expansion.html), or
from `N(0, initializer_range)` as upstream's scripts do.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase

from ..models.unit_tokens import DIALOGUE_TOKENS, unit_token, vocabulary_tokens


# Rows drawn at a time; each takes part in a product with every old row.
_DRAWN_ROWS = 256


@dataclass(frozen=True)
class UnitVocabulary:
    """What [`extend_with_units`] did.

    Args:
        added_tokens: the tokens that were new, in the order of their ids.
        first_unit_id: id of the unit 0; unit `k` is `first_unit_id + k`.
        num_units: how many units there are.
        old_rows, rows: rows of the embedding that belonged to tokens before, and all rows now (a multiple of
            `pad_to_multiple_of`).
    """

    added_tokens: tuple[str, ...]
    first_unit_id: int
    num_units: int
    old_rows: int
    rows: int


def extend_with_units(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_units: int,
    extra_tokens: Sequence[str] = DIALOGUE_TOKENS,
    marker: str = "",
    init: Literal["mean", "normal"] = "mean",
    covariance_scale: float = 1e-5,
    generator: torch.Generator | None = None,
    pad_to_multiple_of: int = 64,
    strip_spaces: bool = False,
) -> UnitVocabulary:
    """Adds units and dialogue tokens to a tokenizer, and rows for them to the model's embedding and head, in place.

    The rows of the old tokens keep their bits. All rows beyond them, spare ones that the base model brought included,
    are initialised anew. Rows that no token has (padding up to the multiple) are kept out of generation by
    `generation_config.suppress_tokens`. Tied heads stay tied.

    Args:
        model (`PreTrainedModel`): any causal LM with input embeddings.
        tokenizer: its tokenizer.
        num_units (`int`): size of the codebook.
        extra_tokens (`Sequence[str]`): added after `<sosp>` and `<eosp>`.
        marker (`str`): written inside of every unit token, see [`unit_token`].
        init (`"mean"` or `"normal"`): as the head of this file says.
        covariance_scale (`float`): part of the old rows' covariance that the new rows are drawn with; 0 = all equal.
        generator (`torch.Generator`, *optional*): on the CPU; the same seed gives the same rows on every device.
        pad_to_multiple_of (`int`): of the number of rows.
        strip_spaces (`bool`): a new token swallows the spaces beside it, as in upstream's tokenizer.

    Raises:
        ValueError: an unknown `init`, a negative number, or units that the tokenizer has already, but not in a row.
    """
    if init not in ("mean", "normal"):
        raise ValueError(f"init: expected 'mean' or 'normal', got {init!r}")
    if covariance_scale < 0:
        raise ValueError(f"covariance_scale: expected at least 0, got {covariance_scale}")
    if pad_to_multiple_of < 1:
        raise ValueError(f"pad_to_multiple_of: expected at least 1, got {pad_to_multiple_of}")
    old_rows = len(tokenizer)
    added = add_unit_tokens(tokenizer, num_units, extra_tokens, marker, strip_spaces)
    first = tokenizer.convert_tokens_to_ids(unit_token(0, marker))
    last = tokenizer.convert_tokens_to_ids(unit_token(num_units - 1, marker))
    if last - first != num_units - 1:
        raise ValueError(f"tokenizer: expected the units in a row of {num_units} ids, got {first} to {last}")

    present = model.get_input_embeddings().weight.shape[0]
    rows = -(-max(present, len(tokenizer)) // pad_to_multiple_of) * pad_to_multiple_of
    old_rows = min(old_rows, present)
    # The library's own initialisation is replaced below: it depends on the global generator.
    model.resize_token_embeddings(rows, pad_to_multiple_of=pad_to_multiple_of, mean_resizing=False)
    std = model.config.get_text_config().initializer_range
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    matrices = [embedding.weight]
    if head is not None and head.weight is not embedding.weight:
        matrices.append(head.weight)
    with torch.no_grad():
        for matrix in matrices:
            if init == "mean":
                _draw_like_old_rows(matrix, old_rows, covariance_scale, generator)
            else:
                new = torch.randn(rows - old_rows, matrix.shape[1], generator=generator).mul_(std)
                matrix[old_rows:] = new.to(matrix)
        if head is not None and head.bias is not None:
            head.bias[old_rows:] = head.bias[:old_rows].mean() if init == "mean" else 0.0
    if model.generation_config is not None:
        unused = list(range(len(tokenizer), rows))
        model.generation_config.suppress_tokens = unused or None
    return UnitVocabulary(tuple(added), first, num_units, old_rows, rows)


def add_unit_tokens(
    tokenizer: PreTrainedTokenizerBase,
    num_units: int,
    extra_tokens: Sequence[str] = DIALOGUE_TOKENS,
    marker: str = "",
    strip_spaces: bool = False,
) -> list[str]:
    """The half of [`extend_with_units`] that concerns the tokenizer; returns the tokens that it did not have."""
    wanted = vocabulary_tokens(num_units, extra_tokens, marker)
    known = tokenizer.get_vocab()
    new = [token for token in wanted if token not in known]
    tokenizer.add_tokens(
        [AddedToken(token, lstrip=strip_spaces, rstrip=strip_spaces, normalized=False, special=False) for token in new]
    )
    return new


def _draw_like_old_rows(
    matrix: Tensor, old_rows: int, covariance_scale: float, generator: torch.Generator | None
) -> None:
    """Fills `matrix[old_rows:]` from `N(mean, covariance_scale * covariance)` of `matrix[:old_rows]`.

    A row is the mean plus a random combination of the centred old rows, which has their covariance without its being
    computed or factorised.
    """
    old = matrix[:old_rows].float()
    mean = old.mean(dim=0)
    centred = old - mean
    scale = (covariance_scale / old_rows) ** 0.5
    for start in range(old_rows, matrix.shape[0], _DRAWN_ROWS):
        rows = matrix[start : start + _DRAWN_ROWS]
        weights = torch.randn(rows.shape[0], old_rows, generator=generator).to(old)
        rows.copy_(mean + scale * (weights @ centred))
