"""Configuration of Paraformer and its descendants: timestamps (BiCif), hotwords (contextual, SeACo), streaming.

Papers: Paraformer (https://arxiv.org/abs/2206.08317), BiCif timestamps (https://arxiv.org/abs/2301.12343), SeACo
(https://arxiv.org/abs/2308.03266).
"""

from transformers import PreTrainedConfig


_CHOICES = {
    "encoder_type": ("sanm", "conformer"),
    "decoder_type": ("sanm", "transformer"),
    "hotword_type": (None, "contextual", "seaco"),
    "cif_integration": ("cumulative", "sequential"),
    "timestamp_head": (None, "cnn", "cnn_blstm"),
    "cif_training": ("exact", "upstream"),
    "padding": ("invariant", "upstream"),
    "conformer_style": ("wenet", "funasr"),
    "subsampling_type": ("linear", "conv2d4", "conv2d6", "conv2d8"),
    "position_embedding_type": ("rel_pos", "abs_pos", "no_pos"),
    "attention_type": ("rel_selfattn", "shifted_rel_selfattn", "legacy_rel_selfattn", "selfattn"),
    "conv_norm_type": ("batch_norm", "layer_norm", "rms_norm"),
    "norm_type": ("layer_norm", "rms_norm"),
    "mlp_type": ("dense", "moe", "gated"),
    "hidden_act": ("silu", "relu", "gelu", "tanh", "hardtanh", "selu"),
}

_SUBSAMPLING = {"linear": 1, "conv2d4": 4, "conv2d6": 6, "conv2d8": 8}

# The unit of the published vocabulary that SeACo gives up for "no hotword here".
_NO_BIAS = 8377


