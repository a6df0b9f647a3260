"""Linear layers with int8 weights: near to the float ones, on one row as on many, and a language model of them."""

import pytest
import torch
from tiny_cosyvoice_lm import SPEECH_SIZE, build_qwen
from torch import nn

from hf_speechllm.cpu_int8 import Int8Linear, quantize_linear_weights


@pytest.mark.parametrize("rows", (1, 3, 4, 5, 40))
@pytest.mark.parametrize("bias", (False, True))
def test_close_to_the_float_layer(rows, bias):
    torch.manual_seed(0)
    linear = nn.Linear(64, 96, bias=bias)
    layer = Int8Linear(linear)
    for shape in ((rows, 64), (1, rows, 64), (rows, 1, 64)):
        inputs = torch.randn(*shape)
        expected, found = linear(inputs), layer(inputs)
        assert found.shape == expected.shape and found.dtype == torch.float32
        assert (found - expected).norm() < 0.02 * expected.norm()
    assert layer.weight.dtype == torch.int8 and layer.weight.abs().max() == 127


def test_a_row_of_zeros_stays_zero():
    linear = nn.Linear(32, 32, bias=False)
    with torch.no_grad():
        linear.weight[3] = 0.0
    assert (Int8Linear(linear)(torch.randn(2, 32))[:, 3] == 0).all()


def test_language_model():
    model = build_qwen(2, hidden_size=64, intermediate_size=96, num_attention_heads=4)
    ids = torch.tensor([[3, 9, 70, 71]])
    with torch.no_grad():
        expected = model(ids, speech_logits_only=True).logits
        layers = sum(type(module) is nn.Linear for module in model.modules())
        assert quantize_linear_weights(model) == layers > 10
        found = model(ids, speech_logits_only=True).logits
    assert (found - expected).norm() < 0.1 * expected.norm()
    spoken = model.generate_speech_tokens(torch.tensor([[3, 9]]), max_token_text_ratio=6, do_sample=False).token_ids
    assert spoken.shape[1] >= 4 and spoken.max() < SPEECH_SIZE
