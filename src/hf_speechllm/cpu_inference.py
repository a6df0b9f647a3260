"""Faster inference on CPUs: weights of linear layers in the blocked layout of oneDNN, in float32 or in bfloat16; and
attention in bfloat16.

torch's eager `linear` hands float32 products to a BLAS that takes plain matrices and packs them anew in every call.
For the few rows of a streamed chunk packing costs more than the product, and on many machines oneDNN's kernels are the
faster ones anyway. Packing once doubles the memory of the linear weights and nothing else: parameters, their names,
saving and training stay as they are.

In bfloat16 the packed copy and the inputs of each product are rounded to 8 bits of mantissa (its sums are float32),
and with [`use_bfloat16_products`] those of attention; all else stays float32. Processors with matrix units for it
(AMX, AVX512-BF16) then take a third to a quarter of the time for a product; others take longer than in float32.
Convolutions are rounded only where they are written as products: torch's own ones in bfloat16 give wrong sums on such
processors for some numbers of channels (pytorch/pytorch#163347; in torch 2.13 a group of 6 channels and 16 taps).
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import GELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .models.frame_convolution import FrameConv1d
from .models.window_convolution import Activation, WindowConv1d


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


def usable_weight(module: "PackedLinear | PackedFrameConv1d | PackedWindowConv1d", inputs: Tensor) -> Tensor | None:
    """The packed weight, or `None` where it must not be used."""
    weight = module.packed_weight.tensor
    usable = (
        weight is not None
        and weight_version(module.weight) == module.packed_weight.version
        and module.weight.dtype == torch.float32
        and inputs.dtype in (torch.float32, weight.dtype)
        and inputs.device.type == "cpu"
        and inputs.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )
    return weight if usable else None


def packed_product(
    module: "PackedLinear | PackedFrameConv1d | PackedWindowConv1d",
    inputs: Tensor,
    gelu: bool = False,
) -> Tensor | None:
    """`inputs` times the packed weight plus bias, in the type of `inputs`; `None` where it must not be used.

    `gelu`: the exact one, of the sums before they are rounded.
    """
    weight = usable_weight(module, inputs)
    if weight is None:
        return None
    # oneDNN's name of the activation, and "none" in place of its approximation by tanh.
    activation = ("gelu", [], "none") if gelu else ("none", [], "")
    product = torch.ops.mkldnn._linear_pointwise(inputs.to(weight.dtype), weight, module.bias, *activation)
    return product.to(inputs.dtype)


class PackedLinear(nn.Linear):
    """A linear layer that uses its packed weight where gradients are off; [`pack_linear_weights`] makes them."""

    packed_weight: PackedWeight

    def forward(self, inputs: Tensor) -> Tensor:
        product = packed_product(self, inputs)
        return super().forward(inputs) if product is None else product

    def flat_weight(self) -> Tensor:
        return self.weight


class PackedFrameConv1d(FrameConv1d):
    """The same for a convolution over frames, which is one product."""

    packed_weight: PackedWeight

    def multiply(self, taps: Tensor) -> Tensor:
        product = packed_product(self, taps)
        return super().multiply(taps) if product is None else product


class PackedWindowConv1d(WindowConv1d):
    """The same for the convolutions in front of a HuBERT. What they give stays in the type of the packed weight: the
    next of them would only round it again."""

    packed_weight: PackedWeight

    def convolve(self, frames: Tensor, activation: Activation | None = None) -> Tensor:
        weight = usable_weight(self, frames)
        return super().convolve(frames if weight is None else frames.to(weight.dtype), activation)

    def multiply(self, windows: Tensor, activation: Activation | None = None) -> Tensor:
        is_exact_gelu = isinstance(activation, GELUActivation) and activation.act is nn.functional.gelu
        product = packed_product(self, windows, gelu=is_exact_gelu)
        if product is None:
            return super().multiply(windows, activation)
        return product if activation is None or is_exact_gelu else activation(product)


# Classes whose weights are packed, and what they become.
_PACKED = {nn.Linear: PackedLinear, FrameConv1d: PackedFrameConv1d, WindowConv1d: PackedWindowConv1d}


def _reads_a_waveform(module: nn.Module) -> bool:
    """The first convolution of a HuBERT: too small a product to be worth packing, and rounding the samples themselves
    would change units that need not change."""
    return isinstance(module, WindowConv1d) and module.in_channels == 1


def has_bfloat16_products() -> bool:
    """Whether this processor multiplies matrices in bfloat16 faster than in float32."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def bfloat16_obstacle(device: str) -> str | None:
    """What speaks against [`use_bfloat16_products`] on `device`, for a `--bfloat16` to say; `None` = nothing."""
    if device != "cpu":
        return f"expected --device cpu, got {device}"
    return None if has_bfloat16_products() else "this processor has neither AMX nor AVX512-BF16"


