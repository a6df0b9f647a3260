"""transformers' own `ModelTesterMixin` on tiny U2++ configurations, dense and mixture-of-experts.

`python tests/fetch_transformers_tests.py` fetches the mixin (needs the network once); without it these tests skip.
"""

import sys
import unittest

import pytest
import torch
from fetch_transformers_tests import FOLDER, PACKAGE

from hf_speechllm.models.configuration_wenet_u2pp import WenetU2ppConfig
from hf_speechllm.models.modeling_wenet_u2pp import WenetU2ppForSpeechRecognition


pytestmark = pytest.mark.slow
if not (FOLDER / PACKAGE).is_dir():
    pytest.skip(f"{FOLDER} is absent: run `python tests/fetch_transformers_tests.py`", allow_module_level=True)
sys.path.insert(0, str(FOLDER))
try:
    from transformers_tests.test_configuration_common import ConfigTester
    from transformers_tests.test_modeling_common import ModelTesterMixin
finally:
    sys.path.remove(str(FOLDER))


class WenetU2ppModelTester:
    """Tiny configurations and inputs, as the mixin asks for them."""

    batch_size = 3
    num_features = 47  # frames; 11 encoder frames at 4x
    seq_length = 11
    encoder_seq_length = 11
    num_hidden_layers = 2
    num_attention_heads = 2
    hidden_size = 16
    is_training = True

    def __init__(self, parent: unittest.TestCase, mlp_type: str = "dense") -> None:
        self.parent, self.mlp_type = parent, mlp_type

    def get_config(self) -> WenetU2ppConfig:
        return WenetU2ppConfig(
            vocab_size=19,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=24,
            conv_kernel_size=5,
            conv_causal=True,
            conv_norm_type="layer_norm",
            use_dynamic_chunk=True,
            mlp_type=self.mlp_type,
            num_experts=4,
            decoder_layers=1,
            right_decoder_layers=1,
            decoder_attention_heads=2,
            decoder_intermediate_size=24,
            decoder_mlp_type=self.mlp_type,
            decoder_num_experts=4,
            reverse_weight=0.3,
            # The mixin compares passes in training mode.
            hidden_dropout=0.0,
            positional_dropout=0.0,
            decoder_dropout=0.0,
            decoder_positional_dropout=0.0,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[WenetU2ppConfig, dict]:
        features = torch.randn(self.batch_size, self.num_features, 80)
        return self.get_config(), {
            "input_features": features,
            "attention_mask": torch.ones(self.batch_size, self.num_features, dtype=torch.long),
        }


# Tests of the mixin that do not fit, each with its reason. All others run as they are.
NOT_APPLICABLE = {
    "test_model_get_set_embeddings": "audio goes in; the vocabulary layers (CTC, left, right) share no embedding",
    "test_resize_tokens_embeddings": "as above: a vocabulary of another size is another model",
    "test_resize_embeddings_untied": "as above",
    "test_model_outputs_equivalence": "it subtracts tensors, and our encoder mask is boolean; replaced below",
    "test_generation_tester_mixin_inheritance": "generate() is our own (CTC and rescoring), not GenerationMixin's",
}


class Dense(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (WenetU2ppForSpeechRecognition,)
    test_resize_embeddings = False
    mlp_type = "dense"

    def setUp(self) -> None:
        if self._testMethodName in NOT_APPLICABLE:
            self.skipTest(NOT_APPLICABLE[self._testMethodName])
        if self.mlp_type == "dense" and "batched_and_grouped" in self._testMethodName:
            self.skipTest("a dense model has no experts; `MixtureOfExperts` runs it")
        self.model_tester = WenetU2ppModelTester(self, self.mlp_type)
        self.config_tester = ConfigTester(self, config_class=WenetU2ppConfig, hidden_size=16)

    def _prepare_for_class(self, inputs_dict: dict, model_class: type, return_labels: bool = False) -> dict:
        """The mixin knows the labels of transformers' own classes only."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels:
            inputs["labels"] = torch.tensor([[3, 4, 4, 5], [6, -100, -100, -100], [9, 8, 7, -100]])
        return inputs

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_tuple_is_the_output_class(self) -> None:
        """Replaces `test_model_outputs_equivalence`."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = WenetU2ppForSpeechRecognition._from_config(config, attn_implementation="eager").eval()
        for labelled in (False, True):
            prepared = self._prepare_for_class(inputs, type(model), return_labels=labelled)
            options = {"output_hidden_states": True, "output_attentions": True}
            named = model(**prepared, **options).to_tuple()
            plain = model(**prepared, **options, return_dict=False)
            self.assertEqual(len(named), len(plain))
            for one, other in zip(named, plain, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)


class MixtureOfExperts(Dense):
    mlp_type = "moe"
    # An expert that no frame of a tiny batch chose has no gradient.
    test_all_params_have_gradient = False


def test_every_entry_of_the_skip_list_is_a_test_of_the_mixin() -> None:
    assert len(NOT_APPLICABLE) <= 10
    assert [name for name in NOT_APPLICABLE if not hasattr(ModelTesterMixin, name)] == []
