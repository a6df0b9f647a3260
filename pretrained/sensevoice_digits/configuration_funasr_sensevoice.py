"""Configuration of SenseVoice-Small (https://arxiv.org/abs/2407.04051): text, language, emotion and audio events."""

from transformers import PreTrainedConfig


# Rows of the prompt embedding and ids of the published vocabulary. Upstream has them in its code
# (`funasr/models/sense_voice/model.py`), not in the pack.
_LANGUAGE_PROMPTS = {"auto": 0, "zh": 3, "en": 4, "yue": 7, "ja": 11, "ko": 12, "nospeech": 13}
_TEXTNORM_PROMPTS = {"withitn": 14, "woitn": 15}
_LANGUAGE_TOKENS = {"zh": 24884, "en": 24885, "yue": 24888, "ja": 24892, "ko": 24896, "nospeech": 24992}
_EMOTION_TOKENS = {"HAPPY": 25001, "SAD": 25002, "ANGRY": 25003, "NEUTRAL": 25004, "EMO_UNKNOWN": 25009}
_TEXTNORM_TOKENS = {"withitn": 25016, "woitn": 25017}

UNKNOWN_EMOTION = "EMO_UNKNOWN"


class FunasrSenseVoiceConfig(PreTrainedConfig):
    r"""Everything that a SenseVoice pack says, and the special ids that upstream has in its code.

    Encoder (see `sanm.py`):
        vocab_size (`int`): output units, blank and tags included.
        input_size (`int`): features per frame, that is mel bins times stacked frames.
        hidden_size, num_attention_heads, intermediate_size (`int`): the usual.
        num_hidden_layers (`int`): all layers.
        num_timestamp_prediction_layers (`int`): how many of them come after the first norm (upstream's `tp_blocks`).
        fsmn_kernel_size, fsmn_shift (`int`): width of the memory, and how far its window is moved to the past.

    Prompts: four embedded rows come before the features and their frames answer what was asked.
        num_prompts (`int`): rows of the prompt embedding.
        language_prompt_ids (`dict[str, int]`, *optional*): language → row; `"auto"` leaves the language to the model.
        emotion_prompt_id, event_prompt_id (`int`): rows of the second and third prompt.
        textnorm_prompt_ids (`dict[str, int]`, *optional*): `"withitn"` (numbers, punctuation) and `"woitn"` → row.
        language_token_ids, emotion_token_ids, event_token_ids, textnorm_token_ids (`dict[str, int]`, *optional*): name
            of a tag, without its brackets → unit. They read the answers and the labels.

    Training:
        language_dropout (`float`): probability with which the language prompt is `"auto"` instead of the label.
        label_smoothing, length_normalized_loss: of the cross-entropy on the four answers; a mean over answers, or
            (`False`) their sum per utterance.

    Tokens: `pad_token_id` is the CTC blank.
    """

    model_type = "funasr_sensevoice"
    attribute_map = {"blank_token_id": "pad_token_id"}
    keys_to_ignore_at_inference = ["encoder_attention_mask", "prompt_logits"]

    vocab_size: int = 25055
    input_size: int = 560
    hidden_size: int = 512
    num_hidden_layers: int = 70
    num_timestamp_prediction_layers: int = 20
    num_attention_heads: int = 4
    intermediate_size: int = 2048
    fsmn_kernel_size: int = 11
    fsmn_shift: int = 0
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    layer_norm_eps: float = 1e-5

    num_prompts: int = 16
    language_prompt_ids: dict[str, int] | None = None
    emotion_prompt_id: int = 1
    event_prompt_id: int = 2
    textnorm_prompt_ids: dict[str, int] | None = None
    language_token_ids: dict[str, int] | None = None
    emotion_token_ids: dict[str, int] | None = None
    event_token_ids: dict[str, int] | None = None
    textnorm_token_ids: dict[str, int] | None = None

    language_dropout: float = 0.2
    label_smoothing: float = 0.0
    length_normalized_loss: bool = True

    subsampling_rate: int = 6
    frame_shift_ms: float = 10.0
    sampling_rate: int = 16000
    initializer_range: float = 0.02
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2

    def __post_init__(self, **kwargs) -> None:
        self.language_prompt_ids = dict(self.language_prompt_ids or _LANGUAGE_PROMPTS)
        self.textnorm_prompt_ids = dict(self.textnorm_prompt_ids or _TEXTNORM_PROMPTS)
        self.language_token_ids = dict(self.language_token_ids or _LANGUAGE_TOKENS)
        self.emotion_token_ids = dict(self.emotion_token_ids or _EMOTION_TOKENS)
        self.event_token_ids = dict(self.event_token_ids or {})
        self.textnorm_token_ids = dict(self.textnorm_token_ids or _TEXTNORM_TOKENS)
        # Which Auto classes answer, and our pipeline; fixed facts of the family, written into every config.json.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_funasr_sensevoice.FunasrSenseVoiceConfig",
                "AutoModel": "modeling_funasr_sensevoice.FunasrSenseVoiceForSpeechRecognition",
                "AutoModelForCTC": "modeling_funasr_sensevoice.FunasrSenseVoiceForSpeechRecognition",
                "AutoModelForSpeechSeq2Seq": "modeling_funasr_sensevoice.FunasrSenseVoiceForSpeechRecognition",
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
        if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: expected a multiple of num_attention_heads {self.num_attention_heads}, "
                f"got {self.hidden_size}"
            )
        if self.input_size < 4 or self.input_size % 2:
            raise ValueError(f"input_size: expected an even number of at least 4, got {self.input_size}")
        if not 1 <= self.num_timestamp_prediction_layers < self.num_hidden_layers:
            raise ValueError(
                f"num_timestamp_prediction_layers: expected 1..{self.num_hidden_layers - 1} (num_hidden_layers - 1), "
                f"got {self.num_timestamp_prediction_layers}"
            )
        left = (self.fsmn_kernel_size - 1) // 2 + self.fsmn_shift
        if self.fsmn_kernel_size < 1 or not 0 <= left <= self.fsmn_kernel_size - 1:
            raise ValueError(f"fsmn_shift: {self.fsmn_shift} moves a window of {self.fsmn_kernel_size} off its frame")
        for name in ("hidden_dropout", "attention_dropout", "language_dropout", "label_smoothing"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: expected 0..1, got {getattr(self, name)}")
        for name, required in (("language_prompt_ids", {"auto"}), ("textnorm_prompt_ids", {"withitn", "woitn"})):
            if not required <= set(getattr(self, name)):
                raise ValueError(f"{name}: expected {sorted(required)} among its keys, got {getattr(self, name)}")
        if set(self.textnorm_token_ids) != set(self.textnorm_prompt_ids):
            raise ValueError(
                f"textnorm_token_ids: expected the keys {sorted(self.textnorm_prompt_ids)}, "
                f"got {sorted(self.textnorm_token_ids)}"
            )
        rows = {"emotion_prompt_id": self.emotion_prompt_id, "event_prompt_id": self.event_prompt_id}
        for name in ("language_prompt_ids", "textnorm_prompt_ids"):
            rows |= {f"{name}.{key}": row for key, row in getattr(self, name).items()}
        units = {name: getattr(self, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        for name in ("language_token_ids", "emotion_token_ids", "event_token_ids", "textnorm_token_ids"):
            units |= {f"{name}.{key}": unit for key, unit in getattr(self, name).items()}
        for table, size in ((rows, self.num_prompts), (units, self.vocab_size)):
            for name, index in table.items():
                if not 0 <= index < size:
                    raise ValueError(f"{name}: expected 0..{size - 1}, got {index}")

    @property
    def num_prompt_frames(self) -> int:
        """Frames that come before those of the audio: language, emotion, event, text normalisation."""
        return 4

    @property
    def seconds_per_frame(self) -> float:
        """Duration of one frame of the model."""
        return self.subsampling_rate * self.frame_shift_ms / 1000

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples per frame of the model; the ASR pipelines convert frames to seconds with it."""
        return int(self.subsampling_rate * self.frame_shift_ms * self.sampling_rate / 1000)


FunasrSenseVoiceConfig.register_for_auto_class()
