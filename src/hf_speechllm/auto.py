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
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor

from .models.configuration_wenet_u2pp import WenetU2ppConfig
from .models.feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor
from .models.modeling_wenet_u2pp import WenetU2ppForSpeechRecognition
from .models.processing_wenet_u2pp import WenetU2ppProcessor
from .models.tokenization_wenet_u2pp import WenetU2ppTokenizer


@dataclass(frozen=True)
class Family:
    """One model family: `model` is what every class in `auto_models` loads; the first of them is the main one."""

    config: type[PreTrainedConfig]
    model: type[PreTrainedModel]
    auto_models: tuple[type, ...]
    feature_extractor: type[SequenceFeatureExtractor]
    tokenizer: type[PreTrainedTokenizerBase]
    processor: type[ProcessorMixin]


FAMILIES = (
    Family(
        config=WenetU2ppConfig,
        model=WenetU2ppForSpeechRecognition,
        auto_models=(AutoModelForSpeechSeq2Seq, AutoModelForCTC, AutoModel),
        feature_extractor=KaldiFbankFeatureExtractor,
        tokenizer=WenetU2ppTokenizer,
        processor=WenetU2ppProcessor,
    ),
)

for family in FAMILIES:
    AutoConfig.register(family.config.model_type, family.config, exist_ok=True)
    AutoFeatureExtractor.register(family.config, family.feature_extractor, exist_ok=True)
    AutoTokenizer.register(family.config, tokenizer_class=family.tokenizer, exist_ok=True)
    AutoProcessor.register(family.config, family.processor, exist_ok=True)
    for auto_model in family.auto_models:
        auto_model.register(family.config, family.model, exist_ok=True)

    family.config.register_for_auto_class()
    family.model.register_for_auto_class(family.auto_models[0].__name__)
    family.feature_extractor.register_for_auto_class()
    family.tokenizer.register_for_auto_class()
    family.processor.register_for_auto_class()
