"""Configuration of CT-Transformer, FunASR's punctuation model (https://arxiv.org/abs/2003.01309)."""

from transformers import PreTrainedConfig


# Label → mark. "_" is no mark; "<unk>" is not predicted.
_MARKS = {0: "<unk>", 1: "_", 2: "，", 3: "。", 4: "？", 5: "、"}


class FunasrCtTransformerConfig(PreTrainedConfig):
    r"""Embedding, SAN-M encoder (see `sanm.py`) and a label per token: the mark that follows it.

    Args:
        vocab_size (`int`): words: Chinese characters, and English words as a whole.
        input_size (`int`): width of the embedding.
        hidden_size, num_hidden_layers, num_attention_heads, intermediate_size (`int`): of the encoder.
        fsmn_kernel_size, fsmn_shift (`int`): width of the memory, and how far its window is moved to the past.
        sentence_end_id (`int`): label that a sentence gets which is cut because it grows too long, and the last one.
        label_weights (`list[float]`, *optional*): of the cross-entropy.
        id2label (`dict[int, str]`, *optional*): label → mark, full-width; `"_"` is no mark.
    """

    model_type = "funasr_ct_transformer"

    vocab_size: int = 272727
    input_size: int = 256
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_timestamp_prediction_layers: int = 0
    num_attention_heads: int = 8
    intermediate_size: int = 1024
    fsmn_kernel_size: int = 11
    fsmn_shift: int = 0
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.0
    layer_norm_eps: float = 1e-12

    sentence_end_id: int = 3
    label_weights: list[float] | None = None

    initializer_range: float = 0.02
    pad_token_id: int = 0

    def __post_init__(self, **kwargs) -> None:
        # JSON has no integer keys.
        self.id2label = {int(label): mark for label, mark in (self.id2label or _MARKS).items()}
        self.label2id = {mark: label for label, mark in self.id2label.items()}
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_funasr_ct_transformer.FunasrCtTransformerConfig",
                "AutoModel": "modeling_funasr_ct_transformer.FunasrCtTransformerForTokenClassification",
                "AutoModelForTokenClassification": (
                    "modeling_funasr_ct_transformer.FunasrCtTransformerForTokenClassification"
                ),
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
        if self.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers: expected at least 1, got {self.num_hidden_layers}")
        left = (self.fsmn_kernel_size - 1) // 2 + self.fsmn_shift
        if self.fsmn_kernel_size < 1 or not 0 <= left <= self.fsmn_kernel_size - 1:
            raise ValueError(f"fsmn_shift: {self.fsmn_shift} moves a window of {self.fsmn_kernel_size} off its word")
        if sorted(self.id2label) != list(range(len(self.id2label))) or not self.id2label:
            raise ValueError(f"id2label: expected the labels 0, 1, ..., got {sorted(self.id2label)}")
        if not 0 <= self.sentence_end_id < len(self.id2label):
            raise ValueError(f"sentence_end_id: expected 0..{len(self.id2label) - 1}, got {self.sentence_end_id}")
        if self.label_weights is not None and len(self.label_weights) != len(self.id2label):
            raise ValueError(f"label_weights: expected {len(self.id2label)} numbers, got {self.label_weights}")


FunasrCtTransformerConfig.register_for_auto_class()
