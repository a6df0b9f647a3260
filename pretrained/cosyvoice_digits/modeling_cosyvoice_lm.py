"""Language model of CosyVoice 2 and 3: text to speech tokens, one Qwen2 over one vocabulary.

Papers: https://arxiv.org/abs/2412.10117, https://arxiv.org/abs/2505.17589. Upstream: `Qwen2LM` and `CosyVoice3LM` of
`cosyvoice/llm/llm.py`, which keep text, speech and special embeddings in separate tables and feed embeddings. Here
they are rows of one table, so that a prompt is plain `input_ids` and everything that knows causal LMs knows this one.

    sequence: start, text, task, speech tokens, end

The head has rows for speech only; `forward` pads its logits to the whole vocabulary with the smallest number of their
type unless `speech_logits_only` asks for the compact ones. The gain over a tied head is most of the work of a step:
151,936 rows that speech never needs.
"""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model, Qwen2PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_cosyvoice_lm import CosyVoiceLmConfig
from .prompts_cosyvoice_lm import batch_prompts, speech_prompt
from .speech_head_loss import smoothed_cross_entropy
from .speech_token_generation import SpeechTokenGenerationMixin, SpeechVocabulary


if TYPE_CHECKING:
    # save_pretrained copies the files that are named here.
    from .streaming_cosyvoice_lm import SpeechTextStream


