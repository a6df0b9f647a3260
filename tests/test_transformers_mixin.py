"""transformers' own `ModelTesterMixin` on tiny models of every family that speaks or listens.

`python tests/fetch_transformers_tests.py` fetches the mixin (needs the network once); without it these tests skip.
"""

import sys
import unittest

import pytest
import tiny_funasr_paraformer
import tiny_funasr_sensevoice
import torch
from fetch_transformers_tests import FOLDER, PACKAGE
from tiny_cosyvoice_flow import NO_DROPOUT, tiny_flow
from tiny_cosyvoice_hift import mel_of, noise_for, tiny_hift
from tiny_cosyvoice_lm import QWEN, TRANSFORMER
from tiny_speechgpt_lm import FIRST_UNIT, NUM_UNITS, SIZES
from tiny_speechgpt_units import BASE as TINY_HUBERT
from tiny_speechgpt_units import GENERATOR
from tiny_speechtokenizer import TINY as TINY_CODEC
from transformers import PreTrainedConfig

from hf_speechllm.models.configuration_cosyvoice2_flow import CosyVoice2FlowConfig
from hf_speechllm.models.configuration_cosyvoice3_flow import CosyVoice3FlowConfig
from hf_speechllm.models.configuration_cosyvoice3_hift import CosyVoice3HiftConfig
from hf_speechllm.models.configuration_cosyvoice_flow import CosyVoiceFlowConfig
from hf_speechllm.models.configuration_cosyvoice_hift import CosyVoiceHiftConfig
from hf_speechllm.models.configuration_cosyvoice_lm import CosyVoiceLmConfig
from hf_speechllm.models.configuration_cosyvoice_transformer_lm import CosyVoiceTransformerLmConfig
from hf_speechllm.models.configuration_funasr_paraformer import FunasrParaformerConfig
from hf_speechllm.models.configuration_funasr_sensevoice import FunasrSenseVoiceConfig
from hf_speechllm.models.configuration_speechgpt_lm import SpeechGptConfig
from hf_speechllm.models.configuration_speechgpt_unit_vocoder import SpeechGptUnitVocoderConfig
from hf_speechllm.models.configuration_speechgpt_units import SpeechGptUnitsConfig
from hf_speechllm.models.configuration_speechtokenizer import SpeechTokenizerConfig
from hf_speechllm.models.configuration_wenet_u2pp import WenetU2ppConfig
from hf_speechllm.models.flow_matching import draw_flow_matching
from hf_speechllm.models.modeling_cosyvoice2_flow import CosyVoice2FlowModel
from hf_speechllm.models.modeling_cosyvoice3_flow import CosyVoice3FlowModel
from hf_speechllm.models.modeling_cosyvoice3_hift import CosyVoice3HiftModel
from hf_speechllm.models.modeling_cosyvoice_flow import CosyVoiceFlowModel
from hf_speechllm.models.modeling_cosyvoice_hift import CosyVoiceHiftModel
from hf_speechllm.models.modeling_cosyvoice_lm import CosyVoiceLmForCausalLM
from hf_speechllm.models.modeling_cosyvoice_transformer_lm import CosyVoiceTransformerLm
from hf_speechllm.models.modeling_funasr_paraformer import FunasrParaformerForSpeechRecognition
from hf_speechllm.models.modeling_funasr_sensevoice import FunasrSenseVoiceForSpeechRecognition
from hf_speechllm.models.modeling_speechgpt_lm import SpeechGptForCausalLM
from hf_speechllm.models.modeling_speechgpt_unit_vocoder import SpeechGptUnitVocoderModel
from hf_speechllm.models.modeling_speechgpt_units import SpeechGptUnitsModel
from hf_speechllm.models.modeling_speechtokenizer import SpeechTokenizerModel
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


