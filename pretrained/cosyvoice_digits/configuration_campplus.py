"""Configuration of CAM++, the speaker encoder of CosyVoice."""

from transformers import PreTrainedConfig


class CampplusConfig(PreTrainedConfig):
    r"""A convolutional front end over time and frequency, dense blocks of time-delay layers, statistics pooling.

    Args:
        num_mel_bins (`int`): Kaldi filter banks, mean of the recording subtracted; a multiple of 8.
        head_channels (`int`): of the two-dimensional front end.
        num_head_blocks (`list[int]`): residual blocks of its two stages.
        initial_size (`int`): channels that enter the dense blocks.
        growth_rate (`int`): channels that every dense layer adds.
        bottleneck_size (`int`): channels inside a dense layer; half of them carry the context gate.
        num_block_layers, block_dilations (`list[int]`): of the dense blocks.
        kernel_size (`int`): of a dense layer's convolution, odd.
        segment_length (`int`): frames (of 20 ms) over which the context gate averages, beside the whole recording.
        embedding_size (`int`): size of the speaker embedding.
        batch_norm_eps (`float`): epsilon of the norms.
    """

    model_type = "campplus"

    num_mel_bins: int = 80
    head_channels: int = 32
    num_head_blocks: list[int] | tuple[int, ...] = (2, 2)
    initial_size: int = 128
    growth_rate: int = 32
    bottleneck_size: int = 128
    num_block_layers: list[int] | tuple[int, ...] = (12, 24, 16)
    block_dilations: list[int] | tuple[int, ...] = (1, 2, 2)
    kernel_size: int = 3
    segment_length: int = 100
    embedding_size: int = 192
    batch_norm_eps: float = 1e-5
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs) -> None:
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_campplus.CampplusConfig",
                "AutoModel": "modeling_campplus.CampplusModel",
            },
        )
        super().__post_init__(**kwargs)
        self.num_head_blocks = list(self.num_head_blocks)
        self.num_block_layers = list(self.num_block_layers)
        self.block_dilations = list(self.block_dilations)
        self.validate_architecture_choices()

    def validate_architecture_choices(self) -> None:
        """Refuse contradictory values.

        Raises:
            ValueError: names the field, the expected and the actual value.
        """
        if self.num_mel_bins % 8:
            raise ValueError(f"num_mel_bins: expected a multiple of 8, got {self.num_mel_bins}")
        if len(self.num_head_blocks) != 2:
            raise ValueError(f"num_head_blocks: expected 2 stages, got {self.num_head_blocks}")
        if len(self.num_block_layers) != len(self.block_dilations) or not self.num_block_layers:
            raise ValueError(
                f"block_dilations: expected one for each of num_block_layers {self.num_block_layers}, got "
                f"{self.block_dilations}"
            )
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {self.kernel_size}")


CampplusConfig.register_for_auto_class()
