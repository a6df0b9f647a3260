"""Weights of linear layers in int8, for the decoding of language models on CPUs, whose time is that of reading them.

Weight-only: a row of a weight is int8 times a scale; inputs are rounded to bfloat16, sums are float32. One token then
reads a quarter of what it reads in float32.
"""

import torch
from torch import Tensor, nn


# Rows of inputs up to which the int8 kernel is used. Beyond, as in a prompt, products and not reading take the time.
_MOST_ROWS = 4


class Int8Linear(nn.Module):
    """A linear layer with an int8 weight; for inference."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("weight", (weight / scales[:, None]).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.bias = linear.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """`(..., in_features)` to `(..., out_features)`, in the type of the inputs."""
        rows = inputs.reshape(-1, self.in_features)
        if rows.shape[0] <= _MOST_ROWS:
            output = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scales.bfloat16()).to(inputs.dtype)
        else:
            output = rows @ self.weight.to(inputs.dtype).T * self.scales.to(inputs.dtype)
        output = output if self.bias is None else output + self.bias
        return output.unflatten(0, inputs.shape[:-1]) if inputs.dim() != 2 else output


def quantize_linear_weights(model: nn.Module) -> int:
    """Replaces every `nn.Linear` on the CPU by an [`Int8Linear`], in place; the model cannot be trained or saved then.

    Returns:
        how many layers were replaced.
    """
    replaced = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child.weight.device.type == "cpu":
                setattr(module, name, Int8Linear(child))
                replaced += 1
    return replaced
