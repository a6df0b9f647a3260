"""What is trained: LoRA presets and frozen parts."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from torch import nn


if TYPE_CHECKING:
    from peft import LoraConfig

# The linear layers of attention and of dense feed-forward layers, under the names that every family here uses.
ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD_TARGETS = ("fc1", "fc2")


def lora_config(
    rank: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    target_modules: Sequence[str] = ATTENTION_TARGETS + FEED_FORWARD_TARGETS,
    modules_to_save: Sequence[str] = (),
) -> "LoraConfig":
    """`peft.LoraConfig` for a recogniser.

    Args:
        rank, alpha, dropout: of the adapters; their output is scaled by alpha / rank.
        target_modules (`Sequence[str]`): names of linear layers. Experts of a mixture are stacked parameters, not
            linear layers, and keep their weights.
        modules_to_save (`Sequence[str]`): trained in full and stored with the adapter, e.g. `["ctc_head"]`.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        modules_to_save=list(modules_to_save) or None,
    )


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    r"""Stop training the parameters whose name matches a regular expression (`re.search`).

    Args:
        model (`nn.Module`): changed in place.
        patterns (`Sequence[str]`): e.g. `[r"^model\.encoder\.subsampling\.", r"\.router\."]`.

    Returns:
        the names of the frozen parameters.

    Raises:
        ValueError: a pattern that matches no parameter.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ValueError(f"freeze: expected {pattern!r} to match a parameter, found none")
    frozen = [name for name in names if any(re.search(pattern, name) for pattern in patterns)]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    return frozen


def unit_lm_lora_config(
    model: nn.Module,
    rank: int = 8,
    alpha: int = 16,
    dropout: float = 0.05,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
    rows: Literal["frozen", "all", "new"] = "frozen",
    new_token_ids: Sequence[int] = (),
) -> "LoraConfig":
    """`peft.LoraConfig` for a unit language model; the defaults are those of SpeechGPT's third stage.

    What becomes of the rows of the vocabulary:

    * `"frozen"`: they stay. For a model that has learnt its units.
    * `"all"`: embedding and head are trained in full and stored with the adapter. Tied ones stay tied.
    * `"new"`: only the rows of `new_token_ids`, and only these are stored; a head that is not tied is trained in full,
      because TRL's trainers multiply by its weight themselves and cannot see rows that lie beside it. For the same
      reason TRL (1.16) cannot train a model with tied rows that way; transformers' `Trainer` can, with the model's own
      loss, which saves as much memory.

    Args:
        model (`nn.Module`): the causal LM that gets the adapter, before it has it.
        rank, alpha, dropout, target_modules: of the adapters.
        rows (`"frozen"`, `"all"` or `"new"`): see above.
        new_token_ids (`Sequence[int]`): with `"new"`.

    Raises:
        ValueError: an unknown choice of rows, or `"new"` without ids.
    """
    from peft import LoraConfig

    names = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    embedding, head = names[id(model.get_input_embeddings())], names[id(model.get_output_embeddings())]
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    options: dict[str, object] = {}
    if rows == "all":
        options = {"modules_to_save": [embedding, head], "ensure_weight_tying": tied}
    elif rows == "new":
        if not len(new_token_ids):
            raise ValueError("new_token_ids: expected the ids of the new tokens, got none")
        options = {"trainable_token_indices": {embedding: list(new_token_ids)}}
        if not tied:
            options["modules_to_save"] = [head]
    elif rows != "frozen":
        raise ValueError(f"rows: expected 'frozen', 'all' or 'new', got {rows!r}")
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        task_type="CAUSAL_LM",
        **options,
    )
