"""Configuration of CosyVoice's HiFT vocoder (https://arxiv.org/abs/2309.09493), versions 1 and 2."""

import math

from transformers import PreTrainedConfig


class CosyVoiceHiftConfig(PreTrainedConfig):
    r"""A neural source-filter vocoder with an inverse Fourier transform behind it.

    Input and output:
        num_mel_bins (`int`): of the log-mel spectrogram. sampling_rate (`int`): Hz.
        audio_limit (`float`): samples are clamped to it.

    Excitation, see `sine_source.py`:
        num_harmonics (`int`): above the fundamental. phase_interpolation (`str`): `"sample"` (version 1), `"linear"`
            (version 2), `"nearest"` (version 3).
        sine_amplitude, noise_std, voiced_threshold (`float`): the last in Hz.
        f0_hidden_size (`int`): width of the network that finds the fundamental frequency.

    Filter:
        hidden_size (`int`): channels of the frames; half as many after every stage.
        upsample_rates, upsample_kernel_sizes (`list[int]`): of the stages.
        resblock_kernel_sizes, resblock_dilation_sizes: of the residual blocks of a stage, whose mean is taken.
        source_resblock_kernel_sizes, source_resblock_dilation_sizes: of the block that the excitation goes through,
            one for every stage.
        leaky_relu_slope (`float`): in front of every stage; it is 0.01 behind the last.
        istft_n_fft, istft_hop_length (`int`): samples of a frame of the inverse transform, and between two.

    weight_norm (`bool`): whether weights are kept as magnitude and direction, as in training and in upstream's files.
        `fold_weight_norm` makes plain weights of them, with which a model is faster.
    overlap_frames (`int`): mel frames that upstream's streaming keeps and computes again, for
        `compatibility="upstream"`.
    """

    model_type = "cosyvoice_hift"

    num_mel_bins: int = 80
    sampling_rate: int = 24000
    audio_limit: float = 0.99

    num_harmonics: int = 8
    phase_interpolation: str = "linear"
    sine_amplitude: float = 0.1
    noise_std: float = 0.003
    voiced_threshold: float = 10.0
    f0_hidden_size: int = 512

    hidden_size: int = 512
    upsample_rates: list[int] | None = None
    upsample_kernel_sizes: list[int] | None = None
    resblock_kernel_sizes: list[int] | None = None
    resblock_dilation_sizes: list[list[int]] | None = None
    source_resblock_kernel_sizes: list[int] | None = None
    source_resblock_dilation_sizes: list[list[int]] | None = None
    leaky_relu_slope: float = 0.1
    istft_n_fft: int = 16
    istft_hop_length: int = 4

    weight_norm: bool = True
    overlap_frames: int = 8

    def __post_init__(self, **kwargs) -> None:
        self.upsample_rates = list(self.upsample_rates or [8, 5, 3])
        self.upsample_kernel_sizes = list(self.upsample_kernel_sizes or [16, 11, 7])
        self.resblock_kernel_sizes = list(self.resblock_kernel_sizes or [3, 7, 11])
        self.resblock_dilation_sizes = [list(row) for row in self.resblock_dilation_sizes or [[1, 3, 5]] * 3]
        self.source_resblock_kernel_sizes = list(self.source_resblock_kernel_sizes or [7, 7, 11])
        self.source_resblock_dilation_sizes = [
            list(row) for row in self.source_resblock_dilation_sizes or [[1, 3, 5]] * 3
        ]
        kwargs.setdefault("auto_map", self.auto_classes())
        super().__post_init__(**kwargs)
        self.validate_architecture_choices()

    def auto_classes(self) -> dict[str, str]:
        """Which Auto classes answer; written into every config.json."""
        model = "modeling_cosyvoice_hift.CosyVoiceHiftModel"
        return {
            "AutoConfig": "configuration_cosyvoice_hift.CosyVoiceHiftConfig",
            "AutoModel": model,
            "AutoModelForTextToWaveform": model,
        }

    @property
    def is_causal(self) -> bool:
        """Whether convolutions look back only."""
        return False

    @property
    def hop_length(self) -> int:
        """Samples per mel frame."""
        return math.prod(self.upsample_rates) * self.istft_hop_length

    def validate_architecture_choices(self) -> None:
        """Refuse values that no vocoder has.

        Raises:
            ValueError: names the field, the expected and the actual value.
        """
        at_least = {
            **dict.fromkeys(("num_mel_bins", "sampling_rate", "f0_hidden_size", "hidden_size"), 1),
            **dict.fromkeys(("istft_n_fft", "istft_hop_length", "overlap_frames"), 1),
            **dict.fromkeys(("num_harmonics", "sine_amplitude", "noise_std", "voiced_threshold", "audio_limit"), 0),
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if self.phase_interpolation not in ("sample", "linear", "nearest"):
            raise ValueError(
                f"phase_interpolation: expected 'sample', 'linear' or 'nearest', got {self.phase_interpolation!r}"
            )
        if self.istft_n_fft % 2 or self.istft_n_fft < 2 * self.istft_hop_length:
            raise ValueError(
                f"istft_n_fft: expected an even number of at least two hops of {self.istft_hop_length}, "
                f"got {self.istft_n_fft}"
            )
        stages = len(self.upsample_rates)
        if self.hidden_size >> stages < 1:
            raise ValueError(
                f"hidden_size: expected at least {1 << stages} for {stages} stages, got {self.hidden_size}"
            )
        for name in ("upsample_kernel_sizes", "source_resblock_kernel_sizes", "source_resblock_dilation_sizes"):
            if len(getattr(self, name)) != stages:
                raise ValueError(f"{name}: expected one for each of {stages} stages, got {getattr(self, name)}")
        if len(self.resblock_dilation_sizes) != len(self.resblock_kernel_sizes):
            raise ValueError(
                f"resblock_dilation_sizes: expected one list for each of {self.resblock_kernel_sizes}, "
                f"got {self.resblock_dilation_sizes}"
            )
        for rate, kernel in zip(self.upsample_rates, self.upsample_kernel_sizes, strict=True):
            fits = kernel >= rate and (self.is_causal or (kernel - rate) % 2 == 0)
            if rate < 1 or not fits:
                raise ValueError(
                    "upsample_kernel_sizes: expected each to be its rate"
                    f"{'' if self.is_causal else ' and an even number more'}, got {kernel} for {rate}"
                )
        kernels = [*self.resblock_kernel_sizes, *self.source_resblock_kernel_sizes]
        dilations = [*self.resblock_dilation_sizes, *self.source_resblock_dilation_sizes]
        if not kernels or any(kernel < 1 or kernel % 2 == 0 for kernel in kernels):
            raise ValueError(f"resblock kernel sizes: expected odd numbers, got {kernels}")
        if any(not row or min(row) < 1 for row in dilations):
            raise ValueError(f"resblock dilation sizes: expected lists of positive numbers, got {dilations}")


CosyVoiceHiftConfig.register_for_auto_class()