# Bias of the rows that the head does not have, where a whole head is asked for: far below any logit, and small enough
# for a mean over the vocabulary to be finite.
_ABSENT = -1e30
# What describes a Qwen2 itself.
_QWEN_FIELDS = Qwen2Config().to_dict().keys() - {
    *("architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "model_type", "transformers_version"),
}


class WholeVocabularyHead(nn.Module):
    """The head as tools see it that multiply `weight` themselves (TRL's fused loss): a row for every id.

    It owns nothing; weight and bias are built from the model's head when they are asked for, and gradients reach it.
    """

    def __init__(self, head: nn.Linear, first: int, size: int) -> None:
        super().__init__()
        # In a list: the head is the model's, and is not registered again.
        self._head = [head]
        self._padding = (first, size - first - head.out_features)

    @property
    def weight(self) -> Tensor:
        """`(vocab_size, hidden_size)`, zero outside of the speech rows."""
        return nn.functional.pad(self._head[0].weight, (0, 0, *self._padding))

    @property
    def bias(self) -> Tensor:
        """`(vocab_size,)`, hugely negative outside of the speech rows."""
        head = self._head[0]
        bias = head.weight.new_zeros(head.out_features) if head.bias is None else head.bias
        absent = max(_ABSENT, torch.finfo(bias.dtype).min)
        return nn.functional.pad(bias, self._padding, value=absent)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return nn.functional.linear(hidden_states, self.weight, self.bias)


class CosyVoiceLmForCausalLM(SpeechTokenGenerationMixin, Qwen2PreTrainedModel):
    """A Qwen2 over text, speech and special tokens, with a head over the speech rows."""

    config_class = CosyVoiceLmConfig
    config: CosyVoiceLmConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("text",)

    def __init__(self, config: CosyVoiceLmConfig) -> None:
        super().__init__(config)
        self.model = Qwen2Model(config)
        # The id that pads is also a token, whose row is learnt.
        self.model.embed_tokens.padding_idx = None
        self.lm_head = nn.Linear(config.hidden_size, config.num_speech_rows, bias=config.version == 2)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The head with a row for every id; see [`WholeVocabularyHead`]."""
        return WholeVocabularyHead(self.lm_head, self.config.text_vocab_size, self.config.vocab_size)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """The head is over speech rows only, and nothing from outside fits.

        Raises:
            ValueError: always.
        """
        raise ValueError("lm_head: expected to stay, it has rows for speech tokens only")

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """The vocabulary is divided between text and speech and does not grow at its end.

        Raises:
            ValueError: another size than the present one.
        """
        if new_num_tokens not in (None, self.config.vocab_size):
            raise ValueError(f"new_num_tokens: expected {self.config.vocab_size}, got {new_num_tokens}")
        return self.get_input_embeddings()

    @property
    def speech_vocabulary(self) -> SpeechVocabulary:
        """Where speech and its end are among the logits."""
        config = self.config
        return SpeechVocabulary(
            first=config.first_speech_token_id,
            size=config.speech_vocab_size,
            rows=config.num_speech_rows,
            stops=tuple(config.stop_token_ids),
            # The only one that upstream masks while an answer is too short: in version 3 it is the start token.
            upstream_masked=config.first_speech_token_id + config.speech_vocab_size,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        speech_logits_only: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids (`(batch, tokens)`, int64), attention_mask (`(batch, tokens)`, 1 = real), position_ids,
                past_key_values, inputs_embeds, use_cache: as in every causal LM.
            labels (`(batch, tokens)`, int64): ids of the whole vocabulary, -100 where nothing is learnt; position `t`
                is compared with label `t + 1`. They need not be the input: while text is streamed, the label at the
                first text of a block is the fill token, which is never an input.
            logits_to_keep (`int` or `Tensor`): how many last positions, or which ones, get logits; 0 = all.
            speech_logits_only (`bool`): logits of the head's own rows, `(batch, kept, num_speech_rows)`. By default so
                beside a loss, where nobody needs 150,000 columns of the smallest number at every position.
            num_items_in_batch: what the summed loss is divided by; by default see `length_normalized_loss`.

        Returns:
            `CausalLMOutputWithPast`; `loss` with labels, `logits` `(batch, kept tokens, vocab_size)` or compact.

        Raises:
            ValueError: a label that the head has no row for.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if shift_labels is None and labels is not None:
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # With labels, all positions are needed.
        logits = self.lm_head(hidden_states[:, kept] if shift_labels is None else hidden_states)
        loss = None
        if shift_labels is not None:
            loss = smoothed_cross_entropy(
                logits,
                self._speech_targets(shift_labels.to(logits.device)),
                self.config.label_smoothing,
                self.config.length_normalized_loss,
                num_items_in_batch,
            )
            logits = logits[:, kept]
        if speech_logits_only is None:
            speech_logits_only = loss is not None
        if not speech_logits_only:
            logits = self._whole_vocabulary(logits)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _speech_targets(self, labels: Tensor) -> Tensor:
        """Ids of the whole vocabulary to rows of the head; -100 stays."""
        rows = labels - self.config.first_speech_token_id
        counted = labels != -100
        if bool((counted & ((rows < 0) | (rows >= self.config.num_speech_rows))).any()):
            first = self.config.first_speech_token_id
            raise ValueError(
                f"labels: expected -100 or {first}..{first + self.config.num_speech_rows - 1}, the ids of speech, "
                f"got {labels[counted].min().item()}..{labels[counted].max().item()}"
            )
        return rows.masked_fill(~counted, -100)

    def _whole_vocabulary(self, logits: Tensor) -> Tensor:
        config = self.config
        after = config.vocab_size - config.text_vocab_size - config.num_speech_rows
        return nn.functional.pad(logits, (config.text_vocab_size, after), value=torch.finfo(logits.dtype).min)

    def build_speech_prompt(
        self,
        text_ids: list[list[int]],
        prompt_text_ids: list[list[int]],
        prompt_speech_ids: list[list[int]],
        speaker_embedding: Tensor | None,
        speaker_mask: Tensor | None,
    ) -> dict[str, Tensor]:
        """Inputs of `generate`. This model has no speaker embedding: the prompt's speech tells the voice."""
        rows = zip(text_ids, prompt_text_ids, prompt_speech_ids, strict=True)
        prompts = [speech_prompt(self.config, [*before, *text], speech) for text, before, speech in rows]
        ids, mask = batch_prompts(prompts, self.config.pad_token_id)
        return {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}

    @classmethod
    def from_qwen2(cls, qwen: Qwen2ForCausalLM, version: int = 2, **fields) -> "CosyVoiceLmForCausalLM":
        """A model whose text and layers are those of a Qwen2, as upstream's training starts; speech is random.

        Args:
            qwen: the language model; its layers are shared, not copied.
            version (`int`), fields: of [`CosyVoiceLmConfig`], as `speech_vocab_size`.
        """
        kept = {name: value for name, value in qwen.config.to_dict().items() if name in _QWEN_FIELDS}
        kept["text_vocab_size"] = kept.pop("vocab_size")
        kept |= {"tie_word_embeddings": False, "pad_token_id": qwen.config.pad_token_id or 0}
        model = cls(CosyVoiceLmConfig(version=version, **{**kept, **fields}))
        model.to(qwen.dtype)
        with torch.no_grad():
            model.model.embed_tokens.weight[: model.config.text_vocab_size] = qwen.get_input_embeddings().weight
        model.model.layers, model.model.norm = qwen.model.layers, qwen.model.norm
        return model

    def to_plain(self) -> Qwen2ForCausalLM:
        """The model as a plain `Qwen2ForCausalLM` with an untied head of the whole vocabulary, for vLLM and others.

        Lost: the bias of version 2's head, for which that class has no place, and that text ids cannot be said: their
        rows are zero. So allow only ids from `first_speech_token_id` to the last of `stop_token_ids`, and add the bias
        to them: in vLLM by `allowed_token_ids` and `logit_bias`, which with
        `dict(enumerate(model.lm_head.bias.tolist(), model.config.first_speech_token_id))` gives this model's greedy
        ids. The backbone is shared, not copied. Extra fields of `config.json` say where speech is:
        `first_speech_token_id`, `speech_vocab_size`, `start_token_id`, `task_token_id`.
        """
        config = self.config
        fields = {name: value for name, value in config.to_dict().items() if name in _QWEN_FIELDS}
        plain_config = Qwen2Config(**fields)
        for name in ("first_speech_token_id", "speech_vocab_size", "start_token_id", "task_token_id"):
            setattr(plain_config, name, getattr(config, name))
        plain_config.dtype = self.dtype
        with torch.device("meta"):
            plain = Qwen2ForCausalLM(plain_config)
        plain.model = self.model
        plain.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False, device="meta")
        plain.lm_head.weight = nn.Parameter(self.get_output_embeddings().weight.detach())
        plain.generation_config = copy.deepcopy(self.generation_config)
        return plain.train(self.training)


CosyVoiceLmForCausalLM.register_for_auto_class("AutoModelForCausalLM")
