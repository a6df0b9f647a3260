"""Faster float32 inference on CPUs: weights of linear layers in the blocked layout of oneDNN.

torch's eager `linear` hands float32 products to a BLAS that takes plain matrices and packs them anew in every call.
For the few rows of a streamed chunk packing costs more than the product, and on many machines oneDNN's kernels are the
faster ones anyway. Packing once doubles the memory of the linear weights and nothing else: parameters, their names,
saving and training stay as they are.
"""

import torch
from torch import Tensor, nn


class PackedWeight:
    """A weight in oneDNN's layout, and the version of the parameter it was made from.

    The layout has no storage that could be copied. A copy or a pickle is therefore empty, and the copied layer uses
    the plain product until it is packed itself.
    """

    def __init__(self, tensor: Tensor | None = None, version: int = -1) -> None:
        self.tensor = tensor
        self.version = version

    def __reduce__(self) -> tuple[type["PackedWeight"], tuple[()]]:
        return PackedWeight, ()


class PackedLinear(nn.Linear):
    """A linear layer that uses its packed weight where gradients are off; [`pack_linear_weights`] makes them."""

    packed_weight: PackedWeight

    def forward(self, inputs: Tensor) -> Tensor:
        usable = (
            inputs.dtype == torch.float32
            and inputs.device.type == "cpu"
            and inputs.numel() > 0
            and self.weight._version == self.packed_weight.version
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        )
        if not usable:
            return nn.functional.linear(inputs, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(inputs, self.packed_weight.tensor, self.bias, "none", [], "")


def pack_linear_weights(model: nn.Module) -> int:
    """Give every float32 `nn.Linear` of `model` on the CPU a packed copy of its weight, used where gradients are off.

    A layer whose weight has changed since (an optimiser step, a merged adapter, `load_state_dict`) falls back to the
    plain product until this is called again. Layers on other devices or of other types are left alone. Adapters of
    peft wrap the layer and keep working; copies and pickles of the model carry no packed weights.

    Returns:
        how many layers were packed; 0 where this build of torch has no oneDNN.
    """
    if not torch.backends.mkldnn.is_available():
        return 0
    packed = 0
    for module in model.modules():
        if type(module) not in (nn.Linear, PackedLinear):
            continue
        weight = module.weight
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            with torch.no_grad():
                blocked = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
            module.packed_weight = PackedWeight(blocked, weight._version)
            module.__class__ = PackedLinear
            packed += 1
    return packed


def unpack_linear_weights(model: nn.Module) -> None:
    """Undo [`pack_linear_weights`]: free the copies."""
    for module in model.modules():
        if type(module) is PackedLinear:
            del module.packed_weight
            module.__class__ = nn.Linear
