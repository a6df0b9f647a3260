"""Language model of CosyVoice 1: a text encoder, and a decoder of speech tokens that reads its output.

Paper: https://arxiv.org/abs/2407.05407. Upstream: `TransformerLM` of `cosyvoice/llm/llm.py`.

    sequence: start, speaker (absent in instruct mode), text encoder output, task, speech tokens, end

Both networks are causal, the text encoder too.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_cosyvoice_transformer_lm import CosyVoiceTransformerLmConfig
from .relative_transformer import RelativeSelfAttention, RelativeTransformer
from .speech_head_loss import smoothed_cross_entropy
from .speech_token_generation import SpeechTokenGenerationMixin, SpeechVocabulary


_START, _TASK = 0, 1


class CosyVoiceTransformerLm(SpeechTokenGenerationMixin, PreTrainedModel):
    """Text encoder, decoder and head."""

    config_class = CosyVoiceTransformerLmConfig
    config: CosyVoiceTransformerLmConfig
    base_model_prefix = "decoder"
    main_input_name = "input_ids"
    input_modalities = ("text",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["RelativeTransformerLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    # The distance term is an additive bias, which flash attention has no place for.
    _supports_flash_attn = False

    def __init__(self, config: CosyVoiceTransformerLmConfig) -> None:
        super().__init__(config)
        self.text_embedding = nn.Embedding(config.text_vocab_size, config.text_embedding_size)
        self.text_encoder = RelativeTransformer(
            config,
            input_size=config.text_embedding_size,
            hidden_size=config.text_encoder_hidden_size,
            num_layers=config.text_encoder_num_layers,
            num_heads=config.text_encoder_num_heads,
            intermediate_size=config.text_encoder_intermediate_size,
            hidden_act=config.text_encoder_hidden_act,
            rectify_input=config.text_encoder_rectify_input,
            key_bias=config.text_encoder_key_bias,
            chunk_size=config.text_encoder_chunk_size,
            dropout=config.text_encoder_dropout,
            positional_dropout=config.text_encoder_positional_dropout,
            attention_dropout=config.text_encoder_attention_dropout,
        )
        self.text_proj = nn.Linear(config.text_encoder_hidden_size, config.input_size)
        self.prompt_embedding = nn.Embedding(2, config.input_size)
        self.speech_embedding = nn.Embedding(config.speech_vocab_size, config.input_size)
        self.speaker_proj = nn.Linear(config.speaker_embedding_size, config.input_size)
        self.decoder = RelativeTransformer(
            config,
            input_size=config.input_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            rectify_input=config.rectify_input,
            key_bias=config.key_bias,
            chunk_size=1,
            dropout=config.dropout,
            positional_dropout=config.positional_dropout,
            attention_dropout=config.attention_dropout,
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RelativeSelfAttention):
            init.xavier_uniform_(module.pos_bias_u)
            init.xavier_uniform_(module.pos_bias_v)

    def get_input_embeddings(self) -> nn.Module:
        return self.speech_embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.speech_embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    @property
    def speech_vocabulary(self) -> SpeechVocabulary:
        """Where speech and its end are among the logits."""
        end = self.config.end_token_id
        return SpeechVocabulary(first=0, size=end, rows=end + 1, stops=(end,), upstream_masked=end)

    def encode_text(self, text_ids: Tensor, text_mask: Tensor | None = None) -> Tensor:
        """`(b, t)` ids, padded on the right, to the text encoder's output `(b, t, text_encoder_hidden_size)`."""
        return self.text_encoder(self.text_embedding(text_ids), text_mask)

    def prompt_embeds(
        self,
        text_ids: Tensor,
        text_mask: Tensor | None = None,
        speaker_embedding: Tensor | None = None,
        speaker_mask: Tensor | None = None,
        speech_ids: Tensor | None = None,
        speech_mask: Tensor | None = None,
        pad_left: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """What the decoder reads: start, speaker, text, task and speech, one after the other without gaps.

        Args:
            text_ids (`(b, t)`, int64), text_mask (same, 1 = real, *optional*): padded on the right.
            speaker_embedding (`(b, 192)`, *optional*): of any length, it is normalised here; None: no speaker.
            speaker_mask (`(b,)`, 1 = the row has a speaker, *optional*).
            speech_ids (`(b, n)`, int64), speech_mask (same, *optional*): padded on the right.
            pad_left (`bool`): which side the result is padded on.

        Returns:
            `(b, longest, input_size)`, zero where there is padding, and the mask `(b, longest)`, int64, 1 = real.
        """
        batch, device = text_ids.shape[0], text_ids.device
        text = self.text_proj(self.encode_text(text_ids, text_mask))
        start, task = (
            self.prompt_embedding(torch.full((batch, 1), which, device=device)) for which in (_START, _TASK)
        )
        one = torch.ones(batch, 1, dtype=torch.bool, device=device)
        parts = [(start, one)]
        if speaker_embedding is not None:
            speaker = nn.functional.normalize(speaker_embedding.to(text.dtype), dim=1)
            present = one if speaker_mask is None else speaker_mask.bool()[:, None]
            parts.append((self.speaker_proj(speaker)[:, None], present))
        parts += [(text, _real(text_ids, text_mask)), (task, one)]
        if speech_ids is not None:
            parts.append((self.speech_embedding(speech_ids), _real(speech_ids, speech_mask)))
        embeds = torch.cat([part for part, _ in parts], dim=1)
        real = torch.cat([mask for _, mask in parts], dim=1)
        # A stable sort moves padding to one side and leaves the order of the rest.
        order = (real if pad_left else ~real).long().argsort(dim=1, stable=True)
        longest = int(real.sum(dim=1).max())
        order = order[:, -longest:] if pad_left else order[:, :longest]
        embeds = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1]))
        real = real.gather(1, order)
        return embeds.masked_fill(~real[..., None], 0.0), real.long()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        text_ids: Tensor | None = None,
        text_mask: Tensor | None = None,
        speaker_embedding: Tensor | None = None,
        speaker_mask: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """
        Args:
            input_ids (`(b, n)`, int64): speech tokens. With `text_ids` they follow the prompt that is built of it,
                padded on the right; otherwise they follow what is in the cache.
            attention_mask (`(b, n)`, 1 = real): with `text_ids` that of `input_ids`, otherwise that of all positions
                so far, the cache included.
            past_key_values, use_cache: as in every causal LM.
            inputs_embeds (`(b, any, input_size)`): instead of `input_ids`, as `prompt_embeds` gives them.
            text_ids, text_mask, speaker_embedding, speaker_mask: see `prompt_embeds`.
            labels (`(b, n + 1)`, int64): with `text_ids`; what follows the task and each speech token: the speech
                tokens and the end, -100 where nothing is learnt.
            logits_to_keep: how many last positions, or which ones, get logits; 0 = all.
            num_items_in_batch: what the summed loss is divided by; by default see `length_normalized_loss`.

        Returns:
            `CausalLMOutputWithPast`; `logits` `(b, kept, speech_vocab_size + 1)`. With `labels` they are those that
            the loss compares, `(b, n + 1, speech_vocab_size + 1)`.

        Raises:
            ValueError: labels without `text_ids`.
        """
        if labels is not None and text_ids is None:
            raise ValueError("labels: expected together with text_ids, which their positions follow")
        if text_ids is not None:
            speech_mask = attention_mask
            inputs_embeds, attention_mask = self.prompt_embeds(
                text_ids, text_mask, speaker_embedding, speaker_mask, input_ids, speech_mask, pad_left=False
            )
        elif inputs_embeds is None:
            # The loop goes on with rows that have ended, and the end has no embedding.
            inputs_embeds = self.speech_embedding(input_ids.clamp(max=self.config.speech_vocab_size - 1))
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        hidden_states = self.decoder(inputs_embeds, attention_mask, past_key_values)
        if labels is not None:
            # The last prompt position of a row, its task token, is followed by its speech.
            speech = 0 if input_ids is None else _real(input_ids, speech_mask).sum(dim=1)
            first = attention_mask.sum(dim=1) - 1 - speech
            steps = first[:, None] + torch.arange(labels.shape[1], device=labels.device)
            steps = steps.clamp(max=hidden_states.shape[1] - 1)
            hidden_states = hidden_states.gather(1, steps[..., None].expand(-1, -1, hidden_states.shape[-1]))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states if labels is not None else hidden_states[:, kept])
        loss = None
        if labels is not None:
            config = self.config
            loss = smoothed_cross_entropy(
                logits, labels, config.label_smoothing, config.length_normalized_loss, num_items_in_batch
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def build_speech_prompt(
        self,
        text_ids: list[list[int]],
        prompt_text_ids: list[list[int]],
        prompt_speech_ids: list[list[int]],
        speaker_embedding: Tensor | None,
        speaker_mask: Tensor | None,
    ) -> dict[str, Tensor]:
        """Inputs of `generate`."""
        rows = [[*before, *text] for text, before in zip(text_ids, prompt_text_ids, strict=True)]
        ids, mask = self._pad_right("text", rows, self.config.text_vocab_size)
        speech, speech_mask = self._pad_right("speech", prompt_speech_ids, self.config.speech_vocab_size)
        if speaker_embedding is not None:
            speaker_embedding = speaker_embedding.to(self.device)
        embeds, real = self.prompt_embeds(ids, mask, speaker_embedding, speaker_mask, speech, speech_mask)
        return {"inputs_embeds": embeds, "attention_mask": real}

    def _pad_right(self, name: str, rows: list[list[int]], size: int) -> tuple[Tensor, Tensor]:
        longest = max(len(row) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            if row and not 0 <= min(row) <= max(row) < size:
                raise ValueError(f"{name}_ids: expected 0..{size - 1}, got {min(row)}..{max(row)}")
            ids[number, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask[number, : len(row)] = 1
        return ids.to(self.device), mask.to(self.device)


def _real(ids: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


CosyVoiceTransformerLm.register_for_auto_class("AutoModel")
