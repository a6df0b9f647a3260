"""Whole parameters of a model that DeepSpeed ZeRO-3 has shared out, or will share out, between the processes."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel


@contextmanager
def whole_parameters(model: nn.Module, modified: bool = False) -> Iterator[None]:
    """Inside the context every parameter is complete on every process; without ZeRO-3 nothing happens.

    Every process has to enter it.

    Args:
        model (`nn.Module`): its parameters are gathered.
        modified (`bool`): keep what process 0 writes into them; by default changes are dropped at the end.
    """
    # DeepSpeed marks what it has shared out.
    shared_out = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not shared_out:
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters(shared_out, modifier_rank=0 if modified else None):
        yield


@contextmanager
def whole_models() -> Iterator[None]:
    """Models made or loaded inside are whole on every process; ZeRO-3 shares them out when training starts."""
    from transformers.integrations import deepspeed as integration

    # transformers asks this reference, and has no function that gives it.
    reference = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = reference


def num_parameters(model: PreTrainedModel) -> int:
    """`model.num_parameters()`, with those that ZeRO-3 has shared out, which look empty."""
    shared_out = sum(parameter.ds_numel for parameter in model.parameters() if hasattr(parameter, "ds_id"))
    return model.num_parameters() + shared_out