class FunasrParaformerConfig(PreTrainedConfig):
    r"""Everything that a FunASR `config.yaml` (or a WeNet `train.yaml`) can say about a Paraformer.

    Encoder:
        vocab_size (`int`): output units, blank and sentence marks included.
        input_size (`int`): features per frame: filter banks times the frames that the extractor stacks.
        encoder_type (`str`): `"sanm"` or `"conformer"`.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size (`int`): the usual.
        fsmn_kernel_size, fsmn_shift (`int`): memory of the SAN-M encoder, see `sanm.py`.
        layer_norm_eps (`float`): of the encoder's norms.
        subsampling_type … conv_inner_factor: shape of the conformer, as in WeNet. `attention_type` is
            `"rel_selfattn"` (WeNet, no shift), `"legacy_rel_selfattn"` (what FunASR's `rel_pos` gives unless told
            otherwise), `"shifted_rel_selfattn"` (`rel_pos_type: latest`) or `"selfattn"`. `conformer_style`
            (`"wenet"` or `"funasr"`, by default after the attention) says whose batch `padding="upstream"` reproduces.
        stacked_frames (`int`): filter-bank frames that the extractor advances per input frame (`lfr_n`).

    Predictor:
        cif_left_order, cif_right_order (`int`): frames that its convolution sees before and after.
        cif_groups (`int`): groups of the convolution, 1 = full.
        cif_residual (`bool`): whether the convolution's input is added to its output, followed by `cif_dropout`.
        cif_integration (`str`): `"cumulative"` (upstream's V2) or `"sequential"` (V1, V3, WeNet), see `cif.py`.
        cif_threshold (`float`): of the sequential rule; the cumulative one fires at whole numbers.
        cif_smooth_factor, cif_noise_threshold, cif_tail_threshold (`float`): `relu(sigmoid * smooth - noise)`, and the
            weight of the frame that is appended at inference.
        cif_tail_mask (`bool`): the tail follows the utterance (`True`) or the batch.
        cif_dynamic_threshold (`bool`): inference without tail but with the threshold of the paper,
            `sum / ceil(sum)`; section 2.2 there.
        cif_training (`str`): `"exact"`: the weights of an utterance yield exactly as many embeddings as it has tokens.
            `"upstream"`: rounding decides whether the last token fires, and a frame closes at most one token;
            `cif_training_margin` enlarges the weights by that share, with 2e-5 the last token always fires.
        timestamp_head (`str`, *optional*): `"cnn"` or `"cnn_blstm"`, the second predictor, `upsample_times` times
            finer, with `timestamp_smooth_factor`, `timestamp_noise_threshold`, `timestamp_from_conv`.

    Decoder:
        decoder_type (`str`): `"sanm"` or `"transformer"` (upstream's `ParaformerSANDecoder`).
        decoder_layers (`int`): layers with cross-attention (`att_layer_num`).
        decoder_fsmn_layers (`int`): layers without it that follow (`num_blocks - att_layer_num`).
        decoder_norm_eps, decoder_final_norm_eps (`float`): of the three norms of a layer; of all other norms.
        share_embedding (`bool`): the sampler embeds labels with the rows of the output layer.

    Hotwords:
        hotword_type (`str`, *optional*): `"contextual"` or `"seaco"`.
        hotword_encoder_layers (`int`), hotword_encoder_bidirectional (`bool`): of the LSTM.
        hotword_embed_from_decoder (`bool`): embed hotwords with the decoder's table (always so in SeACo).
        seaco_*: the second decoder, its loss and `seaco_no_bias_token_id`, the unit that means "no hotword here".
        hotword_filter_size (`int`): SeACo attends to at most so many hotwords; 0 = to all.

    Losses: `ctc_weight * ctc + decoder_weight * ce + predictor_weight * (length + timestamp_loss_scale * length2)`.
        decoder_weight (`float`, *optional*): by default `1 - ctc_weight`.
        length_normalized_loss (`bool`): average CE over tokens instead of utterances; `predictor_length_normalized`
            the same for the length loss, by default as the CE.
        append_eos (`bool`): whether the end mark counts as a token (`predictor_bias`).
        sampling_ratio (`float`): share of the wrong tokens that the sampler shows, 0 = no sampler.
        mwer_weight (`float`), mwer_num_candidates (`int`), mwer_mask_probability (`float`): of the minimum-word-error
            loss on sampled candidates, see `mwer.py`; it is added to the others.

    Streaming:
        chunk_size (`list[int]`): past, new and future frames of a window.
        encoder_chunk_look_back, decoder_chunk_look_back (`int`): chunks of keys to remember, -1 = all (encoder only).
        is_streaming (`bool`): whether the model was trained with chunks.

    Tokens: `pad_token_id` is the CTC blank; `eos_token_id` closes the labels.
    """

    model_type = "funasr_paraformer"
    # `norm_eps` is the name that the conformer's blocks read.
    attribute_map = {"blank_token_id": "pad_token_id", "norm_eps": "layer_norm_eps"}
    keys_to_ignore_at_inference = ["encoder_attention_mask", "ctc_logits", "alphas", "peaks", "token_lengths"]

    vocab_size: int = 8404
    input_size: int = 560
    stacked_frames: int = 6
    encoder_type: str = "sanm"
    hidden_size: int = 512
    num_hidden_layers: int = 50
    num_attention_heads: int = 4
    intermediate_size: int = 2048
    num_timestamp_prediction_layers: int = 0
    fsmn_kernel_size: int = 11
    fsmn_shift: int = 0
    layer_norm_eps: float = 1e-12
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    positional_dropout: float = 0.1

    conformer_style: str | None = None
    subsampling_type: str = "conv2d4"
    position_embedding_type: str = "rel_pos"
    attention_type: str = "rel_selfattn"
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    query_bias: bool = True
    key_bias: bool = True
    value_bias: bool = True
    macaron_style: bool = True
    use_conv_module: bool = True
    conv_kernel_size: int = 15
    conv_causal: bool = False
    conv_norm_type: str = "batch_norm"
    conv_norm_eps: float = 1e-5
    conv_bias: bool = True
    conv_inner_factor: int = 2
    normalize_before: bool = True
    norm_type: str = "layer_norm"
    hidden_act: str = "silu"
    mlp_type: str = "dense"
    mlp_bias: bool = True
    num_experts: int = 8
    num_experts_per_tok: int = 2
    padding: str = "invariant"

    cif_left_order: int = 1
    cif_right_order: int = 1
    cif_groups: int = 1
    cif_residual: bool = False
    cif_dropout: float = 0.1
    cif_integration: str = "cumulative"
    cif_threshold: float = 1.0
    cif_smooth_factor: float = 1.0
    cif_noise_threshold: float = 0.0
    cif_tail_threshold: float = 0.45
    cif_tail_mask: bool = True
    cif_dynamic_threshold: bool = False
    cif_training: str = "exact"
    cif_training_margin: float = 0.0
    timestamp_head: str | None = None
    timestamp_from_conv: bool = False
    timestamp_smooth_factor: float = 0.25
    timestamp_noise_threshold: float = 0.01
    upsample_times: int = 3

    decoder_type: str = "sanm"
    decoder_layers: int = 16
    decoder_fsmn_layers: int = 0
    decoder_attention_heads: int = 4
    decoder_intermediate_size: int = 2048
    decoder_fsmn_kernel_size: int = 11
    decoder_fsmn_shift: int = 0
    decoder_dropout: float = 0.1
    decoder_positional_dropout: float = 0.1
    decoder_self_attention_dropout: float = 0.1
    decoder_cross_attention_dropout: float = 0.1
    decoder_norm_eps: float = 1e-12
    decoder_final_norm_eps: float = 1e-12
    share_embedding: bool = False

    hotword_type: str | None = None
    hotword_encoder_layers: int = 2
    hotword_encoder_bidirectional: bool = False
    hotword_encoder_dropout: float = 0.0
    hotword_embed_from_decoder: bool = True
    hotword_filter_size: int = 50
    seaco_layers: int = 6
    seaco_fsmn_layers: int = 0
    seaco_attention_heads: int = 4
    seaco_intermediate_size: int = 1024
    seaco_fsmn_kernel_size: int = 21
    seaco_fsmn_shift: int = 0
    seaco_dropout: float = 0.1
    seaco_self_attention_dropout: float = 0.1
    seaco_cross_attention_dropout: float = 0.1
    seaco_label_smoothing: float = 0.1
    seaco_length_normalized_loss: bool = True
    seaco_train_decoder: bool = True
    seaco_decoder_weight: float = 0.01
    seaco_no_bias_token_id: int | None = None

    ctc_weight: float = 0.0
    has_ctc_head: bool | None = None
    decoder_weight: float | None = None
    predictor_weight: float = 1.0
    timestamp_loss_scale: float = 0.5
    label_smoothing: float = 0.1
    length_normalized_loss: bool = True
    predictor_length_normalized: bool | None = None
    append_eos: bool = True
    sampling_ratio: float = 0.75
    mwer_weight: float = 0.0
    mwer_num_candidates: int = 4
    mwer_mask_probability: float = 0.5

    chunk_size: list[int] | None = None
    encoder_chunk_look_back: int = 4
    decoder_chunk_look_back: int = 1
    is_streaming: bool = False

    frame_shift_ms: float = 10.0
    sampling_rate: int = 16000
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2

    def __post_init__(self, **kwargs) -> None:
        self.chunk_size = [0, 10, 5] if self.chunk_size is None else list(self.chunk_size)
        self.has_ctc_head = self.ctc_weight > 0 if self.has_ctc_head is None else self.has_ctc_head
        self.decoder_weight = 1.0 - self.ctc_weight if self.decoder_weight is None else self.decoder_weight
        if self.conformer_style is None:
            self.conformer_style = "funasr" if self.attention_type.endswith("_rel_selfattn") else "wenet"
        if self.hotword_type == "seaco" and self.seaco_no_bias_token_id is None:
            self.seaco_no_bias_token_id = _NO_BIAS
        if self.predictor_length_normalized is None:
            self.predictor_length_normalized = self.length_normalized_loss
        # Which Auto classes answer, and our pipeline; fixed facts of the family, written into every config.json.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_funasr_paraformer.FunasrParaformerConfig",
                "AutoModel": "modeling_funasr_paraformer.FunasrParaformerForSpeechRecognition",
                "AutoModelForSpeechSeq2Seq": "modeling_funasr_paraformer.FunasrParaformerForSpeechRecognition",
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
        for name in ("num_attention_heads", "decoder_attention_heads", "seaco_attention_heads"):
            if getattr(self, name) < 1 or self.hidden_size % getattr(self, name):
                raise ValueError(
                    f"{name}: expected a divisor of hidden_size {self.hidden_size}, got {getattr(self, name)}"
                )
        if self.encoder_type == "sanm" and (self.input_size < 4 or self.input_size % 2):
            raise ValueError(f"input_size: expected an even number of at least 4, got {self.input_size}")
        for prefix in ("", "decoder_", "seaco_"):
            kernel, shift = getattr(self, f"{prefix}fsmn_kernel_size"), getattr(self, f"{prefix}fsmn_shift")
            if kernel < 1 or not 0 <= (kernel - 1) // 2 + shift <= kernel - 1:
                raise ValueError(f"{prefix}fsmn_shift: {shift} moves a window of {kernel} off its frame")
        if self.num_timestamp_prediction_layers != 0:
            raise ValueError(
                "num_timestamp_prediction_layers: expected 0 in a Paraformer, "
                f"got {self.num_timestamp_prediction_layers}"
            )
        if self.cif_groups < 1 or self.hidden_size % self.cif_groups:
            raise ValueError(
                f"cif_groups: expected a divisor of hidden_size {self.hidden_size}, got {self.cif_groups}"
            )
        if self.decoder_type == "transformer" and (self.decoder_fsmn_layers or self.hotword_type):
            raise ValueError(
                "decoder_type 'transformer': expected decoder_fsmn_layers 0 and no hotword_type, "
                f"got {self.decoder_fsmn_layers} and {self.hotword_type!r}"
            )
        if self.decoder_layers < 1:
            raise ValueError(f"decoder_layers: expected at least 1, got {self.decoder_layers}")
        if self.encoder_type == "conformer" and self.use_conv_module and not self.conv_causal:
            if not self.conv_kernel_size % 2:
                raise ValueError(
                    f"conv_kernel_size: a non-causal convolution needs an odd size, got {self.conv_kernel_size}"
                )
        if self.hotword_type == "contextual" and self.hotword_encoder_bidirectional:
            raise ValueError("hotword_encoder_bidirectional: a contextual Paraformer's encoder has one direction")
        if self.conformer_style is None:
            self.conformer_style = "funasr" if self.attention_type.endswith("_rel_selfattn") else "wenet"
        if self.hotword_type == "seaco" and self.share_embedding:
            raise ValueError("share_embedding: SeACo embeds hotwords with the decoder's table, which is missing then")
        if self.is_streaming and (self.encoder_type != "sanm" or self.decoder_type != "sanm" or self.hotword_type):
            raise ValueError("is_streaming: expected a SAN-M encoder and decoder without hotwords")
        if len(self.chunk_size) != 3 or min(self.chunk_size) < 0 or self.chunk_size[1] < 1:
            raise ValueError(f"chunk_size: expected [past, new > 0, future] frames, got {self.chunk_size}")
        if self.mwer_weight > 0 and self.mwer_num_candidates < 2:
            raise ValueError(f"mwer_num_candidates: expected at least 2, got {self.mwer_num_candidates}")
        shares = ("ctc_weight", "label_smoothing", "sampling_ratio", "seaco_label_smoothing", "mwer_mask_probability")
        for name in shares:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: expected 0..1, got {getattr(self, name)}")
        if self.ctc_weight > 0 and not self.has_ctc_head:
            raise ValueError(f"ctc_weight {self.ctc_weight} needs has_ctc_head")
        tokens = ["pad_token_id", "bos_token_id", "eos_token_id"]
        tokens += ["seaco_no_bias_token_id"] if self.hotword_type == "seaco" else []
        for name in tokens:
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name}: expected 0..{self.vocab_size - 1}, got {getattr(self, name)}")

    @property
    def subsampling_rate(self) -> int:
        """Filter-bank frames per encoder frame."""
        reduction = 1 if self.encoder_type == "sanm" else _SUBSAMPLING[self.subsampling_type]
        return self.stacked_frames * reduction

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples per encoder frame."""
        return int(self.subsampling_rate * self.frame_shift_ms * self.sampling_rate / 1000)

    @property
    def seconds_per_frame(self) -> float:
        """Duration of one encoder frame."""
        return self.subsampling_rate * self.frame_shift_ms / 1000

    @property
    def is_streamable(self) -> bool:
        """Whether the model was trained with chunks, so that streaming it makes sense."""
        return self.is_streaming


FunasrParaformerConfig.register_for_auto_class()
