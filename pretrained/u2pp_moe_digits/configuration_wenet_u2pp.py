"""Configuration of WeNet's U2, U2++ and U2++ MoE recognisers (https://arxiv.org/abs/2106.05642, 2404.16407)."""

from transformers import PreTrainedConfig


_CHOICES = {
    "encoder_type": ("conformer", "transformer"),
    "subsampling_type": ("linear", "conv2d4", "conv2d6", "conv2d8"),
    "position_embedding_type": ("rel_pos", "abs_pos", "no_pos"),
    "attention_type": ("rel_selfattn", "selfattn"),
    "conv_norm_type": ("batch_norm", "layer_norm", "rms_norm"),
    "norm_type": ("layer_norm", "rms_norm"),
    "decoder_norm_type": ("layer_norm", "rms_norm"),
    "mlp_type": ("dense", "moe", "gated"),
    "decoder_mlp_type": ("dense", "moe", "gated"),
    "hidden_act": ("silu", "relu", "gelu", "tanh", "hardtanh", "selu"),
    "decoder_hidden_act": ("silu", "relu", "gelu", "tanh", "hardtanh", "selu"),
    "padding": ("invariant", "upstream"),
}

# (output frames per input frame, input frames that the first output frame needs beyond its own)
_SUBSAMPLING = {"linear": (1, 0), "conv2d4": (4, 6), "conv2d6": (6, 10), "conv2d8": (8, 14)}


