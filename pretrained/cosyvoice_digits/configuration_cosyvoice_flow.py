"""Configuration of CosyVoice 1's flow (https://arxiv.org/abs/2407.05407): speech tokens to a mel spectrogram."""

from .token_flow_config import TokenFlowConfig, validate_encoder, validate_unet


class CosyVoiceFlowConfig(TokenFlowConfig):
    r"""Encoder of the tokens, length regulator and U-Net, at the values of the published 50 Hz model.

    Encoder (see `relative_position_encoder.py`):
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size (`int`), hidden_act (`str`).
        hidden_dropout, position_dropout, attention_dropout (`float`).
        normalize_before, macaron_style, key_bias (`bool`).

    Length regulator (see `length_regulator.py`):
        num_regulator_layers (`int`), regulator_groups (`int`): convolutions, and groups of their norms.

    Velocity network (see `unet_1d.py`):
        estimator_channels (`list[int]`): of each rate; between two of them the frame rate halves. Multiples of 8.
        estimator_layers_per_stage, estimator_num_mid_stages (`int`): transformer layers, and stages in the middle.
        estimator_num_attention_heads, estimator_head_dim (`int`), estimator_hidden_act (`str`).
        estimator_dropout (`float`).

    The remaining fields: see [`TokenFlowConfig`].
    """

    model_type = "cosyvoice_flow"
    estimator_is_causal = False
    estimator_chunk_size = 0

    vocab_size: int = 4096
    input_frame_rate: int = 50
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    hidden_act: str = "silu"
    hidden_dropout: float = 0.1
    position_dropout: float = 0.1
    attention_dropout: float = 0.1
    normalize_before: bool = True
    macaron_style: bool = False
    key_bias: bool = True
    num_regulator_layers: int = 4
    regulator_groups: int = 1
    estimator_channels: list[int] | None = None
    estimator_layers_per_stage: int = 4
    estimator_num_mid_stages: int = 12
    estimator_num_attention_heads: int = 8
    estimator_head_dim: int = 64
    estimator_hidden_act: str = "gelu"
    estimator_dropout: float = 0.0

    def __post_init__(self, **kwargs) -> None:
        self.estimator_channels = list(self.estimator_channels or [256, 256])
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_cosyvoice_flow.CosyVoiceFlowConfig",
                "AutoModel": "modeling_cosyvoice_flow.CosyVoiceFlowModel",
            },
        )
        super().__post_init__(**kwargs)
        self.validate_architecture_choices()

    def validate_architecture_choices(self) -> None:
        """Refuse values that no such flow has.

        Raises:
            ValueError: names the field, the expected and the actual value.
        """
        at_least = dict.fromkeys(
            ("hidden_size", "num_attention_heads", "intermediate_size", "regulator_groups"), 1
        ) | {"num_hidden_layers": 0, "num_regulator_layers": 0}
        at_least |= dict.fromkeys(("estimator_num_attention_heads", "estimator_head_dim"), 1)
        at_least |= dict.fromkeys(("estimator_layers_per_stage", "estimator_num_mid_stages"), 0)
        self.validate_flow(at_least)
        validate_encoder(self)
        validate_unet(self, 8)
        if self.num_mel_bins % self.regulator_groups:
            raise ValueError(
                f"regulator_groups: expected a divisor of num_mel_bins {self.num_mel_bins}, got "
                f"{self.regulator_groups}"
            )

    def num_frames(self, num_tokens: int) -> int:
        """Mel frames of so many tokens at inference: 256 samples each at 22,050 Hz, whatever the pack's rate."""
        # The order of the operations is upstream's: float division, then truncation.
        return int(num_tokens / self.input_frame_rate * 22050 / 256)


CosyVoiceFlowConfig.register_for_auto_class()
