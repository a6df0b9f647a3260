"""Configuration of a complete CosyVoice: language model, flow, vocoder, and the two encoders of a prompt.

Papers: https://arxiv.org/abs/2407.05407 (1), https://arxiv.org/abs/2412.10117 (2),
https://arxiv.org/abs/2505.17589 (3).
"""

from transformers import AutoConfig, PreTrainedConfig

from .configuration_campplus import CampplusConfig
from .configuration_cosyvoice2_flow import CosyVoice2FlowConfig
from .configuration_cosyvoice3_flow import CosyVoice3FlowConfig
from .configuration_cosyvoice3_hift import CosyVoice3HiftConfig
from .configuration_cosyvoice_flow import CosyVoiceFlowConfig
from .configuration_cosyvoice_hift import CosyVoiceHiftConfig
from .configuration_cosyvoice_lm import CosyVoiceLmConfig
from .configuration_cosyvoice_transformer_lm import CosyVoiceTransformerLmConfig
from .configuration_s3_tokenizer import S3TokenizerConfig


# What each part may be; the first is the default.
PARTS = {
    "lm_config": (CosyVoiceLmConfig, CosyVoiceTransformerLmConfig),
    "flow_config": (CosyVoice2FlowConfig, CosyVoiceFlowConfig, CosyVoice3FlowConfig),
    "vocoder_config": (CosyVoiceHiftConfig, CosyVoice3HiftConfig),
    "speech_tokenizer_config": (S3TokenizerConfig,),
    "speaker_encoder_config": (CampplusConfig,),
}
_NOT_OF_PARTS = {"_name_or_path", "auto_map", "custom_pipelines", "transformers_version"}


class CosyVoiceConfig(PreTrainedConfig):
    r"""The parts of a synthesiser.

    Args:
        version (`int`): 1, 2 or 3; which prompts the language model expects, and how a prompt's tokens and frames are
            aligned.
        lm_config (`dict` or configuration): `cosyvoice_lm` (versions 2 and 3) or `cosyvoice_transformer_lm` (1).
        flow_config: `cosyvoice_flow`, `cosyvoice2_flow` or `cosyvoice3_flow`.
        vocoder_config: `cosyvoice_hift` (1 and 2) or `cosyvoice3_hift`.
        speech_tokenizer_config: `s3_tokenizer`. speaker_encoder_config: `campplus`.
    """

    model_type = "cosyvoice"
    sub_configs = dict.fromkeys(PARTS, AutoConfig)

    version: int = 2
    lm_config: dict | PreTrainedConfig | None = None
    flow_config: dict | PreTrainedConfig | None = None
    vocoder_config: dict | PreTrainedConfig | None = None
    speech_tokenizer_config: dict | PreTrainedConfig | None = None
    speaker_encoder_config: dict | PreTrainedConfig | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs) -> None:
        for name, classes in PARTS.items():
            setattr(self, name, read_part(name, getattr(self, name), classes))
        model = "modeling_cosyvoice.CosyVoiceForTextToWaveform"
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_cosyvoice.CosyVoiceConfig",
                "AutoModel": model,
                "AutoModelForTextToWaveform": model,
            },
        )
        kwargs.setdefault(
            "custom_pipelines",
            {
                "text-to-speech": {
                    "impl": "pipeline_cosyvoice.CosyVoiceTextToSpeechPipeline",
                    "pt": ["AutoModelForTextToWaveform"],
                    "type": "text",
                }
            },
        )
        super().__post_init__(**kwargs)
        self.validate_architecture_choices()

    def validate_architecture_choices(self) -> None:
        """Refuse parts that do not fit together.

        Raises:
            ValueError: names the field, the expected and the actual value.
        """
        if self.version not in (1, 2, 3):
            raise ValueError(f"version: expected 1, 2 or 3, got {self.version!r}")
        bins = self.flow_config.num_mel_bins
        if self.vocoder_config.num_mel_bins != bins:
            raise ValueError(
                f"vocoder_config.num_mel_bins: expected {bins}, that of flow_config, got "
                f"{self.vocoder_config.num_mel_bins}"
            )
        codes = self.speech_tokenizer_config.codebook_size
        if self.flow_config.vocab_size != codes:
            raise ValueError(
                f"flow_config.vocab_size: expected {codes}, the speech tokenizer's codebook, got "
                f"{self.flow_config.vocab_size}"
            )
        if self.lm_config.speech_vocab_size != codes:
            raise ValueError(
                f"lm_config.speech_vocab_size: expected {codes}, the speech tokenizer's codebook, got "
                f"{self.lm_config.speech_vocab_size}"
            )

    def to_dict(self) -> dict:
        """As in transformers; a part says neither where it came from nor which files it needs, because the whole
        brings them."""
        output = super().to_dict()
        for name in PARTS:
            output[name] = {key: value for key, value in output[name].items() if key not in _NOT_OF_PARTS}
        return output

    @property
    def sampling_rate(self) -> int:
        """Hz of the waveforms."""
        return self.vocoder_config.sampling_rate

    @property
    def aligns_prompts(self) -> bool:
        """Whether a prompt's frames are cut to a whole number of its tokens (versions 2 and 3)."""
        return self.version != 1


def read_part(name: str, value: dict | PreTrainedConfig | None, classes: tuple[type, ...]) -> PreTrainedConfig:
    """One part's configuration out of a dictionary, which says by its `model_type` what it is.

    Raises:
        ValueError: another `model_type`.
    """
    if value is None:
        return classes[0]()
    known = {part.model_type: part for part in classes}
    if isinstance(value, PreTrainedConfig):
        # A class of remote code is another object with the same name.
        if value.model_type not in known:
            raise ValueError(f"{name}.model_type: expected one of {sorted(known)}, got {value.model_type!r}")
        return value
    kind = value.get("model_type")
    if kind not in known:
        raise ValueError(f"{name}.model_type: expected one of {sorted(known)}, got {kind!r}")
    return known[kind](**{key: entry for key, entry in value.items() if key != "model_type"})


CosyVoiceConfig.register_for_auto_class()
