"""Configuration of CosyVoice 2's flow (https://arxiv.org/abs/2412.10117): speech tokens to a mel spectrogram."""

from .token_flow_config import TokenFlowConfig, validate_encoder, validate_unet


class CosyVoice2FlowConfig(TokenFlowConfig):
    r"""Encoder of the tokens, which doubles their rate, and causal U-Net, at the values of the published model.

    Encoder (see `upsampling_encoder.py`):
        hidden_size (`int`): also `embedding_size`, which must be equal.
        num_hidden_layers, num_upsampled_layers (`int`): layers at the rate of the tokens and at twice that.
        num_attention_heads, intermediate_size (`int`), hidden_act (`str`).
        hidden_dropout, position_dropout, attention_dropout (`float`).
        normalize_before, macaron_style, key_bias (`bool`).
        num_lookahead_tokens (`int`): tokens after a token that it sees, in a stream too.
        encoder_chunk_size (`int`): tokens of a chunk of the attention when streaming; 0 = all tokens.

    Velocity network (see `unet_1d.py`):
        estimator_channels (`list[int]`), estimator_layers_per_stage, estimator_num_mid_stages (`int`).
        estimator_num_attention_heads, estimator_head_dim (`int`), estimator_hidden_act (`str`).
        estimator_dropout (`float`).
        estimator_chunk_size (`int`): mel frames of a chunk of the attention when streaming; 0 = all frames.

    streaming_probability (`float`): share of the training batches in which the attention sees chunks.

    The remaining fields: see [`TokenFlowConfig`].
    """

    model_type = "cosyvoice2_flow"
    estimator_is_causal = True
    token_mel_ratio = 2

    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_upsampled_layers: int = 4
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    hidden_act: str = "silu"
    hidden_dropout: float = 0.1
    position_dropout: float = 0.1
    attention_dropout: float = 0.1
    normalize_before: bool = True
    macaron_style: bool = False
    key_bias: bool = True
    num_lookahead_tokens: int = 3
    encoder_chunk_size: int = 25
    estimator_channels: list[int] | None = None
    estimator_layers_per_stage: int = 4
    estimator_num_mid_stages: int = 12
    estimator_num_attention_heads: int = 8
    estimator_head_dim: int = 64
    estimator_hidden_act: str = "gelu"
    estimator_dropout: float = 0.0
    estimator_chunk_size: int = 50
    streaming_probability: float = 0.5

    def __post_init__(self, **kwargs) -> None:
        self.estimator_channels = list(self.estimator_channels or [256])
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_cosyvoice2_flow.CosyVoice2FlowConfig",
                "AutoModel": "modeling_cosyvoice2_flow.CosyVoice2FlowModel",
            },
        )
        super().__post_init__(**kwargs)
        self.validate_architecture_choices()

    def validate_architecture_choices(self) -> None:
        """Refuse values that no such flow has.

        Raises:
            ValueError: names the field, the expected and the actual value.
        """
        at_least = dict.fromkeys(("hidden_size", "num_attention_heads", "intermediate_size"), 1)
        at_least |= dict.fromkeys(("estimator_num_attention_heads", "estimator_head_dim"), 1)
        at_least |= dict.fromkeys(("num_hidden_layers", "num_upsampled_layers", "num_lookahead_tokens"), 0)
        at_least |= dict.fromkeys(("encoder_chunk_size", "estimator_chunk_size"), 0)
        at_least |= dict.fromkeys(("estimator_layers_per_stage", "estimator_num_mid_stages"), 0)
        self.validate_flow(at_least)
        validate_encoder(self)
        validate_unet(self, 1)
        if self.embedding_size != self.hidden_size:
            raise ValueError(f"embedding_size: expected hidden_size {self.hidden_size}, got {self.embedding_size}")
        if not 0.0 <= self.streaming_probability <= 1.0:
            raise ValueError(f"streaming_probability: expected 0..1, got {self.streaming_probability}")


CosyVoice2FlowConfig.register_for_auto_class()