class ParaformerModelTester:
    """As above, for a Paraformer whose weights fire a few tokens."""

    batch_size = 3
    seq_length = 11
    encoder_seq_length = 11
    num_hidden_layers = 2
    num_attention_heads = 2
    hidden_size = 16
    is_training = True

    def get_config(self) -> FunasrParaformerConfig:
        return FunasrParaformerConfig(
            **tiny_funasr_paraformer.BASE, hidden_dropout=0.0, attention_dropout=0.0, decoder_dropout=0.0
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[FunasrParaformerConfig, dict]:
        config = self.get_config()
        return config, {
            "input_features": torch.randn(self.batch_size, self.seq_length, config.input_size),
            "attention_mask": torch.ones(self.batch_size, self.seq_length, dtype=torch.long),
        }


class SenseVoiceModelTester(ParaformerModelTester):
    """As above, for SenseVoice: four prompt frames come before the audio."""

    encoder_seq_length = 15

    def get_config(self) -> FunasrSenseVoiceConfig:
        sizes = {**tiny_funasr_sensevoice.BASE, "num_hidden_layers": 2, "num_timestamp_prediction_layers": 1}
        return FunasrSenseVoiceConfig(**sizes, hidden_dropout=0.0, attention_dropout=0.0)


class CodecModelTester:
    """As above, for SpeechTokenizer."""

    batch_size = 3
    is_training = False

    def prepare_config_and_inputs_for_common(self) -> tuple[SpeechTokenizerConfig, dict]:
        return SpeechTokenizerConfig(**TINY_CODEC), {
            "input_values": 0.3 * torch.randn(self.batch_size, 161),
            "attention_mask": torch.ones(self.batch_size, 161, dtype=torch.long),
        }


# Tests of the mixin that do not fit, each with its reason. All others run as they are.
NOT_APPLICABLE = {
    "test_model_get_set_embeddings": "audio goes in; the vocabulary layers share no embedding",
    "test_resize_tokens_embeddings": "as above: a vocabulary of another size is another model",
    "test_resize_embeddings_untied": "as above",
    "test_model_outputs_equivalence": "it subtracts tensors, and our encoder mask is boolean; replaced below",
    "test_generation_tester_mixin_inheritance": "generate() is our own (CTC, rescoring, CIF), not GenerationMixin's",
}


# The first hidden state is the input of SAN-M's first layer, which has the width of the features.
SANM = {
    "test_hidden_states_output": "it expects the hidden size in the first state, which has the width of the features",
    "test_retain_grad_hidden_states_attentions": "the first state is the scaled features, which have no gradient",
}


class RecogniserTests(ModelTesterMixin):
    """What the families share. They add `make_tester`; `labels` are those of a batch of three."""

    not_applicable = NOT_APPLICABLE
    test_resize_embeddings = False
    labels = ((3, 4, 4, 5), (6, -100, -100, -100), (9, 8, 7, -100))

    def setUp(self) -> None:
        if self._testMethodName in self.not_applicable:
            self.skipTest(self.not_applicable[self._testMethodName])
        self.model_tester = self.make_tester()
        self.config_tester = ConfigTester(
            self, config_class=self.all_model_classes[0].config_class, hidden_size=16, common_properties=[]
        )

    def _prepare_for_class(self, inputs_dict: dict, model_class: type, return_labels: bool = False) -> dict:
        """The mixin knows the labels of transformers' own classes only."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels:
            inputs["labels"] = torch.tensor(self.labels)
        return inputs

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_tuple_is_the_output_class(self) -> None:
        """Replaces `test_model_outputs_equivalence`."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = self.all_model_classes[0]._from_config(config, attn_implementation="eager").eval()
        for labelled in (False, True):
            prepared = self._prepare_for_class(inputs, type(model), return_labels=labelled)
            options = {"output_hidden_states": True, "output_attentions": True}
            torch.manual_seed(0)
            named = model(**prepared, **options).to_tuple()
            torch.manual_seed(0)
            plain = model(**prepared, **options, return_dict=False)
            self.assertEqual(len(named), len(plain))
            for one, other in zip(named, plain, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=0)


class Dense(RecogniserTests, unittest.TestCase):
    all_model_classes = (WenetU2ppForSpeechRecognition,)
    mlp_type = "dense"

    def setUp(self) -> None:
        super().setUp()
        if self.mlp_type == "dense" and "batched_and_grouped" in self._testMethodName:
            self.skipTest("a dense model has no experts; `MixtureOfExperts` runs it")

    def make_tester(self) -> WenetU2ppModelTester:
        return WenetU2ppModelTester(self, self.mlp_type)


class MixtureOfExperts(Dense):
    mlp_type = "moe"
    # An expert that no frame of a tiny batch chose has no gradient.
    test_all_params_have_gradient = False


class Paraformer(RecogniserTests, unittest.TestCase):
    all_model_classes = (FunasrParaformerForSpeechRecognition,)
    not_applicable = NOT_APPLICABLE | SANM

    def make_tester(self) -> ParaformerModelTester:
        return ParaformerModelTester()


class SenseVoice(RecogniserTests, unittest.TestCase):
    all_model_classes = (FunasrSenseVoiceForSpeechRecognition,)
    not_applicable = NOT_APPLICABLE | SANM
    labels = tuple(
        (*(tiny_funasr_sensevoice.ID[name] for name in answers), *text)
        for answers, text in (
            (("zh", "HAPPY", "Speech", "woitn"), (22, 23, 23)),
            (("en", "SAD", "BGM", "withitn"), (25, -100, -100)),
            (("ko", "NEUTRAL", "Speech", "woitn"), (30, 31, -100)),
        )
    )

    def make_tester(self) -> SenseVoiceModelTester:
        return SenseVoiceModelTester()


CODEC = {
    "test_model_get_set_embeddings": "audio goes in",
    "test_resize_tokens_embeddings": "as above",
    "test_resize_embeddings_untied": "as above",
    "test_hidden_states_output": "convolutions at several rates have no common hidden states",
    "test_retain_grad_hidden_states_attentions": "as above",
    "test_attention_outputs": "it has no attention",
}


class Codec(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (SpeechTokenizerModel,)
    test_resize_embeddings = False
    has_attentions = False

    def setUp(self) -> None:
        if self._testMethodName in CODEC:
            self.skipTest(CODEC[self._testMethodName])
        self.model_tester = CodecModelTester()
        self.config_tester = ConfigTester(
            self, config_class=SpeechTokenizerConfig, has_text_modality=False, hidden_size=16, common_properties=[]
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class UnitsModelTester:
    """As above, for speech units on a HuBERT with a group norm."""

    batch_size = 3
    is_training = False

    def prepare_config_and_inputs_for_common(self) -> tuple[SpeechGptUnitsConfig, dict]:
        config = SpeechGptUnitsConfig(hubert_config=dict(TINY_HUBERT), layer=3, num_units=5)
        return config, {
            "input_values": 0.3 * torch.randn(self.batch_size, 1500),
            "attention_mask": torch.ones(self.batch_size, 1500, dtype=torch.long),
        }


class VocoderModelTester:
    """As above, for the unit vocoder, with one frame a unit."""

    batch_size = 3
    is_training = False

    def prepare_config_and_inputs_for_common(self) -> tuple[SpeechGptUnitVocoderConfig, dict]:
        fields = {"num_units": 9, "embedding_size": 8, "num_speakers": 2, "duration_hidden_size": 8}
        config = SpeechGptUnitVocoderConfig(hifigan_config={**GENERATOR, "model_in_dim": 16}, **fields)
        return config, {
            "unit_ids": torch.randint(9, (self.batch_size, 6)),
            "durations": torch.ones(self.batch_size, 6, dtype=torch.long),
        }


UNITS_AND_VOCODER = {
    "test_model_get_set_embeddings": "no table of tokens that a head could share",
    "test_resize_tokens_embeddings": "as above",
    "test_resize_embeddings_untied": "as above",
    "test_hidden_states_output": "units: a call names the layer that it wants; vocoder: several rates",
    "test_retain_grad_hidden_states_attentions": "as above",
    "test_attention_outputs": "as above",
}


class Units(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (SpeechGptUnitsModel,)
    tester, config_class = UnitsModelTester, SpeechGptUnitsConfig
    not_applicable = UNITS_AND_VOCODER | {
        "test_model_outputs_equivalence": "it subtracts tensors, and the mask of the frames is boolean"
    }
    test_resize_embeddings = False
    has_attentions = False

    def setUp(self) -> None:
        if self._testMethodName in self.not_applicable:
            self.skipTest(self.not_applicable[self._testMethodName])
        self.model_tester = self.tester()
        self.config_tester = ConfigTester(
            self, config_class=self.config_class, has_text_modality=False, common_properties=[]
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class Vocoder(Units):
    all_model_classes = (SpeechGptUnitVocoderModel,)
    tester, config_class = VocoderModelTester, SpeechGptUnitVocoderConfig
    not_applicable = UNITS_AND_VOCODER


class FlowModelTester:
    """As above, for a flow of CosyVoice with given draws: without them no two passes are the same."""

    batch_size = 3
    is_training = False

    def __init__(self, version: int) -> None:
        self.version = version

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict]:
        config = tiny_flow(self.version, **NO_DROPOUT[self.version]).config
        mel = torch.randn(self.batch_size, 14, config.num_mel_bins)
        lengths = torch.full((self.batch_size,), 14)
        return config, {
            "speech_token_ids": torch.randint(config.vocab_size, (self.batch_size, 7)),
            "mel": mel,
            "speaker_embedding": torch.randn(self.batch_size, config.speaker_embedding_size),
            "draws": draw_flow_matching(mel, lengths, 0.2, 0.5, 0.3, 0.0),
        }


class Flow1(Units):
    version = 1
    all_model_classes = (CosyVoiceFlowModel,)
    config_class = CosyVoiceFlowConfig
    not_applicable = UNITS_AND_VOCODER | {
        "test_model_outputs_equivalence": "it subtracts tensors, and the mask of the frames is boolean",
        "test_batching_equivalence": "it cannot cut the draws into rows; `test_modeling_cosyvoice_flow.py` does",
    }

    def tester(self) -> FlowModelTester:
        return FlowModelTester(self.version)


class Flow2(Flow1):
    version = 2
    all_model_classes = (CosyVoice2FlowModel,)
    config_class = CosyVoice2FlowConfig


class Flow3(Flow1):
    version = 3
    all_model_classes = (CosyVoice3FlowModel,)
    config_class = CosyVoice3FlowConfig


class HiftModelTester:
    """As above, for a HiFT vocoder with given noise."""

    batch_size = 3
    is_training = False

    def __init__(self, version: int) -> None:
        self.version = version

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict]:
        model = tiny_hift(self.version)
        return model.config, {"mel": mel_of(5, rows=self.batch_size), **noise_for(model, 5, rows=self.batch_size)}


class Hift1(Units):
    version = 1
    all_model_classes = (CosyVoiceHiftModel,)
    config_class = CosyVoiceHiftConfig
    not_applicable = UNITS_AND_VOCODER

    def tester(self) -> HiftModelTester:
        return HiftModelTester(self.version)


class Hift3(Hift1):
    version = 3
    all_model_classes = (CosyVoice3HiftModel,)
    config_class = CosyVoice3HiftConfig


UNIT_LM = {
    # `test_modeling_speechgpt_lm.py` compares generate() with that of the plain model.
    "test_correct_missing_keys": "the backbone alone is a Llama, with a Llama's configuration",
    "test_generation_tester_mixin_inheritance": "the source distribution has no generation tests to inherit",
}


class UnitLmModelTester:
    """As above, for a unit language model on a Llama."""

    batch_size = 3
    seq_length = 7
    num_hidden_layers = 2
    num_attention_heads = 2
    hidden_size = 16
    is_training = True

    def prepare_config_and_inputs_for_common(self) -> tuple[SpeechGptConfig, dict]:
        text_config = {**SIZES, "model_type": "llama"}
        config = SpeechGptConfig(text_config=text_config, num_units=NUM_UNITS, first_unit_token_id=FIRST_UNIT)
        ids = torch.randint(3, SIZES["vocab_size"], (self.batch_size, self.seq_length))
        return config, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class UnitLm(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (SpeechGptForCausalLM,)

    def setUp(self) -> None:
        if self._testMethodName in UNIT_LM:
            self.skipTest(UNIT_LM[self._testMethodName])
        self.model_tester = UnitLmModelTester()
        self.config_tester = ConfigTester(self, config_class=SpeechGptConfig, common_properties=[])

    def _prepare_for_class(self, inputs_dict: dict, model_class: type, return_labels: bool = False) -> dict:
        """The mixin knows the labels of transformers' own classes only."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels:
            inputs["labels"] = inputs["input_ids"].clone()
        return inputs

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


SPEECH_LM = {
    "test_resize_tokens_embeddings": "the vocabulary is divided between text and speech and cannot grow at its end",
    "test_resize_embeddings_untied": "as above",
    "test_model_get_set_embeddings": "the head is over speech rows only; what tools see of it is a view",
    "test_correct_missing_keys": "the backbone alone is a Qwen2, with a configuration that is none",
    "test_generation_tester_mixin_inheritance": "the source distribution has no generation tests to inherit",
}


class SpeechLmModelTester:
    """As above, for CosyVoice's Qwen2 over text and speech."""

    batch_size = 3
    seq_length = 7
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    is_training = True

    def prepare_config_and_inputs_for_common(self) -> tuple[CosyVoiceLmConfig, dict]:
        config = CosyVoiceLmConfig(version=3, **{**QWEN, "initializer_range": 0.02})
        ids = torch.randint(config.text_vocab_size, config.stop_token_ids[-1], (self.batch_size, self.seq_length))
        return config, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class SpeechLm(UnitLm):
    all_model_classes = (CosyVoiceLmForCausalLM,)

    def setUp(self) -> None:
        if self._testMethodName in SPEECH_LM:
            self.skipTest(SPEECH_LM[self._testMethodName])
        self.model_tester = SpeechLmModelTester()
        self.config_tester = ConfigTester(self, config_class=CosyVoiceLmConfig, common_properties=[])


TRANSFORMER_LM = SPEECH_LM | {
    "test_hidden_states_output": "hidden states are not recorded: the network is two, of different widths",
    "test_retain_grad_hidden_states_attentions": "as above",
    "test_attention_outputs": "as above",
}


class TransformerLmModelTester(SpeechLmModelTester):
    """As above, for the language model of CosyVoice 1, which continues speech."""

    def prepare_config_and_inputs_for_common(self) -> tuple[CosyVoiceTransformerLmConfig, dict]:
        config = CosyVoiceTransformerLmConfig(**{**TRANSFORMER, "initializer_range": 0.02})
        speech = torch.randint(config.speech_vocab_size, (self.batch_size, self.seq_length))
        text = torch.randint(config.text_vocab_size, (self.batch_size, 5))
        speaker = torch.randn(self.batch_size, config.speaker_embedding_size)
        return config, {"input_ids": speech, "text_ids": text, "speaker_embedding": speaker}


class TransformerLm(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (CosyVoiceTransformerLm,)
    test_resize_embeddings = False
    has_attentions = False

    def setUp(self) -> None:
        if self._testMethodName in TRANSFORMER_LM:
            self.skipTest(TRANSFORMER_LM[self._testMethodName])
        self.model_tester = TransformerLmModelTester()
        self.config_tester = ConfigTester(
            self, config_class=CosyVoiceTransformerLmConfig, has_text_modality=False, common_properties=[]
        )

    def _prepare_for_class(self, inputs_dict: dict, model_class: type, return_labels: bool = False) -> dict:
        """The mixin knows the labels of transformers' own classes only."""
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels:
            inputs["labels"] = torch.nn.functional.pad(
                inputs["input_ids"], (0, 1), value=TRANSFORMER["speech_vocab_size"]
            )
        return inputs

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


def test_every_entry_of_the_skip_list_is_a_test_of_the_mixin() -> None:
    assert len(NOT_APPLICABLE) <= 10
    assert [
        name
        for name in NOT_APPLICABLE | SANM | CODEC | UNITS_AND_VOCODER | UNIT_LM | TRANSFORMER_LM
        if not hasattr(ModelTesterMixin, name)
    ] == []
