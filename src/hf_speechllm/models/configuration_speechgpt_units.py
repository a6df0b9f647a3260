"""Configuration of SpeechGPT's speech units: a HuBERT layer and the k-means codebook over it."""

from transformers import HubertConfig, PreTrainedConfig


class SpeechGptUnitsConfig(PreTrainedConfig):
    r"""HuBERT, which of its layers is quantised, and how long recordings are cut.

    Args:
        hubert_config (`dict` or `HubertConfig`, *optional*): the network. Its `num_hidden_layers` may exceed `layer`;
            later layers are kept, so that another layer can be chosen, and not computed.
        layer (`int`): the layer that is quantised, from 1. Layer n is `hidden_states[n]` of `HubertModel`; 0 is what
            enters the first layer.
        num_units (`int`): rows of the codebook.
        normalize (`bool`): whether every recording is shifted and scaled to mean 0 and variance 1 before it enters the
            network, as its training had it. The model does this itself, without the padding; the feature extractor
            must leave the waveform alone.
        normalize_eps (`float`): added to the variance: 1e-5 in fairseq, 1e-7 in `Wav2Vec2FeatureExtractor`.
        max_chunk_samples (`int`): longer recordings are computed in pieces of so many samples.
        seamless_chunks (`bool`): pieces overlap and share the statistics of the recording, so that there are as many
            units as in one pass and no edges between pieces. `False` is upstream's way: every piece is encoded as if
            it were a recording of its own, and each cut loses a frame or so.
        context_samples (`int`): how much a seamless piece sees of the recording before and after itself.
        sampling_rate (`int`): Hz.
    """

    model_type = "speechgpt_units"
    sub_configs = {"hubert_config": HubertConfig}

    hubert_config: dict | PreTrainedConfig | None = None
    layer: int = 11
    num_units: int = 1000
    normalize: bool = False
    normalize_eps: float = 1e-5
    max_chunk_samples: int = 1_600_000
    seamless_chunks: bool = True
    context_samples: int = 160_000
    sampling_rate: int = 16000
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs) -> None:
        if self.hubert_config is None:
            self.hubert_config = HubertConfig()
        elif isinstance(self.hubert_config, dict):
            self.hubert_config = HubertConfig(**self.hubert_config)
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_speechgpt_units.SpeechGptUnitsConfig",
                "AutoModel": "modeling_speechgpt_units.SpeechGptUnitsModel",
            },
        )
        super().__post_init__(**kwargs)
        self.validate_architecture_choices()

    def validate_architecture_choices(self) -> None:
        """Refuse contradictory values.

        Raises:
            ValueError: names the field, the expected and the actual value.
        """
        if self.hubert_config.model_type != "hubert":
            raise ValueError(f"hubert_config.model_type: expected 'hubert', got {self.hubert_config.model_type!r}")
        layers = self.hubert_config.num_hidden_layers
        if not 1 <= self.layer <= layers:
            raise ValueError(f"layer: expected 1..{layers} (num_hidden_layers), got {self.layer}")
        if self.num_units < 1:
            raise ValueError(f"num_units: expected at least 1, got {self.num_units}")
        if self.max_chunk_samples < self.receptive_field:
            raise ValueError(
                f"max_chunk_samples: expected at least {self.receptive_field}, the samples of one frame, got "
                f"{self.max_chunk_samples}"
            )
        if self.context_samples < 0:
            raise ValueError(f"context_samples: expected at least 0, got {self.context_samples}")

    @property
    def hidden_size(self) -> int:
        """Width of the quantised vectors."""
        return self.hubert_config.hidden_size

    @property
    def hop_length(self) -> int:
        """Samples from one frame to the next."""
        hop = 1
        for stride in self.hubert_config.conv_stride:
            hop *= stride
        return hop

    @property
    def receptive_field(self) -> int:
        """Samples that the convolutions need for one frame; frame `n` starts at sample `n * hop_length`."""
        samples = 1
        for kernel, stride in zip(
            reversed(self.hubert_config.conv_kernel), reversed(self.hubert_config.conv_stride), strict=True
        ):
            samples = (samples - 1) * stride + kernel
        return samples

    def num_frames(self, samples: int) -> int:
        """Frames of a recording of so many samples; 0 where it is shorter than the receptive field."""
        return max(0, (samples - self.receptive_field) // self.hop_length + 1)


SpeechGptUnitsConfig.register_for_auto_class()
