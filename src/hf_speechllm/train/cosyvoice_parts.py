"""Parts of a complete CosyVoice, for the scripts that train them one by one."""

from typing import Any

from transformers import AutoConfig, AutoFeatureExtractor, AutoModelForTextToWaveform, PreTrainedModel


# What a mel feature extractor and that of a complete CosyVoice have in common.
_MEL_FIELDS = ("feature_size", "sampling_rate", "fft_length", "hop_length", "high_freq")


def is_complete_cosyvoice(name: str | None, trust_remote_code: bool = False) -> bool:
    """Whether a folder or Hub id is a complete CosyVoice."""
    if name is None:
        return False
    return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code).model_type == "cosyvoice"


def load_cosyvoice_part(
    name: str, part: str, fields: dict[str, Any], trust_remote_code: bool = False, **options: Any
) -> PreTrainedModel:
    """One part by itself.

    Args:
        name: folder or Hub id of a complete CosyVoice.
        part: `"lm"`, `"flow"` or `"vocoder"`.
        fields: of the part's configuration, in place of its own.
        options: of `from_pretrained`.
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    for key, value in fields.items():
        setattr(getattr(config, f"{part}_config"), key, value)
    whole = AutoModelForTextToWaveform.from_pretrained(
        name, config=config, trust_remote_code=trust_remote_code, **options
    )
    return getattr(whole, part)


def cosyvoice_mel_fields(name: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """Arguments of the `CosyVoiceMelFeatureExtractor` whose spectrograms a complete CosyVoice reads."""
    extractor = AutoFeatureExtractor.from_pretrained(name, trust_remote_code=trust_remote_code)
    return {key: getattr(extractor, key) for key in _MEL_FIELDS}
