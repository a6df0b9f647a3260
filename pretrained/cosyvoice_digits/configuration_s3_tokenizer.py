"""Configuration of the S3 speech tokenizers of CosyVoice 1, 2 and 3."""

from transformers import PreTrainedConfig


class S3TokenizerConfig(PreTrainedConfig):
    r"""The first layers of a speech recogniser, and the quantiser behind them.

    The defaults are those of version 2. Version 1 at 50 Hz: `conv1_stride=1, position_embedding="sinusoidal",
    use_fsmn=False, quantizer="vq", codebook_size=4096`; at 25 Hz the same with `conv1_stride=2`. Version 3:
    `num_hidden_layers=12`.

    Args:
        num_mel_bins (`int`): bins of the log-mel spectrogram, 100 frames a second.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: of the encoder.
        conv1_stride (`int`): of the first convolution; the second always halves the rate.
        position_embedding (`str`): `"rotary"`, or `"sinusoidal"` for a table of `max_positions` rows.
        max_positions (`int`): tokens of the longest window with a table.
        rope_theta (`float`): base of the rotary frequencies.
        use_fsmn (`bool`): whether a memory (depthwise convolution over the values) is added to the attention.
        fsmn_kernel_size (`int`): its width in frames.
        attention_norm_eps, norm_eps (`float`): of the norms before attention and feed-forward network.
        quantizer (`str`): `"fsq"` (every projected coordinate rounded) or `"vq"` (nearest entry of a codebook on the
            unit sphere).
        fsq_levels, fsq_size (`int`): values of a coordinate (odd) and number of coordinates; there are
            `fsq_levels ** fsq_size` tokens.
        codebook_size (`int`): tokens of a `"vq"` quantiser.
        window_frames, window_stride (`int`): longer recordings are computed in overlapping windows of so many frames.
        num_recognition_layers (`int`): layers after the quantiser, only of [`S3TokenizerForCTC`].
        vocab_size (`int`): labels of its CTC head, blank included.
        pad_token_id (`int`): the CTC blank.
    """

    model_type = "s3_tokenizer"

    num_mel_bins: int = 128
    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 6
    num_attention_heads: int = 20
    conv1_stride: int = 2
    position_embedding: str = "rotary"
    max_positions: int = 1500
    rope_theta: float = 10000.0
    use_fsmn: bool = True
    fsmn_kernel_size: int = 31
    attention_norm_eps: float = 1e-6
    norm_eps: float = 1e-5
    quantizer: str = "fsq"
    fsq_levels: int = 3
    fsq_size: int = 8
    codebook_size: int = 6561
    window_frames: int = 3000
    window_stride: int = 2600
    num_recognition_layers: int = 6
    vocab_size: int = 32
    pad_token_id: int | None = 0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs) -> None:
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_s3_tokenizer.S3TokenizerConfig",
                "AutoModel": "modeling_s3_tokenizer.S3TokenizerModel",
                "AutoModelForAudioTokenization": "modeling_s3_tokenizer.S3TokenizerModel",
                "AutoModelForCTC": "modeling_s3_tokenizer.S3TokenizerForCTC",
            },
        )
        super().__post_init__(**kwargs)
        self.validate_architecture_choices()

    def validate_architecture_choices(self) -> None:
        """Refuse contradictory values.

        Raises:
            ValueError: names the field, the expected and the actual value.
        """
        for field, choices in (("position_embedding", ("rotary", "sinusoidal")), ("quantizer", ("fsq", "vq"))):
            if getattr(self, field) not in choices:
                raise ValueError(f"{field}: expected one of {choices}, got {getattr(self, field)!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: expected a multiple of num_attention_heads ({self.num_attention_heads}), got "
                f"{self.hidden_size}"
            )
        if self.position_embedding == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"hidden_size / num_attention_heads: expected an even size of a head, got {self.head_dim}"
            )
        if self.fsq_levels < 3 or self.fsq_levels % 2 == 0:
            raise ValueError(f"fsq_levels: expected an odd number from 3, got {self.fsq_levels}")
        if self.quantizer == "fsq" and self.codebook_size != self.fsq_levels**self.fsq_size:
            raise ValueError(
                f"codebook_size: expected fsq_levels ** fsq_size = {self.fsq_levels**self.fsq_size}, got "
                f"{self.codebook_size}"
            )
        overlap = self.window_frames - self.window_stride
        if self.window_stride < 1 or overlap < 0 or overlap % (2 * self.frames_per_token):
            raise ValueError(
                f"window_stride: expected window_frames ({self.window_frames}) minus a multiple of "
                f"{2 * self.frames_per_token} frames, got {self.window_stride}"
            )
        if self.position_embedding == "sinusoidal" and self.num_tokens(self.window_frames) > self.max_positions:
            raise ValueError(
                f"max_positions: expected at least {self.num_tokens(self.window_frames)}, the tokens of a window, got "
                f"{self.max_positions}"
            )

    def to_dict(self) -> dict:
        """As in transformers, with names of classes in `auto_map`.

        Saving takes every class with "Tokenizer" in its name for a text tokenizer, writes a pair (slow, fast) in place
        of the name, and no Auto class can load that.
        """
        output = super().to_dict()
        if "auto_map" in output:
            output["auto_map"] = {
                auto: name if isinstance(name, str) else name[0] for auto, name in output["auto_map"].items()
            }
        return output

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def frames_per_token(self) -> int:
        """Feature frames (10 ms) from one token to the next."""
        return 2 * self.conv1_stride

    @property
    def token_rate(self) -> float:
        """Tokens per second."""
        return 100 / self.frames_per_token

    def num_tokens(self, frames: int) -> int:
        """Tokens of so many feature frames in one window: `(l - 1) // stride + 1` for each convolution."""
        halved = (frames + self.conv1_stride - 1) // self.conv1_stride
        return (halved + 1) // 2


S3TokenizerConfig.register_for_auto_class()
