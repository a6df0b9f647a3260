"""The one table of families. Importing this module registers each of them with transformers' Auto classes.

A family is a row: its configuration class, the model class that the listed Auto classes give, and the processor parts.
Registration has two halves:

* `AutoX.register(...)` lets the *installed* package load a checkpoint without remote code;
* `register_for_auto_class` makes `save_pretrained` copy the code files beside the weights, so that a checkpoint saved
  here (a fine-tune, or a fine-tune of a fine-tune) loads with `trust_remote_code=True` where the package is not
  installed.
"""

from dataclasses import dataclass

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioFrameClassification,
    AutoModelForAudioTokenization,
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoModelForTextToWaveform,
    AutoModelForTokenClassification,
    AutoProcessor,
    AutoTokenizer,
    EncodecFeatureExtractor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Wav2Vec2FeatureExtractor,
)
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

from .models.configuration_campplus import CampplusConfig
from .models.configuration_cosyvoice import CosyVoiceConfig
from .models.configuration_cosyvoice2_flow import CosyVoice2FlowConfig
from .models.configuration_cosyvoice3_flow import CosyVoice3FlowConfig
from .models.configuration_cosyvoice3_hift import CosyVoice3HiftConfig
from .models.configuration_cosyvoice_flow import CosyVoiceFlowConfig
from .models.configuration_cosyvoice_hift import CosyVoiceHiftConfig
from .models.configuration_cosyvoice_lm import CosyVoiceLmConfig
from .models.configuration_cosyvoice_transformer_lm import CosyVoiceTransformerLmConfig
from .models.configuration_funasr_ct_transformer import FunasrCtTransformerConfig
from .models.configuration_funasr_fsmn_vad import FunasrFsmnVadConfig
from .models.configuration_funasr_paraformer import FunasrParaformerConfig
from .models.configuration_funasr_sensevoice import FunasrSenseVoiceConfig
from .models.configuration_s3_tokenizer import S3TokenizerConfig
from .models.configuration_speechgpt_lm import SpeechGptConfig
from .models.configuration_speechgpt_unit_vocoder import SpeechGptUnitVocoderConfig
from .models.configuration_speechgpt_units import SpeechGptUnitsConfig
from .models.configuration_speechtokenizer import SpeechTokenizerConfig
from .models.configuration_wenet_u2pp import WenetU2ppConfig
from .models.feature_extraction_campplus import CampplusFeatureExtractor
from .models.feature_extraction_cosyvoice import CosyVoiceFeatureExtractor
from .models.feature_extraction_cosyvoice_mel import CosyVoiceMelFeatureExtractor
from .models.feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor
from .models.feature_extraction_s3_tokenizer import S3FeatureExtractor
from .models.modeling_campplus import CampplusModel
from .models.modeling_cosyvoice import CosyVoiceForTextToWaveform
from .models.modeling_cosyvoice2_flow import CosyVoice2FlowModel
from .models.modeling_cosyvoice3_flow import CosyVoice3FlowModel
from .models.modeling_cosyvoice3_hift import CosyVoice3HiftModel
from .models.modeling_cosyvoice_flow import CosyVoiceFlowModel
from .models.modeling_cosyvoice_hift import CosyVoiceHiftModel
from .models.modeling_cosyvoice_lm import CosyVoiceLmForCausalLM
from .models.modeling_cosyvoice_transformer_lm import CosyVoiceTransformerLm
from .models.modeling_funasr_ct_transformer import FunasrCtTransformerForTokenClassification
from .models.modeling_funasr_fsmn_vad import FunasrFsmnVadForAudioFrameClassification
from .models.modeling_funasr_paraformer import FunasrParaformerForSpeechRecognition
from .models.modeling_funasr_sensevoice import FunasrSenseVoiceForSpeechRecognition
from .models.modeling_s3_tokenizer import S3TokenizerForCTC, S3TokenizerModel
from .models.modeling_speechgpt_lm import SpeechGptForCausalLM
from .models.modeling_speechgpt_unit_vocoder import SpeechGptUnitVocoderModel
from .models.modeling_speechgpt_units import SpeechGptUnitsModel
from .models.modeling_speechtokenizer import SpeechTokenizerModel
from .models.modeling_wenet_u2pp import WenetU2ppForSpeechRecognition
from .models.processing_cosyvoice import CosyVoiceProcessor
from .models.processing_funasr_paraformer import FunasrParaformerProcessor
from .models.processing_funasr_sensevoice import FunasrSenseVoiceProcessor
from .models.processing_speechgpt_lm import SpeechGptProcessor
from .models.processing_wenet_u2pp import WenetU2ppProcessor
from .models.tokenization_funasr_paraformer import FunasrParaformerTokenizer
from .models.tokenization_funasr_sensevoice import FunasrSenseVoiceTokenizer
from .models.tokenization_wenet_u2pp import WenetU2ppTokenizer


@dataclass(frozen=True)
class Family:
    """One model family: `model` is what every class in `auto_models` loads; the first of them is the main one.

    A detector of speech has no text, hence neither tokenizer nor processor; a punctuation model has no audio, and the
    tokenizer of transformers itself.
    """

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    auto_models: tuple[type, ...]
    feature_extractor: type[SequenceFeatureExtractor] | None = None
    tokenizer: type[PreTrainedTokenizerBase] | None = None
    processor: type[ProcessorMixin] | None = None


