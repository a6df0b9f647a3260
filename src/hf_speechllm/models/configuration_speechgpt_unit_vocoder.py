"""Configuration of the unit HiFi-GAN (https://arxiv.org/abs/2104.00355): speech units to a waveform."""

from transformers import PreTrainedConfig, SpeechT5HifiGanConfig


class SpeechGptUnitVocoderConfig(PreTrainedConfig):
    r"""What goes into the generator of a HiFi-GAN, and the generator itself.

    Generator:
        hifigan_config (`dict` or `SpeechT5HifiGanConfig`, *optional*): its `model_in_dim` must be the sum of the
            widths below: `embedding_size` for the units, and again for each of f0 bins, speaker and style.
        weight_norm (`bool`): whether its weights are kept as direction and length, as in training. A model that is
            done has plain weights.

    Input:
        num_units, embedding_size (`int`): rows and width of the embedding of the units.
        use_f0 (`bool`), num_f0_bins (`int`): whether pitch is an input; one of so many bins, embedded, or with 0 bins
            one number per frame.
        f0_range (`list[float]`, *optional*): Hz, lowest and highest, from which [`PitchScale`] makes these bins or
            numbers. `None` where they were made in another way, as those of published models.
        num_speakers (`int`), speaker_embedding_size (`int`): rows of the embedding of speakers, or (one of the two)
            the width of speaker vectors from elsewhere, which are projected. Both 0: one voice.
        num_styles (`int`): rows of the embedding of styles; 0 = none.
        speakers, styles (`list[str]`, *optional*): their names, in the order of the rows.

    Durations:
        duration_hidden_size (`int`): width of the predictor of how many frames a unit lasts; 0 = none, and the units
            given are one per frame.
        duration_kernel_size (`int`), duration_dropout (`float`): of its two convolutions.

    sampling_rate (`int`): Hz.
    """

    model_type = "speechgpt_unit_vocoder"
    sub_configs = {"hifigan_config": SpeechT5HifiGanConfig}

    hifigan_config: dict | PreTrainedConfig | None = None
    weight_norm: bool = False
    num_units: int = 1000
    embedding_size: int = 128
    use_f0: bool = False
    num_f0_bins: int = 0
    f0_range: list[float] | None = None
    num_speakers: int = 0
    speaker_embedding_size: int = 0
    num_styles: int = 0
    speakers: list[str] | None = None
    styles: list[str] | None = None
    duration_hidden_size: int = 128
    duration_kernel_size: int = 3
    duration_dropout: float = 0.5
    sampling_rate: int = 16000
    initializer_range: float = 0.01

    def __post_init__(self, **kwargs) -> None:
        if self.hifigan_config is None:
            self.hifigan_config = SpeechT5HifiGanConfig(
                model_in_dim=self.input_size,
                upsample_rates=[5, 4, 4, 2, 2],
                upsample_kernel_sizes=[11, 8, 8, 4, 4],
                normalize_before=False,
            )
        elif isinstance(self.hifigan_config, dict):
            self.hifigan_config = SpeechT5HifiGanConfig(**self.hifigan_config)
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_speechgpt_unit_vocoder.SpeechGptUnitVocoderConfig",
                "AutoModel": "modeling_speechgpt_unit_vocoder.SpeechGptUnitVocoderModel",
                "AutoModelForTextToWaveform": "modeling_speechgpt_unit_vocoder.SpeechGptUnitVocoderModel",
            },
        )
        super().__post_init__(**kwargs)
        self.validate_architecture_choices()

    def validate_architecture_choices(self) -> None:
        """Refuse contradictory values.

        Raises:
            ValueError: names the field, the expected and the actual value.
        """
        generator = self.hifigan_config
        if generator.model_type != "speecht5_hifigan":
            raise ValueError(f"hifigan_config.model_type: expected 'speecht5_hifigan', got {generator.model_type!r}")
        if generator.model_in_dim != self.input_size:
            raise ValueError(
                f"hifigan_config.model_in_dim: expected {self.input_size}, the sum of the embeddings, got "
                f"{generator.model_in_dim}"
            )
        if generator.normalize_before:
            raise ValueError("hifigan_config.normalize_before: expected false, units have no mean, got true")
        if self.num_speakers and self.speaker_embedding_size:
            raise ValueError("speaker_embedding_size: expected 0 where num_speakers is not 0")
        if self.f0_range is not None:
            if len(self.f0_range) != 2 or not 0 < self.f0_range[0] < self.f0_range[1]:
                raise ValueError(f"f0_range: expected the lowest and the highest pitch in Hz, got {self.f0_range}")
            if self.num_f0_bins == 1:
                raise ValueError("num_f0_bins: expected 0 or at least 2 with f0_range, as bin 0 has no voice, got 1")
        rates, kernels = generator.upsample_rates, generator.upsample_kernel_sizes
        if len(rates) != len(kernels) or any(kernel < rate for rate, kernel in zip(rates, kernels, strict=True)):
            raise ValueError(
                f"hifigan_config.upsample_kernel_sizes: expected one for each of {list(rates)} and none smaller, got "
                f"{list(kernels)}"
            )
        for field, names, count in (
            ("speakers", self.speakers, self.num_speakers),
            ("styles", self.styles, self.num_styles),
        ):
            if names is not None and len(names) > count:
                raise ValueError(f"{field}: expected at most {count} names, got {len(names)}")
            if names is not None and len(set(names)) != len(names):
                raise ValueError(f"{field}: expected different names, got one twice")

    @property
    def input_size(self) -> int:
        """Width of a frame that enters the generator."""
        size = self.embedding_size
        if self.use_f0:
            size += self.embedding_size if self.num_f0_bins else 1
        return size + self.embedding_size * (self.has_speakers + bool(self.num_styles))

    @property
    def has_speakers(self) -> bool:
        """Whether the voice is an input."""
        return bool(self.num_speakers or self.speaker_embedding_size)

    @property
    def hop_length(self) -> int:
        """Samples of one frame; what [`num_samples`] gives may be a few more in all."""
        hop = 1
        for rate in self.hifigan_config.upsample_rates:
            hop *= rate
        return hop

    def num_samples(self, frames: int) -> int:
        """Samples that come out for so many frames."""
        for samples in self.stage_lengths(frames):
            frames = samples
        return frames

    def stage_lengths(self, frames: int) -> list[int]:
        """Length of a sequence of `frames` after each upsampling layer.

        Its padding is (kernel - rate) // 2: a difference that is odd leaves one step more.
        """
        lengths, generator = [], self.hifigan_config
        for rate, kernel in zip(generator.upsample_rates, generator.upsample_kernel_sizes, strict=True):
            frames = frames and (frames - 1) * rate - 2 * ((kernel - rate) // 2) + kernel
            lengths.append(frames)
        return lengths


SpeechGptUnitVocoderConfig.register_for_auto_class()
