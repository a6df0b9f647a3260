"""Configuration of the language model of CosyVoice 1 (https://arxiv.org/abs/2407.05407)."""

from transformers import PreTrainedConfig


_ACTIVATIONS = ("silu", "relu", "gelu", "tanh", "hardtanh", "selu")


class CosyVoiceTransformerLmConfig(PreTrainedConfig):
    r"""Everything that the language model needs, at the values of CosyVoice-300M.

    Args:
        text_vocab_size (`int`): rows of the text embedding (60515 in the 25 Hz model).
        text_embedding_size (`int`): its columns.
        speech_vocab_size (`int`): entries of the speech tokenizer's codebook; the end has this number.
        speaker_embedding_size (`int`): of the speaker encoder.

    Text encoder (see `relative_transformer.py`):
        text_encoder_hidden_size, text_encoder_num_layers, text_encoder_num_heads, text_encoder_intermediate_size
            (`int`), text_encoder_hidden_act (`str`), text_encoder_rectify_input (`bool`), text_encoder_key_bias
            (`bool`), text_encoder_chunk_size (`int`), text_encoder_dropout, text_encoder_positional_dropout,
            text_encoder_attention_dropout (`float`).

    Decoder:
        input_size (`int`): of the embeddings that it reads.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size (`int`), hidden_act (`str`),
            rectify_input, key_bias (`bool`), dropout, positional_dropout, attention_dropout (`float`).

    Training:
        label_smoothing (`float`), length_normalized_loss (`bool`): see `speech_head_loss.py`.

    Sampling:
        ras_top_p, ras_top_k, ras_window, ras_threshold: see `ras_sampling.py`.
    """

    model_type = "cosyvoice_transformer_lm"
    keys_to_ignore_at_inference = ["past_key_values"]

    text_vocab_size: int = 51866
    text_embedding_size: int = 512
    speech_vocab_size: int = 4096
    speaker_embedding_size: int = 192

    text_encoder_hidden_size: int = 1024
    text_encoder_num_layers: int = 6
    text_encoder_num_heads: int = 16
    text_encoder_intermediate_size: int = 4096
    text_encoder_hidden_act: str = "silu"
    text_encoder_rectify_input: bool = False
    text_encoder_key_bias: bool = True
    text_encoder_chunk_size: int = 1
    text_encoder_dropout: float = 0.1
    text_encoder_positional_dropout: float = 0.1
    text_encoder_attention_dropout: float = 0.0

    input_size: int = 1024
    hidden_size: int = 1024
    num_hidden_layers: int = 14
    num_attention_heads: int = 16
    intermediate_size: int = 4096
    hidden_act: str = "relu"
    rectify_input: bool = True
    key_bias: bool = True
    dropout: float = 0.1
    positional_dropout: float = 0.1
    attention_dropout: float = 0.0

    initializer_range: float = 0.02
    label_smoothing: float = 0.0
    length_normalized_loss: bool = True

    ras_top_p: float = 0.8
    ras_top_k: int = 25
    ras_window: int = 10
    ras_threshold: float = 0.1

    pad_token_id: int | None = 0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs) -> None:
        # Which Auto classes answer; fixed facts of the family, written into every config.json.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_cosyvoice_transformer_lm.CosyVoiceTransformerLmConfig",
                "AutoModel": "modeling_cosyvoice_transformer_lm.CosyVoiceTransformerLm",
            },
        )
        super().__post_init__(**kwargs)
        self.validate_architecture_choices()

    def validate_architecture_choices(self) -> None:
        """Refuse values that no model has.

        Raises:
            ValueError: names the field, the expected and the actual value.
        """
        for prefix, heads in (("", "num_attention_heads"), ("text_encoder_", "text_encoder_num_heads")):
            size = getattr(self, f"{prefix}hidden_size")
            if getattr(self, heads) < 1 or size % getattr(self, heads):
                raise ValueError(
                    f"{heads}: expected a divisor of {prefix}hidden_size {size}, got {getattr(self, heads)}"
                )
            if getattr(self, f"{prefix}hidden_act") not in _ACTIVATIONS:
                raise ValueError(
                    f"{prefix}hidden_act: expected one of {_ACTIVATIONS}, got {getattr(self, f'{prefix}hidden_act')!r}"
                )
        if self.text_encoder_chunk_size < 0:
            raise ValueError(f"text_encoder_chunk_size: expected at least 0, got {self.text_encoder_chunk_size}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing: expected 0 <= value < 1, got {self.label_smoothing}")

    @property
    def vocab_size(self) -> int:
        """Rows of the head: the codebook and the end."""
        return self.speech_vocab_size + 1

    @property
    def end_token_id(self) -> int:
        """What follows the last speech token."""
        return self.speech_vocab_size

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


CosyVoiceTransformerLmConfig.register_for_auto_class()
