"""Configuration of CosyVoice 3's flow (https://arxiv.org/abs/2505.17589): speech tokens to a mel spectrogram."""

from .token_flow_config import TokenFlowConfig


class CosyVoice3FlowConfig(TokenFlowConfig):
    r"""Look-ahead over the embedded tokens and diffusion transformer, at the values of the published model.

    Tokens (see `lookahead_convolution.py`):
        embedding_size (`int`): must be `num_mel_bins`; the embedded tokens are what the velocity network is given.
        num_lookahead_tokens, lookahead_channels (`int`): tokens after a token that it sees, and channels between the
            two convolutions.
        token_mel_ratio (`int`): mel frames of a token.

    Velocity network (see `diffusion_transformer.py`):
        estimator_hidden_size, estimator_num_hidden_layers, estimator_intermediate_size (`int`).
        estimator_num_attention_heads, estimator_head_dim (`int`), estimator_dropout (`float`).
        estimator_chunk_size (`int`): mel frames of a chunk of the attention when streaming; 0 = all frames.

    streaming_probability (`float`): share of the training batches in which the attention sees chunks.

    The remaining fields: see [`TokenFlowConfig`].
    """

    model_type = "cosyvoice3_flow"

    embedding_size: int = 80
    num_lookahead_tokens: int = 3
    lookahead_channels: int = 1024
    token_mel_ratio: int = 2
    estimator_hidden_size: int = 1024
    estimator_num_hidden_layers: int = 22
    estimator_intermediate_size: int = 2048
    estimator_num_attention_heads: int = 16
    estimator_head_dim: int = 64
    estimator_dropout: float = 0.1
    estimator_chunk_size: int = 50
    streaming_probability: float = 0.5

    def __post_init__(self, **kwargs) -> None:
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_cosyvoice3_flow.CosyVoice3FlowConfig",
                "AutoModel": "modeling_cosyvoice3_flow.CosyVoice3FlowModel",
            },
        )
        super().__post_init__(**kwargs)
        self.validate_architecture_choices()

    def validate_architecture_choices(self) -> None:
        """Refuse values that no such flow has.

        Raises:
            ValueError: names the field, the expected and the actual value.
        """
        at_least = dict.fromkeys(("lookahead_channels", "token_mel_ratio", "estimator_intermediate_size"), 1)
        at_least |= dict.fromkeys(("estimator_num_attention_heads", "estimator_head_dim"), 1)
        at_least |= dict.fromkeys(("num_lookahead_tokens", "estimator_num_hidden_layers", "estimator_chunk_size"), 0)
        self.validate_flow(at_least)
        if self.embedding_size != self.num_mel_bins:
            raise ValueError(f"embedding_size: expected num_mel_bins {self.num_mel_bins}, got {self.embedding_size}")
        if self.estimator_hidden_size < 16 or self.estimator_hidden_size % 16:
            raise ValueError(
                f"estimator_hidden_size: expected a multiple of 16, the groups of its convolutions, got "
                f"{self.estimator_hidden_size}"
            )
        if self.estimator_head_dim % 2:
            raise ValueError(f"estimator_head_dim: expected an even number, got {self.estimator_head_dim}")
        if not 0.0 <= self.streaming_probability <= 1.0:
            raise ValueError(f"streaming_probability: expected 0..1, got {self.streaming_probability}")


CosyVoice3FlowConfig.register_for_auto_class()
