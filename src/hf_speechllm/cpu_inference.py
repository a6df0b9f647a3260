"""Faster float32 inference on CPUs: weights of linear layers in the blocked layout of oneDNN.

torch's eager `linear` hands float32 products to a BLAS that takes plain matrices and packs them anew in every call.
For the few rows of a streamed chunk packing costs more than the product, and on many machines oneDNN's kernels are the
faster ones anyway. Packing once doubles the memory of the linear weights and nothing else: parameters, their names,
saving and training stay as they are.
"""

from types import MethodType

import torch
from torch import Tensor, nn


def pack_linear_weights(model: nn.Module) -> int:
    """Give every float32 `nn.Linear` of `model` on the CPU a packed copy of its weight, used where gradients are off.

    A layer whose weight has changed since (an optimiser step, a merged adapter, `load_state_dict`) falls back to the
    plain product until this is called again. Layers on other devices or of other types are left alone. Adapters of
    peft wrap the layer and keep working.

    Returns:
        how many layers were packed; 0 where this build of torch has no oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        return 0
    packed = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module) is nn.Linear and weight.device.type == "cpu" and weight.dtype == torch.float32:
            module.packed_weight = (_pack(weight), weight._version)
            module.forward = MethodType(_packed_forward, module)
            packed += 1
    return packed


def unpack_linear_weights(model: nn.Module) -> None:
    """Undo [`pack_linear_weights`]: free the copies."""
    for module in model.modules():
        if type(module) is nn.Linear and "packed_weight" in vars(module):
            del module.packed_weight, module.forward


def _pack(weight: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())


def _packed_forward(module: nn.Linear, inputs: Tensor) -> Tensor:
    packed, version = module.packed_weight
    usable = (
        inputs.dtype == torch.float32
        and inputs.device.type == "cpu"
        and inputs.numel() > 0
        and module.weight._version == version
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )
    if not usable:
        return nn.functional.linear(inputs, module.weight, module.bias)
    return torch.ops.mkldnn._linear_pointwise(inputs, packed, module.bias, "none", [], "")