def pack_linear_weights(model: nn.Module, dtype: torch.dtype = torch.float32) -> int:
    """Give every float32 `nn.Linear` of `model` on the CPU a packed copy of its weight, used where gradients are off;
    and every `FrameConv1d` (of the flows) and `WindowConv1d` (in front of a HuBERT, but for the first), which are
    linear layers over neighbouring frames.

    A layer whose weight has changed since (an optimiser step, a merged adapter, `load_state_dict`) falls back to the
    plain product until this is called again. Layers on other devices or of other types are left alone. Adapters of
    peft wrap the layer and keep working; copies and pickles of the model carry no packed weights.

    Args:
        dtype: `torch.float32`, with which results stay the same but for the order of sums, or `torch.bfloat16`, see
            above and [`has_bfloat16_products`].

    Returns:
        how many weights were packed; 0 where this build of torch has no oneDNN.

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
        if type(module) not in (*_PACKED, *_PACKED.values()) or _reads_a_waveform(module):
            continue
        weight = module.weight
        if weight.device.type == "cpu" and weight.dtype == torch.float32:
            module.__class__ = _PACKED.get(type(module), type(module))
            with torch.no_grad():
                flat = module.flat_weight().detach().to(dtype).contiguous()
                blocked = torch.ops.mkldnn._reorder_linear_weight(flat)
            module.packed_weight = PackedWeight(blocked, weight_version(weight))
            packed += 1
    return packed


def unpack_linear_weights(model: nn.Module) -> None:
    """Undo [`pack_linear_weights`]: free the copies."""
    plain_classes = {packed: plain for plain, packed in _PACKED.items()}
    for module in model.modules():
        if type(module) in plain_classes:
            del module.packed_weight
            module.__class__ = plain_classes[type(module)]


# Fewer queries (a token of a language model) are over before their keys and values have been rounded.
_LEAST_QUERIES = 32


def sdpa_bfloat16_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, None]:
    """transformers' `sdpa` with queries, keys and values rounded to bfloat16, for inference on CPUs.

    Where gradients are on, the mask adds to the scores (positions of a conformer, whose range rounding would spoil)
    or queries are few, it is `sdpa`.

    Args:
        query (`(b, h, t, d)`), key, value (`(b, h', s, d)`).
        attention_mask (`(b or 1, h or 1, t or 1, s)`): bool, 1 = visible; `None` = all.

    Returns:
        `(b, t, h, d)` in the type of `query`, and no weights.
    """
    worthwhile = (
        query.dtype == torch.float32
        and query.device.type == "cpu"
        and query.shape[2] >= _LEAST_QUERIES
        and (attention_mask is None or attention_mask.dtype == torch.bool)
        and not torch.is_grad_enabled()
    )
    if not worthwhile:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    rounded = (part.bfloat16() for part in (query, key, value))
    context, _ = sdpa_attention_forward(module, *rounded, attention_mask, **kwargs)
    return context.to(query.dtype), None


AttentionInterface.register("sdpa_bfloat16", sdpa_bfloat16_attention_forward)
AttentionMaskInterface.register("sdpa_bfloat16", sdpa_mask)


def use_bfloat16_products(model: PreTrainedModel) -> int:
    """Packed weights and attention in bfloat16: `pack_linear_weights(model, torch.bfloat16)` and
    `model.set_attn_implementation("sdpa_bfloat16")`. `unpack_linear_weights(model)` and
    `model.set_attn_implementation("sdpa")` take it back.

    Returns, Raises: as [`pack_linear_weights`].
    """
    packed = pack_linear_weights(model, torch.bfloat16)
    model.set_attn_implementation("sdpa_bfloat16")
    return packed
