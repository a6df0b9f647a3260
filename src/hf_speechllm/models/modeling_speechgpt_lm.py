"""Unit language model: a causal LM of transformers whose vocabulary has speech units.

Paper: SpeechGPT (https://arxiv.org/abs/2305.11000). Upstream trains a plain `LlamaForCausalLM`.

This class is that model and no more: the backbone is `model`, the head is `lm_head`, and the weights are named as in
the plain class, so that TRL, PEFT and everything else that knows causal LMs know this one. What it adds is a loss that
never holds the logits of a whole batch. `to_plain` gives the plain class itself, for tools that accept only
architectures they list (vLLM, llama.cpp); `from_plain` is the way back.
"""

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .chunked_cross_entropy import chunked_cross_entropy
from .configuration_speechgpt_lm import SpeechGptConfig


if TYPE_CHECKING:
    # save_pretrained copies the files that are named here.
    from .pipeline_speechgpt_lm import SpeechGptPipeline
    from .processing_speechgpt_lm import SpeechGptProcessor


class SpeechGptForCausalLM(PreTrainedModel, GenerationMixin):
    """Backbone and head of the causal LM that `config.text_config` describes."""

    config_class = SpeechGptConfig
    config: SpeechGptConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: SpeechGptConfig) -> None:
        super().__init__(config)
        self.model = AutoModel.from_config(config.text_config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # The embedding is called differently in different architectures.
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.post_init()

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
        num_items_in_batch: Tensor | int | None = None,
        return_logits: bool | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids (`(batch, tokens)`, int64), attention_mask (`(batch, tokens)`, 1 = real), position_ids,
                past_key_values, inputs_embeds, use_cache: as in every causal LM.
            labels (`(batch, tokens)`, int64): the input ids, -100 where nothing is learnt; position `t` is compared
                with label `t + 1`.
            num_items_in_batch: what the summed loss is divided by; by default the labels that count.
            logits_to_keep (`int` or `Tensor`): how many last positions, or which ones, get logits; 0 = all.
            kwargs: of the backbone; `shift_labels` `(batch, tokens)`, labels that are shifted already, is taken out of
                them. (As an argument with a name it would be a label that `Trainer` expects in every batch.)
            return_logits (`bool`, *optional*): whether logits are computed beside a loss;
                `config.logits_with_labels` by default. Without labels they always are.

        Returns:
            `CausalLMOutputWithPast`; `loss` with labels, `logits` `(batch, kept tokens, vocab_size)` or None.
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
        loss = logits = None
        if shift_labels is None and labels is not None:
            shift_labels = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        if shift_labels is not None:
            loss = chunked_cross_entropy(
                hidden_states,
                self.lm_head,
                shift_labels.to(hidden_states.device),
                self.config.loss_chunk_size,
                num_items_in_batch,
            )
        if return_logits is None:
            return_logits = self.config.logits_with_labels
        if loss is None or return_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden_states[:, kept])
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @classmethod
    def from_plain(cls, model: PreTrainedModel, first_unit_token_id: int, num_units: int) -> "SpeechGptForCausalLM":
        """The same weights, shared and not copied, as this class.

        Args:
            model: a causal LM of transformers whose vocabulary has the units.
            first_unit_token_id, num_units (`int`): where they are, see [`SpeechGptConfig`].

        Raises:
            ValueError: a head with a bias, or an architecture that [`SpeechGptConfig`] refuses.
        """
        head = model.get_output_embeddings()
        if head is None or head.bias is not None:
            raise ValueError(f"model: expected a head without a bias, got {head}")
        config = SpeechGptConfig(
            # Shared as the layers are, which look things up in it.
            text_config=model.config,
            num_units=num_units,
            first_unit_token_id=first_unit_token_id,
        )
        config.dtype = config.text_config.dtype = model.dtype
        with torch.device("meta"):
            wrapper = cls(config)
        wrapper.model, wrapper.lm_head = model.base_model, head
        wrapper.generation_config = copy.deepcopy(model.generation_config)
        return wrapper.train(model.training)

    def to_plain(self) -> PreTrainedModel:
        """The same weights, shared and not copied, as the plain class of `config.text_config`.

        Its `save_pretrained` writes a checkpoint without any code, in which the extra fields `num_units` and
        `first_unit_token_id` of `config.json` say where the units are.
        """
        config = copy.deepcopy(self.config.text_config)
        config.num_units, config.first_unit_token_id = self.config.num_units, self.config.first_unit_token_id
        config.dtype = self.dtype
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(config)
        setattr(plain, plain.base_model_prefix, self.model)
        plain.set_output_embeddings(self.lm_head)
        plain.generation_config = copy.deepcopy(self.generation_config)
        return plain.train(self.training)


SpeechGptForCausalLM.register_for_auto_class("AutoModelForCausalLM")
