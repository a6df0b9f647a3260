"""Faster inference on CPUs: weights of linear layers in the blocked layout of oneDNN, in float32 or in bfloat16.

torch's eager `linear` hands float32 products to a BLAS that takes plain matrices and packs them anew in every call.
For the few rows of a streamed chunk packing costs more than the product, and on many machines oneDNN's kernels are the
faster ones anyway. Packing once doubles the memory of the linear weights and nothing else: parameters, their names,
saving and training stay as they are.

In bfloat16 the packed copy and the inputs of each product are rounded to 8 bits of mantissa (its sums are float32),
and all else stays float32. Processors with matrix units for it (AMX, AVX512-BF16) then take a third to a quarter of
the time for a product; others take longer than in float32.
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


def weight_version(weight: Tensor) -> int:
    """A number that changes with every change of `weight` in place. A tensor that was made under
    `torch.inference_mode()` keeps none: pack it again after a change."""
    return 0 if weight.is_inference() else weight._version


class PackedLinear(nn.Linear):
    """A linear layer that uses its packed weight where gradients are off; [`pack_linear_weights`] makes them."""

    packed_weight: PackedWeight

    def forward(self, inputs: Tensor) -> Tensor:
        usable = (
            inputs.dtype == torch.float32
            and inputs.device.type == "cpu"
            and inputs.numel() > 0
            and weight_version(self.weight) == self.packed_weight.version
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        )
        if not usable:
            return nn.functional.linear(inputs, self.weight, self.bias)
        weight = self.packed_weight.tensor
        product = torch.ops.mkldnn._linear_pointwise(inputs.to(weight.dtype), weight, self.bias, "none", [], "")
        return product.to(inputs.dtype)


def has_bfloat16_products() -> bool:
    """Whether this processor multiplies matrices in bfloat16 faster than in float32."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def pack_linear_weights(model: nn.Module, dtype: torch.dtype = torch.float32) -> int:
    """Give every float32 `nn.Linear` of `model` on the CPU a packed copy of its weight, used where gradients are off.

    A layer whose weight has changed since (an optimiser step, a merged adapter, `load_state_dict`) falls back to the
    plain product until this is called again. Layers on other devices or of other types are left alone. Adapters of
    peft wrap the layer and keep working; copies and pickles of the model carry no packed weights.

    Args:
        dtype: `torch.float32`, with which results stay the same but for the order of sums, or `torch.bfloat16`, see
            above and [`has_bfloat16_products`].

    Returns:
        how many layers were packed; 0 where this build of torch has no oneDNN.

    Raises:
        ValueError: another `dtype`, or bfloat16 on a processor without AVX512.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype}")
    if not torch.backends.mkldnn.is_available():
        return 0
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise ValueError("dtype: expected torch.float32 on this processor, whose oneDNN has no bfloat16 products")
    packed = 0
    for module in model.modules():
        if type(module) not in (nn.Linear, PackedLinear):
            continue
        weight = module.weight
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            with torch.no_grad():
                blocked = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype).contiguous())
            module.packed_weight = PackedWeight(blocked, weight_version(weight))
            module.__class__ = PackedLinear
            packed += 1
    return packed


def unpack_linear_weights(model: nn.Module) -> None:
    """Undo [`pack_linear_weights`]: free the copies."""
    for module in model.modules():
        if type(module) is PackedLinear:
            del module.packed_weight
            module.__class__ = nn.Linear
