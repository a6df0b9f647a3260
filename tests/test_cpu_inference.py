"""Packed weights: the same results, nothing else changes; and attention in bfloat16."""

import copy
import pickle

import pytest
import torch
from tiny_cosyvoice import tiny_cosyvoice
from tiny_cosyvoice_flow import batch_inputs, speech, tiny_flow
from tiny_speechgpt_units import BASE, LARGE, noise, padded, tiny_units
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_speechllm.cpu_inference import (
    pack_linear_weights,
    sdpa_bfloat16_attention_forward,
    unpack_linear_weights,
    use_bfloat16_products,
)
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


has_bfloat16 = pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bfloat16 products here")


@has_bfloat16
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


# -- flows ------------------------------------------------------------------------------------------------------------
def mel_of(model) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate_mel(**batch_inputs([speech(model, 40, 12, seed=0), speech(model, 21, 8, seed=1)])).mel


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_flow_with_packed_weights_speaks_the_same(version):
    model = tiny_flow(version)
    plain, names = mel_of(model), list(model.state_dict())
    linears = sum(type(module) is torch.nn.Linear for module in model.modules())
    convolutions = sum(type(module).__name__ == "FrameConv1d" for module in model.modules())
    assert convolutions
    assert pack_linear_weights(model) == linears + convolutions
    packed = mel_of(model)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(packed, plain, rtol=0.0, atol=1e-5)
    # Changed convolutions are not served from the old copy either.
    for module in model.modules():
        if type(module).__name__ == "PackedFrameConv1d":
            with torch.no_grad():
                module.weight.mul_(1.5)
    changed = mel_of(model)
    unpack_linear_weights(model)
    assert not any(type(module).__name__.startswith("Packed") for module in model.modules())
    torch.testing.assert_close(mel_of(model), changed, rtol=0.0, atol=1e-5)
    assert not torch.allclose(changed, plain, atol=1e-3)


# -- units ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("hubert", [BASE, LARGE], ids=["group", "layer"])
def test_packed_weights_give_the_same_speech_units(hubert):
    model, (values, mask) = tiny_units(hubert=hubert), padded(noise(9000, 4000))
    with torch.no_grad():
        plain = model(values, mask).last_hidden_state
    linears = sum(type(module) is torch.nn.Linear for module in model.modules())
    assert pack_linear_weights(model) == linears + len(hubert["conv_dim"]) - 1  # not the one that reads the waveform
    with torch.no_grad():
        torch.testing.assert_close(model(values, mask).last_hidden_state, plain, rtol=0.0, atol=1e-5)
        model.hubert.feature_extractor.conv_layers[3].conv.weight.neg_()
        changed = model(values, mask).last_hidden_state
    assert not torch.allclose(changed, plain, atol=1e-3)
    unpack_linear_weights(model)
    assert not any(type(module).__name__.startswith("Packed") for module in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model(values, mask).last_hidden_state, changed, rtol=0.0, atol=1e-5)


@has_bfloat16
@pytest.mark.parametrize("hubert", [BASE, LARGE], ids=["group", "layer"])
def test_speech_units_in_bfloat16_are_near(hubert):
    model, (values, mask) = tiny_units(hubert=hubert), padded(noise(9000, 4000))
    with torch.no_grad():
        plain = model(values, mask).last_hidden_state
        use_bfloat16_products(model)
        rounded = model(values, mask).last_hidden_state
        unpack_linear_weights(model)
        model.set_attn_implementation("sdpa")
        again = model(values, mask).last_hidden_state
    assert rounded.dtype == torch.float32 and torch.equal(again, plain)
    assert 1e-4 < float((rounded - plain).norm() / plain.norm()) < 2e-2


# -- attention in bfloat16 --------------------------------------------------------------------------------------------
def heads(queries: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, size, 8, generator=generator).to(dtype) for size in (queries, 50, 50)]


class Module(torch.nn.Module):
    is_causal = False


def test_attention_is_rounded_where_it_pays():
    options = {"scaling": 0.3, "dropout": 0.0, "is_causal": False}
    mask = torch.arange(50) < torch.tensor([50, 31])[:, None]
    for attention_mask in (None, mask[:, None, None, :]):
        with torch.no_grad():
            rounded, weights = sdpa_bfloat16_attention_forward(Module(), *heads(40), attention_mask, **options)
            exact, _ = sdpa_attention_forward(Module(), *heads(40), attention_mask, **options)
        assert rounded.dtype == torch.float32 and rounded.shape == (2, 40, 3, 8) and weights is None
        error = float((rounded - exact).norm() / exact.norm())
        assert 1e-4 < error < 1e-2
        # What is masked is not seen.
        if attention_mask is not None:
            query, key, value = heads(40)
            key[1, :, 31:] += 100.0
            value[1, :, 31:] += 100.0
            with torch.no_grad():
                again, _ = sdpa_bfloat16_attention_forward(Module(), query, key, value, attention_mask, **options)
            assert torch.equal(again, rounded)


def test_attention_stays_exact_elsewhere():
    """A few queries, scores to add, gradients, and other types."""
    options = {"scaling": 0.3, "dropout": 0.0, "is_causal": False}
    scores = torch.randn(1, 3, 40, 50, generator=torch.Generator().manual_seed(1))

    def equal(parts: list[torch.Tensor], mask: torch.Tensor | None = None) -> bool:
        rounded, _ = sdpa_bfloat16_attention_forward(Module(), *parts, mask, **options)
        exact, _ = sdpa_attention_forward(Module(), *parts, mask, **options)
        return torch.equal(rounded, exact)

    with torch.no_grad():
        assert not equal(heads(40))
        assert equal(heads(5)) and equal(heads(40), scores) and equal(heads(40, torch.float64))
    assert equal(heads(40))


@has_bfloat16
@pytest.mark.parametrize("version", [2, 3])
def test_a_flow_in_bfloat16_is_close(version):
    model = tiny_flow(version)
    plain = mel_of(model)
    assert use_bfloat16_products(model) > 10 and model.config._attn_implementation == "sdpa_bfloat16"
    rounded = mel_of(model)
    assert rounded.dtype == torch.float32
    assert 1e-5 < float((rounded - plain).norm() / plain.norm()) < 0.05
    # Attention has its share of it.
    unpack_linear_weights(model)
    attention_alone = mel_of(model)
    assert not torch.equal(attention_alone, plain) and not torch.equal(attention_alone, rounded)
    model.set_attn_implementation("sdpa")
    assert torch.equal(mel_of(model), plain)


@has_bfloat16
def test_every_part_of_a_cosyvoice_is_told():
    model = tiny_cosyvoice(2)
    use_bfloat16_products(model)
    parts = {name: part.config._attn_implementation for name, part in model.named_children()}
    assert set(parts.values()) == {"sdpa_bfloat16"} and len(parts) == 5


def test_eager_attention_of_a_flow_is_the_same():
    for version in (1, 2, 3):
        model = tiny_flow(version)
        plain = mel_of(model)
        model.set_attn_implementation("eager")
        torch.testing.assert_close(mel_of(model), plain, rtol=0.0, atol=1e-5)
