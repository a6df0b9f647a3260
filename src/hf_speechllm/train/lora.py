"""What is trained: LoRA presets and frozen parts."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

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
