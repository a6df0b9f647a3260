"""Configuration of a unit language model: any causal LM of transformers with speech units in its vocabulary."""

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedConfig


# Fields with which an architecture changes the logits behind its head. They would be lost here.
_LOGIT_FIELDS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")


class SpeechGptConfig(PreTrainedConfig):
    r"""A causal LM, and where the units are in its vocabulary.

    Paper: https://arxiv.org/abs/2305.11000.

    Args:
        text_config (`dict` or `PreTrainedConfig`, *optional*): the causal LM, of an architecture that transformers
            knows (its `model_type` names it). By default LLaMA-7B with the vocabulary of the published checkpoints.
        num_units (`int`): size of the codebook.
        first_unit_token_id (`int`): id of unit 0; unit `k` is `first_unit_token_id + k`.
        logits_with_labels (`bool`): whether `forward` returns logits beside a loss. They cost far more memory than the
            loss; `Trainer` needs them for `compute_metrics` only.
        loss_chunk_size (`int`): positions whose logits exist at a time while the loss is computed.
        pad_token_id, bos_token_id, eos_token_id (`int`, *optional*): those of `text_config` by default.
    """

    model_type = "speechgpt_lm"
    sub_configs = {"text_config": AutoConfig}
    keys_to_ignore_at_inference = ["past_key_values"]

    text_config: dict | PreTrainedConfig | None = None
    num_units: int = 1000
    first_unit_token_id: int = 32000
    logits_with_labels: bool = False
    loss_chunk_size: int = 256
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs) -> None:
        if self.text_config is None:
            # llama: the published checkpoints are of this shape.
            self.text_config = CONFIG_MAPPING["llama"](
                vocab_size=33006,
                max_position_embeddings=2048,
                rms_norm_eps=1e-6,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        elif isinstance(self.text_config, dict):
            model_type = self.text_config.get("model_type")
            if model_type not in CONFIG_MAPPING:
                raise ValueError(f"text_config.model_type: expected one that transformers knows, got {model_type!r}")
            fields = {key: value for key, value in self.text_config.items() if key != "model_type"}
            self.text_config = CONFIG_MAPPING[model_type](**fields)
        text = self.text_config
        if isinstance(text, SpeechGptConfig) or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"text_config.model_type: expected a causal LM, got {text.model_type!r}")
        self.tie_word_embeddings = self.text_config.tie_word_embeddings
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.text_config, name))
        # Which Auto classes answer, and our pipeline; fixed facts of the family, written into every config.json.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_speechgpt_lm.SpeechGptConfig",
                "AutoModelForCausalLM": "modeling_speechgpt_lm.SpeechGptForCausalLM",
            },
        )
        kwargs.setdefault(
            "custom_pipelines",
            {
                "any-to-any": {
                    "impl": "pipeline_speechgpt_lm.SpeechGptPipeline",
                    "pt": ["AutoModelForCausalLM"],
                    "type": "multimodal",
                }
            },
        )
        super().__post_init__(**kwargs)
        self.validate_architecture_choices()

    def validate_architecture_choices(self) -> None:
        """Refuse what the model could not do.

        Raises:
            ValueError: names the field, the expected and the actual value.
        """
        text = self.text_config
        fields = text.to_dict()
        for name in _LOGIT_FIELDS:
            if fields.get(name) not in (None, 1, 1.0):
                raise ValueError(f"text_config.{name}: expected none, got {fields[name]}")
        if self.num_units < 0 or not 0 <= self.first_unit_token_id <= text.vocab_size - self.num_units:
            raise ValueError(
                f"first_unit_token_id: expected {self.num_units} units below vocab_size {text.vocab_size}, "
                f"got {self.first_unit_token_id}"
            )
        if self.loss_chunk_size < 1:
            raise ValueError(f"loss_chunk_size: expected at least 1, got {self.loss_chunk_size}")

    # What tools for causal LMs read and set on the outer configuration.
    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.text_config.vocab_size = value

    @property
    def hidden_size(self) -> int:
        return self.text_config.hidden_size

    @hidden_size.setter
    def hidden_size(self, value: int) -> None:
        self.text_config.hidden_size = value

    @property
    def num_hidden_layers(self) -> int:
        return self.text_config.num_hidden_layers

    @num_hidden_layers.setter
    def num_hidden_layers(self, value: int) -> None:
        self.text_config.num_hidden_layers = value

    @property
    def num_attention_heads(self) -> int:
        return self.text_config.num_attention_heads

    @num_attention_heads.setter
    def num_attention_heads(self, value: int) -> None:
        self.text_config.num_attention_heads = value


SpeechGptConfig.register_for_auto_class()
