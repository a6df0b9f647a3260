"""Configuration of CosyVoice 3's causal HiFT vocoder."""

from .configuration_cosyvoice_hift import CosyVoiceHiftConfig


# As many numbers are drawn when a model is made.
_MAX_DRAWN = 1 << 26


class CosyVoice3HiftConfig(CosyVoiceHiftConfig):
    r"""[`CosyVoiceHiftConfig`] for convolutions that look back only.

    Args:
        look_ahead_frames (`int`): mel frames after its own that the first convolution sees. f0_look_ahead_frames
            (`int`): the same for the network that finds the fundamental frequency.
        layers_before_noise (`list[list[int]]`): sizes (inputs, outputs) of the embedding and the linear layer that
            upstream initialises between setting its seed and drawing the vocoder's noise; which noise that is depends
            on them. The published ones by default.
    """

    model_type = "cosyvoice3_hift"

    phase_interpolation: str = "nearest"
    look_ahead_frames: int = 4
    f0_look_ahead_frames: int = 3
    layers_before_noise: list[list[int]] | None = None

    def __post_init__(self, **kwargs) -> None:
        self.layers_before_noise = [list(size) for size in self.layers_before_noise or [[6561, 80], [192, 80]]]
        super().__post_init__(**kwargs)

    def auto_classes(self) -> dict[str, str]:
        """Which Auto classes answer; written into every config.json."""
        model = "modeling_cosyvoice3_hift.CosyVoice3HiftModel"
        return {
            "AutoConfig": "configuration_cosyvoice3_hift.CosyVoice3HiftConfig",
            "AutoModel": model,
            "AutoModelForTextToWaveform": model,
        }

    @property
    def is_causal(self) -> bool:
        """Whether convolutions look back only."""
        return True

    def validate_architecture_choices(self) -> None:
        """Refuse values that no vocoder has.

        Raises:
            ValueError: names the field, the expected and the actual value.
        """
        super().validate_architecture_choices()
        for name in ("look_ahead_frames", "f0_look_ahead_frames"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        sizes = self.layers_before_noise
        if [len(size) for size in sizes] != [2, 2] or min(map(min, sizes)) < 1:
            raise ValueError(f"layers_before_noise: expected two pairs of positive sizes, got {sizes}")
        if any(first * second > _MAX_DRAWN for first, second in sizes):
            raise ValueError(f"layers_before_noise: expected layers of at most {_MAX_DRAWN} weights, got {sizes}")


CosyVoice3HiftConfig.register_for_auto_class()