FAMILIES = (
    Family(
        config=WenetU2ppConfig,
        model=WenetU2ppForSpeechRecognition,
        auto_models=(AutoModelForSpeechSeq2Seq, AutoModelForCTC, AutoModel),
        feature_extractor=KaldiFbankFeatureExtractor,
        tokenizer=WenetU2ppTokenizer,
        processor=WenetU2ppProcessor,
    ),
    Family(
        config=FunasrParaformerConfig,
        model=FunasrParaformerForSpeechRecognition,
        auto_models=(AutoModelForSpeechSeq2Seq, AutoModel),
        feature_extractor=KaldiFbankFeatureExtractor,
        tokenizer=FunasrParaformerTokenizer,
        processor=FunasrParaformerProcessor,
    ),
    Family(
        config=FunasrSenseVoiceConfig,
        model=FunasrSenseVoiceForSpeechRecognition,
        auto_models=(AutoModelForSpeechSeq2Seq, AutoModelForCTC, AutoModel),
        feature_extractor=KaldiFbankFeatureExtractor,
        tokenizer=FunasrSenseVoiceTokenizer,
        processor=FunasrSenseVoiceProcessor,
    ),
    Family(
        config=FunasrFsmnVadConfig,
        model=FunasrFsmnVadForAudioFrameClassification,
        auto_models=(AutoModel, AutoModelForAudioFrameClassification),
        feature_extractor=KaldiFbankFeatureExtractor,
    ),
    Family(
        config=FunasrCtTransformerConfig,
        model=FunasrCtTransformerForTokenClassification,
        auto_models=(AutoModel, AutoModelForTokenClassification),
    ),
    Family(
        config=SpeechGptUnitsConfig,
        model=SpeechGptUnitsModel,
        auto_models=(AutoModel,),
        feature_extractor=Wav2Vec2FeatureExtractor,
    ),
    Family(
        config=SpeechGptUnitVocoderConfig,
        model=SpeechGptUnitVocoderModel,
        auto_models=(AutoModel, AutoModelForTextToWaveform),
    ),
    Family(
        config=SpeechTokenizerConfig,
        model=SpeechTokenizerModel,
        auto_models=(AutoModel, AutoModelForAudioTokenization),
        feature_extractor=EncodecFeatureExtractor,
    ),
    Family(
        # The tokenizer is a plain `tokenizer.json`.
        config=SpeechGptConfig,
        model=SpeechGptForCausalLM,
        auto_models=(AutoModelForCausalLM,),
        processor=SpeechGptProcessor,
    ),
    Family(
        config=S3TokenizerConfig,
        model=S3TokenizerModel,
        auto_models=(AutoModel, AutoModelForAudioTokenization),
        feature_extractor=S3FeatureExtractor,
    ),
    Family(
        config=CosyVoiceHiftConfig,
        model=CosyVoiceHiftModel,
        auto_models=(AutoModel, AutoModelForTextToWaveform),
        feature_extractor=CosyVoiceMelFeatureExtractor,
    ),
    Family(
        config=CosyVoice3HiftConfig,
        model=CosyVoice3HiftModel,
        auto_models=(AutoModel, AutoModelForTextToWaveform),
        feature_extractor=CosyVoiceMelFeatureExtractor,
    ),
    Family(
        config=CampplusConfig,
        model=CampplusModel,
        auto_models=(AutoModel,),
        feature_extractor=CampplusFeatureExtractor,
    ),
    Family(
        # The tokenizer is a plain `tokenizer.json`.
        config=CosyVoiceConfig,
        model=CosyVoiceForTextToWaveform,
        auto_models=(AutoModelForTextToWaveform, AutoModel),
        feature_extractor=CosyVoiceFeatureExtractor,
        processor=CosyVoiceProcessor,
    ),
    Family(config=CosyVoiceLmConfig, model=CosyVoiceLmForCausalLM, auto_models=(AutoModelForCausalLM,)),
    Family(config=CosyVoiceTransformerLmConfig, model=CosyVoiceTransformerLm, auto_models=(AutoModel,)),
    Family(config=CosyVoiceFlowConfig, model=CosyVoiceFlowModel, auto_models=(AutoModel,)),
    Family(config=CosyVoice2FlowConfig, model=CosyVoice2FlowModel, auto_models=(AutoModel,)),
    Family(config=CosyVoice3FlowConfig, model=CosyVoice3FlowModel, auto_models=(AutoModel,)),
)

for family in FAMILIES:
    AutoConfig.register(family.config.model_type, family.config, exist_ok=True)
    family.config.register_for_auto_class()
    for auto_model in family.auto_models:
        auto_model.register(family.config, family.model, exist_ok=True)
    family.model.register_for_auto_class(family.auto_models[0].__name__)
    if family.feature_extractor is not None:
        AutoFeatureExtractor.register(family.config, family.feature_extractor, exist_ok=True)
        if family.feature_extractor.__module__.startswith(__package__):  # transformers' own need no code to travel
            family.feature_extractor.register_for_auto_class()
    if family.tokenizer is not None:
        AutoTokenizer.register(family.config, tokenizer_class=family.tokenizer, exist_ok=True)
        family.tokenizer.register_for_auto_class()
    if family.processor is not None:
        AutoProcessor.register(family.config, family.processor, exist_ok=True)
        family.processor.register_for_auto_class()

# The recogniser that trains a speech tokenizer has the tokenizer's configuration and is no family of its own.
AutoModelForCTC.register(S3TokenizerConfig, S3TokenizerForCTC, exist_ok=True)
S3TokenizerForCTC.register_for_auto_class("AutoModelForCTC")