class WenetU2ppConfig(PreTrainedConfig):
    r"""Everything that a published WeNet `train.yaml` can say about a CTC / attention model.

    Encoder:
        vocab_size (`int`): output units, blank and sentence marks included.
        input_size (`int`): feature bins per frame.
        encoder_type (`str`): `"conformer"` or `"transformer"`.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size (`int`): the usual.
        num_key_value_heads, head_dim (`int`, *optional*): grouped-query attention; both or neither.
        subsampling_type (`str`): `"linear"`, `"conv2d4"`, `"conv2d6"` or `"conv2d8"`.
        position_embedding_type (`str`): `"rel_pos"`, `"abs_pos"` or `"no_pos"`.
        attention_type (`str`): `"rel_selfattn"` (a learned bias per key position) or `"selfattn"`.
        macaron_style, use_conv_module, conv_causal (`bool`): shape of the conformer block.
        conv_norm_type (`str`): `"batch_norm"`, `"layer_norm"` or `"rms_norm"` inside the convolution module.
        mlp_type (`str`): `"dense"`, `"moe"` (top `num_experts_per_tok` of `num_experts`) or `"gated"`.
        static_chunk_size, use_dynamic_chunk, use_dynamic_left_chunk: the attention span, see
            [`WenetU2ppEncoder.forward`]. Chunks are counted in encoder frames.
        has_cmvn (`bool`): whether the encoder normalises its input with stored statistics.
        padding (`str`): `"invariant"`: an item of a batch equals the item alone. `"upstream"` reproduces WeNet, where
            padded frames of a batch leak into non-causal convolutions and into batch-norm statistics.

    Decoder (`decoder_*`): as the encoder's; `decoder_layers=0` means none, `right_decoder_layers > 0` adds the
    right-to-left decoder of U2++.

    Loss: `ctc_weight * ctc + (1 - ctc_weight) * ((1 - reverse_weight) * left + reverse_weight * right)`, with
    `label_smoothing`, averaged over the batch or, with `length_normalized_loss`, over tokens.

    Tokens: `pad_token_id` is the CTC blank, `bos_token_id` and `eos_token_id` frame the decoder's input.
    """

    model_type = "wenet_u2pp"
    attribute_map = {"num_mel_bins": "input_size", "blank_token_id": "pad_token_id"}
    keys_to_ignore_at_inference = ["encoder_attention_mask", "decoder_logits", "right_decoder_logits"]

    vocab_size: int = 5002
    input_size: int = 80
    encoder_type: str = "conformer"
    hidden_size: int = 256
    num_hidden_layers: int = 12
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 2048
    subsampling_type: str = "conv2d4"
    position_embedding_type: str = "rel_pos"
    attention_type: str = "rel_selfattn"
    macaron_style: bool = True
    use_conv_module: bool = True
    conv_kernel_size: int = 15
    conv_causal: bool = False
    conv_norm_type: str = "batch_norm"
    conv_bias: bool = True
    conv_norm_eps: float = 1e-5
    conv_inner_factor: int = 2
    normalize_before: bool = True
    final_norm: bool = True
    norm_type: str = "layer_norm"
    norm_eps: float = 1e-5
    hidden_act: str = "silu"
    query_bias: bool = True
    key_bias: bool = True
    value_bias: bool = True
    mlp_type: str = "dense"
    mlp_bias: bool = True
    num_experts: int = 8
    num_experts_per_tok: int = 2
    hidden_dropout: float = 0.1
    positional_dropout: float = 0.1
    attention_dropout: float = 0.0
    static_chunk_size: int = 0
    use_dynamic_chunk: bool = False
    use_dynamic_left_chunk: bool = False
    has_cmvn: bool = True
    padding: str = "invariant"

    decoder_layers: int = 6
    right_decoder_layers: int = 0
    decoder_attention_heads: int = 4
    decoder_num_key_value_heads: int | None = None
    decoder_head_dim: int | None = None
    decoder_intermediate_size: int = 2048
    decoder_hidden_act: str = "relu"
    decoder_dropout: float = 0.1
    decoder_positional_dropout: float = 0.1
    decoder_self_attention_dropout: float = 0.0
    decoder_cross_attention_dropout: float = 0.0
    decoder_normalize_before: bool = True
    decoder_norm_type: str = "layer_norm"
    decoder_norm_eps: float = 1e-5
    decoder_query_bias: bool = True
    decoder_key_bias: bool = True
    decoder_value_bias: bool = True
    decoder_cross_query_bias: bool = True
    decoder_cross_key_bias: bool = True
    decoder_cross_value_bias: bool = True
    decoder_mlp_type: str = "dense"
    decoder_mlp_bias: bool = True
    decoder_num_experts: int = 8
    decoder_num_experts_per_tok: int = 2

    ctc_weight: float = 0.5
    reverse_weight: float = 0.0
    label_smoothing: float = 0.0
    length_normalized_loss: bool = False
    apply_non_blank_embedding: bool = False

    frame_shift_ms: float = 10.0
    sampling_rate: int = 16000
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    pad_token_id: int = 0
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self, **kwargs) -> None:
        self.bos_token_id = self.vocab_size - 1 if self.bos_token_id is None else self.bos_token_id
        self.eos_token_id = self.vocab_size - 1 if self.eos_token_id is None else self.eos_token_id
        # Which Auto classes answer, and our pipeline; fixed facts of the family, written into every config.json.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_wenet_u2pp.WenetU2ppConfig",
                "AutoModel": "modeling_wenet_u2pp.WenetU2ppForSpeechRecognition",
                "AutoModelForCTC": "modeling_wenet_u2pp.WenetU2ppForSpeechRecognition",
                "AutoModelForSpeechSeq2Seq": "modeling_wenet_u2pp.WenetU2ppForSpeechRecognition",
            },
        )
        kwargs.setdefault(
            "custom_pipelines",
            {
                "automatic-speech-recognition": {
                    "impl": "pipeline_speech_recognition.SpeechRecognitionPipeline",
                    "pt": ["AutoModelForSpeechSeq2Seq"],
                    "type": "multimodal",
                }
            },
        )
        super().__post_init__(**kwargs)
        self.validate_architecture_choices()

    def validate_architecture_choices(self) -> None:
        """Refuse contradictory values.

        Raises:
            ValueError: names the field, the expected and the actual value.
        """
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {getattr(self, name)!r}")
        for prefix, heads in (("", self.num_attention_heads), ("decoder_", self.decoder_attention_heads)):
            head_dim = getattr(self, f"{prefix}head_dim")
            kv_heads = getattr(self, f"{prefix}num_key_value_heads")
            if heads < 1 or (head_dim is None and self.hidden_size % heads):
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of {prefix}attention heads {heads}"
                )
            if kv_heads is not None and head_dim is None:
                raise ValueError(f"{prefix}num_key_value_heads={kv_heads} needs {prefix}head_dim")
            if kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
                raise ValueError(f"{prefix}attention heads {heads} is not a multiple of key-value heads {kv_heads}")
            experts = getattr(self, f"{prefix}num_experts")
            chosen = getattr(self, f"{prefix}num_experts_per_tok")
            if getattr(self, f"{prefix}mlp_type") == "moe" and not 1 <= chosen <= experts:
                raise ValueError(f"{prefix}num_experts_per_tok: expected 1..{experts}, got {chosen}")
        if (
            self.attention_type == "rel_selfattn"
            and self.num_attention_heads * self.attention_head_dim != self.hidden_size
        ):
            raise ValueError(
                f"rel_selfattn: heads {self.num_attention_heads} x head_dim {self.attention_head_dim} "
                f"must be hidden_size {self.hidden_size}"
            )
        if self.encoder_type == "transformer" and self.attention_type != "selfattn":
            raise ValueError(f"a transformer encoder has attention_type 'selfattn', got {self.attention_type!r}")
        if (
            self.encoder_type == "conformer"
            and self.use_conv_module
            and not self.conv_causal
            and not self.conv_kernel_size % 2
        ):
            raise ValueError(
                f"conv_kernel_size: a non-causal convolution needs an odd size, got {self.conv_kernel_size}"
            )
        for name in ("ctc_weight", "reverse_weight", "label_smoothing"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: expected 0..1, got {getattr(self, name)}")
        if self.decoder_layers == 0 and (self.right_decoder_layers or self.ctc_weight != 1.0):
            raise ValueError(
                f"without a decoder: expected right_decoder_layers 0 and ctc_weight 1, "
                f"got {self.right_decoder_layers} and {self.ctc_weight}"
            )
        if self.reverse_weight > 0 and self.right_decoder_layers == 0:
            raise ValueError(f"reverse_weight {self.reverse_weight} needs right_decoder_layers > 0")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name}: expected 0..{self.vocab_size - 1}, got {getattr(self, name)}")

    @property
    def attention_head_dim(self) -> int:
        """Size of one encoder attention head."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

    @property
    def subsampling_rate(self) -> int:
        """Feature frames per encoder frame."""
        return _SUBSAMPLING[self.subsampling_type][0]

    @property
    def right_context(self) -> int:
        """Feature frames that an encoder frame needs beyond the first one it covers."""
        return _SUBSAMPLING[self.subsampling_type][1]

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples per encoder frame; the ASR pipelines convert frames to seconds with it."""
        return int(self.subsampling_rate * self.frame_shift_ms * self.sampling_rate / 1000)

    @property
    def seconds_per_frame(self) -> float:
        """Duration of one encoder frame."""
        return self.subsampling_rate * self.frame_shift_ms / 1000

    @property
    def is_streamable(self) -> bool:
        """Whether the model was trained with chunks, so that streaming it makes sense."""
        return self.use_dynamic_chunk or self.static_chunk_size > 0


WenetU2ppConfig.register_for_auto_class()
