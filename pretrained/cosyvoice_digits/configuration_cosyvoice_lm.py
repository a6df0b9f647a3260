"""Configuration of the language model of CosyVoice 2 and 3: a Qwen2 whose vocabulary has speech tokens.

Papers: https://arxiv.org/abs/2412.10117 (2), https://arxiv.org/abs/2505.17589 (3).
"""

from transformers import Qwen2Config


# Rows of the speech tables beyond the codebook.
_EXTRA_SPEECH_ROWS = {2: 3, 3: 200}
# Rows of a table of its own that version 2 keeps for start of sequence and task.
_CONDITION_ROWS = {2: 2, 3: 0}
_VOCABULARY_MULTIPLE = 64


class CosyVoiceLmConfig(Qwen2Config):
    r"""A Qwen2, and where text, speech and special tokens are in its one vocabulary.

    Ids: `[0, text_vocab_size)` text; then the rows of upstream's speech embedding, of which the first
    `speech_vocab_size` are the codebook and the rest special (end, fill, and in version 3 start and task); then, in
    version 2, start and task; then unused rows up to a multiple of 64. Logits exist for the speech rows only.

    Args:
        version (`int`): 2 or 3.
        text_vocab_size (`int`): rows of the text embedding.
        speech_vocab_size (`int`): entries of the speech tokenizer's codebook.
        mix_ratio (`list[int]`): text and speech tokens of a block when text is streamed (`[5, 15]`).
        end_of_prompt_id (`int`): `<|endofprompt|>`, which a text of version 3 must contain.
        silent_token_ids (`list[int]`): speech tokens (0-based) that sound like nothing; version 3 drops long runs.
        max_silent_run (`int`): as many in a row are kept.
        label_smoothing (`float`): share of the target that goes to all other speech rows.
        length_normalized_loss (`bool`): the loss is a mean over tokens; otherwise a sum over a sequence, averaged over
            sequences.
        ras_top_p, ras_top_k, ras_window, ras_threshold: repetition-aware sampling, see `ras_sampling.py`.
        pad_token_id (`int`): a text id; padding is on the left and masked.
        others: as in `Qwen2Config`; by default the 0.5 B model.
    """

    model_type = "cosyvoice_lm"

    version: int = 2
    text_vocab_size: int = 151936
    speech_vocab_size: int = 6561
    mix_ratio: list[int] | None = None
    end_of_prompt_id: int = 151646
    silent_token_ids: list[int] | None = None
    max_silent_run: int = 5
    label_smoothing: float = 0.0
    length_normalized_loss: bool = True
    ras_top_p: float = 0.8
    ras_top_k: int = 25
    ras_window: int = 10
    ras_threshold: float = 0.1

    hidden_size: int = 896
    intermediate_size: int = 4864
    num_hidden_layers: int = 24
    num_attention_heads: int = 14
    num_key_value_heads: int | None = 2
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 151643

    def __post_init__(self, **kwargs) -> None:
        if self.version not in _EXTRA_SPEECH_ROWS:
            raise ValueError(f"version: expected one of {sorted(_EXTRA_SPEECH_ROWS)}, got {self.version!r}")
        self.mix_ratio = list(self.mix_ratio or [5, 15])
        if self.silent_token_ids is None:
            # Published codebook; upstream lists them for version 3 only (`cosyvoice/cli/model.py`).
            known = [1, 2, 28, 29, 55, 248, 494, 2241, 2242, 2322, 2323] if self.version == 3 else []
            self.silent_token_ids = [token for token in known if token < self.speech_vocab_size]
        rows = self.text_vocab_size + self.num_speech_rows + _CONDITION_ROWS[self.version]
        self.vocab_size = -(-rows // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
        self.eos_token_id = self.stop_token_ids
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 1000000.0}
        # Which Auto classes answer; fixed facts of the family, written into every config.json.
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_cosyvoice_lm.CosyVoiceLmConfig",
                "AutoModelForCausalLM": "modeling_cosyvoice_lm.CosyVoiceLmForCausalLM",
            },
        )
        super().__post_init__(**kwargs)
        self.validate_architecture_choices()

    def validate_architecture_choices(self) -> None:
        """Refuse what the model could not do.

        Raises:
            ValueError: names the field, the expected and the actual value.
        """
        for name in ("text_vocab_size", "speech_vocab_size", "max_silent_run", "ras_window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if len(self.mix_ratio) != 2 or not all(isinstance(part, int) and part >= 1 for part in self.mix_ratio):
            raise ValueError(f"mix_ratio: expected two counts of at least 1, got {self.mix_ratio}")
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing: expected 0 <= value < 1, got {self.label_smoothing}")
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings: expected false, the head has rows of its own, got true")
        if not all(0 <= token < self.speech_vocab_size for token in self.silent_token_ids):
            raise ValueError(
                f"silent_token_ids: expected 0..{self.speech_vocab_size - 1}, got {self.silent_token_ids}"
            )

    @property
    def num_speech_rows(self) -> int:
        """Rows of the speech embedding and of the head: codebook and special tokens."""
        return self.speech_vocab_size + _EXTRA_SPEECH_ROWS[self.version]

    @property
    def num_condition_rows(self) -> int:
        """Rows behind the speech rows: start and task in version 2, none in version 3."""
        return _CONDITION_ROWS[self.version]

    @property
    def first_speech_token_id(self) -> int:
        """Id of speech token 0."""
        return self.text_vocab_size

    @property
    def start_token_id(self) -> int:
        """First id of every sequence (upstream's `sos`)."""
        return self.text_vocab_size + (self.num_speech_rows if self.version == 2 else self.speech_vocab_size)

    @property
    def task_token_id(self) -> int:
        """The id between text and speech."""
        return self.start_token_id + (1 if self.version == 2 else 2)

    @property
    def end_token_id(self) -> int:
        """What follows the last speech token."""
        return self.text_vocab_size + self.speech_vocab_size + (0 if self.version == 2 else 1)

    @property
    def fill_token_id(self) -> int:
        """What the model says, while text is streamed, when it needs more of it."""
        return self.text_vocab_size + self.speech_vocab_size + (2 if self.version == 2 else 3)

    @property
    def stop_token_ids(self) -> list[int]:
        """Every speech row beyond the codebook; each ends a sequence."""
        first = self.text_vocab_size + self.speech_vocab_size
        return list(range(first, self.text_vocab_size + self.num_speech_rows))


CosyVoiceLmConfig.register_for_auto_class()
