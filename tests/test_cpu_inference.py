"""Packed linear weights: the same results, nothing else changes."""

import copy
import pickle

import pytest
import torch

from hf_speechllm.cpu_inference import pack_linear_weights, unpack_linear_weights
from hf_speechllm.models.configuration_wenet_u2pp import WenetU2ppConfig
from hf_speechllm.models.modeling_wenet_u2pp import WenetU2ppForSpeechRecognition


pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")


@pytest.fixture
def model() -> WenetU2ppForSpeechRecognition:
    torch.manual_seed(0)
    config = WenetU2ppConfig(
        vocab_size=20,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        decoder_layers=1,
        right_decoder_layers=1,
        decoder_intermediate_size=40,
        conv_causal=True,
        conv_norm_type="layer_norm",
        conv_kernel_size=5,
        use_dynamic_chunk=True,
    )
    return WenetU2ppForSpeechRecognition(config).eval()


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(2, 90, 80, generator=torch.Generator().manual_seed(1))


def test_packed_results_equal_plain_ones(model, features):
    with torch.inference_mode():
        plain = model(features).logits
        texts = model.generate(features, num_beams=3)
    names = list(model.state_dict())
    linears = sum(type(module) is torch.nn.Linear for module in model.modules())
    assert pack_linear_weights(model) == linears > 20
    with torch.inference_mode():
        packed = model(features).logits
        assert torch.allclose(packed, plain, atol=1e-5)
        assert torch.equal(model.generate(features, num_beams=3), texts)
    assert list(model.state_dict()) == names
    unpack_linear_weights(model)
    assert not any("packed_weight" in vars(module) for module in model.modules())
    with torch.inference_mode():
        assert torch.equal(model(features).logits, plain)


def test_changed_weights_are_not_served_from_the_old_copy(model, features):
    pack_linear_weights(model)
    with torch.no_grad():
        before = model(features).logits
        model.ctc_head.weight.mul_(2.0)
        changed = model(features).logits
    assert not torch.allclose(before, changed, atol=1e-3)
    unpack_linear_weights(model)
    with torch.no_grad():
        assert torch.allclose(model(features).logits, changed, atol=1e-5)


def test_training_after_packing_gets_gradients(model, features):
    pack_linear_weights(model)
    model(features, labels=torch.tensor([[4, 5], [6, -100]])).loss.backward()
    gradient = model.model.encoder.layers[0].self_attn.q_proj.weight.grad
    assert gradient is not None and gradient.abs().max() > 0


def test_copies_use_the_plain_product(model, features):
    """peft deep-copies the modules that it saves."""
    pack_linear_weights(model)
    twin = copy.deepcopy(model)
    restored = pickle.loads(pickle.dumps(model.ctc_head))
    with torch.no_grad():
        expected = model(features).logits
        assert torch.allclose(twin(features).logits, expected, atol=1e-5)
        hidden = torch.randn(3, 32)
        assert torch.allclose(restored(hidden), model.ctc_head(hidden), atol=1e-5)
        twin.ctc_head.weight.zero_()
        assert torch.equal(model(features).logits, expected)


def test_a_model_made_in_inference_mode_can_be_packed():
    with torch.inference_mode():
        linear = torch.nn.Sequential(torch.nn.Linear(16, 24))
        hidden = torch.randn(5, 16)
        plain = linear(hidden)
        assert pack_linear_weights(linear) == 1
        assert torch.allclose(linear(hidden), plain, atol=1e-6)


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 products here")
def test_bfloat16_products_are_rounded_and_nothing_else_is(model, features):
    with torch.inference_mode():
        plain = model(features).logits
    assert pack_linear_weights(model, torch.bfloat16) > 20
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    linear = model.ctc_head
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        rounded = model(features).logits
        exact = hidden.bfloat16().double() @ linear.weight.bfloat16().double().T + linear.bias.double()
        product = linear(hidden)
    assert product.dtype == rounded.dtype == torch.float32
    # The sum is float32; what comes out is rounded once, to 8 bits.
    torch.testing.assert_close(product.double(), exact, rtol=2**-8, atol=2**-12)
    error = float((rounded - plain).norm() / plain.norm())
    assert 1e-4 < error < 2e-2
    # Packed again in float32 it is exact again.
    pack_linear_weights(model)
    with torch.inference_mode():
        assert torch.allclose(model(features).logits, plain, atol=1e-5)


def test_a_type_without_products_is_refused(model):
    with pytest.raises(ValueError, match="expected torch.float32 or torch.bfloat16, got torch.float16"):
        pack_linear_weights(model, torch.float16)


def test_other_dtypes_are_left_alone(model):
    assert pack_linear_weights(model.to(torch.bfloat16)) == 0
