"""Paraformer: recognition in one pass over all tokens at once, with optional token times and hotwords.

Papers: Paraformer (https://arxiv.org/abs/2206.08317), BiCif timestamps (https://arxiv.org/abs/2301.12343), SeACo
(https://arxiv.org/abs/2308.03266). Upstream: modelscope/FunASR, `funasr/models/{paraformer,bicif_paraformer,
contextual_paraformer,seaco_paraformer}`; wenet-e2e/wenet, `wenet/models/paraformer`.

Shape legend: `b` batch, `f` input frames, `t` encoder frames, `n` tokens, `w` hotwords, `v` vocabulary.

What differs from upstream: padded frames and the other items of a batch never influence an item
(`config.padding="upstream"` brings that back), in training every token gets its embedding
(`config.cif_training="upstream"`: rounding decides about the last one), and nothing fails on audio or text without a
single token.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .cif_predictor import CifOutput, CifPredictor
from .configuration_funasr_paraformer import FunasrParaformerConfig
from .conformer import EncoderSelfAttention
from .conformer_encoder import ConformerEncoder, ConformerLayer
from .generation_funasr_paraformer import FunasrParaformerGenerationMixin
from .mwer import mwer_loss, sample_candidates
from .sanm import SanmAttention, SanmEncoder, SanmEncoderLayer
from .sanm_decoder import DecoderShape, SanmDecoder
from .streaming_funasr_paraformer import FunasrParaformerStreamingMixin
from .transformer_decoder import TransformerDecoder


# Logit of blank on padded tokens (all others stay below it), so that nothing is read there.
_PADDED_BLANK_LOGIT = 0.0
_PADDED_OTHER_LOGIT = -1.0e4


@dataclass
class FunasrParaformerEncoderOutput(BaseModelOutput):
    """
    Args:
        last_hidden_state (`(b, t, hidden_size)`): zero on padded frames (unless `config.padding="upstream"`).
        attention_mask (`(b, t)`, bool): True = real encoder frame.
    """

    attention_mask: Tensor | None = None


@dataclass
class FunasrParaformerOutput(ModelOutput):
    """
    Args:
        loss (scalar): joint loss, with `labels`.
        logits (`(b, n, v)`): of the tokens; padded ones read blank. With `labels` one per label (and the end mark).
        token_lengths (`(b,)`, int64): tokens of each item.
        loss_att, loss_length, loss_timestamp_length, loss_ctc, loss_hotword, loss_mwer, expected_errors: parts of the
            loss, unweighted, and the errors expected under the candidates of the MWER loss.
        accuracy (scalar): of the first pass, which sees no label.
        alphas (`(b, t or t + 1)`), peaks: weights of the frames and their firing track, see `CifOutput`.
        ctc_logits (`(b, t, v)`): with a CTC head; padded frames read blank.
        encoder_last_hidden_state (`(b, t, hidden_size)`), encoder_attention_mask (`(b, t)`, bool, True = real).
        hidden_states, attentions: of the encoder, when asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    token_lengths: Tensor | None = None
    loss_att: Tensor | None = None
    loss_length: Tensor | None = None
    loss_timestamp_length: Tensor | None = None
    loss_ctc: Tensor | None = None
    loss_hotword: Tensor | None = None
    loss_mwer: Tensor | None = None
    expected_errors: Tensor | None = None
    accuracy: Tensor | None = None
    alphas: Tensor | None = None
    peaks: Tensor | None = None
    ctc_logits: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_attention_mask: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class FunasrParaformerPreTrainedModel(PreTrainedModel):
    """What the networks of the family share: loading and initialisation."""

    config_class = FunasrParaformerConfig
    config: FunasrParaformerConfig
    base_model_prefix = "model"
    main_input_name = "input_features"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["SanmEncoderLayer", "ConformerLayer", "SanmDecoderLayer", "TransformerDecoderLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _supports_flash_attn = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, EncoderSelfAttention) and hasattr(module, "pos_bias_u"):
            init.xavier_uniform_(module.pos_bias_u)
            init.xavier_uniform_(module.pos_bias_v)
        elif isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d):
            # torch's own defaults, as upstream trains from.
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LSTM):
            for parameter in module.parameters():
                init.uniform_(parameter, -(module.hidden_size**-0.5), module.hidden_size**-0.5)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=1.0)


class HotwordEncoder(nn.LSTM):
    """One vector per hotword: the LSTM's state at the hotword's last token."""

    def __init__(self, config: FunasrParaformerConfig) -> None:
        super().__init__(
            config.hidden_size,
            config.hidden_size,
            config.hotword_encoder_layers,
            batch_first=True,
            dropout=config.hotword_encoder_dropout,
            bidirectional=config.hotword_encoder_bidirectional,
        )

    def encode(self, embedded: Tensor, lengths: Tensor) -> Tensor:
        """`(w, m, hidden_size)` embedded tokens of `lengths` `(w,)`, each at least 1 → `(w, hidden_size or twice)`."""
        packed = nn.utils.rnn.pack_padded_sequence(embedded, lengths.cpu(), batch_first=True, enforce_sorted=False)
        states, _ = nn.utils.rnn.pad_packed_sequence(super().forward(packed)[0], batch_first=True)
        return states[torch.arange(len(lengths), device=states.device), lengths.to(states.device) - 1]


class FunasrParaformerModel(FunasrParaformerPreTrainedModel):
    """The network without heads: encoder, predictor, decoder and what encodes hotwords."""

    _can_record_outputs = {
        "hidden_states": [OutputRecorder(SanmEncoderLayer, index=0), OutputRecorder(ConformerLayer, index=0)],
        "attentions": [OutputRecorder(SanmAttention, index=1), OutputRecorder(EncoderSelfAttention, index=1)],
    }

    def __init__(self, config: FunasrParaformerConfig) -> None:
        super().__init__(config)
        self.encoder = SanmEncoder(config) if config.encoder_type == "sanm" else ConformerEncoder(config)
        self.predictor = CifPredictor(config)
        shape, has_embedding = DecoderShape.of(config, "decoder"), not config.share_embedding
        if config.decoder_type == "sanm":
            self.decoder = SanmDecoder(config, shape, has_embedding, config.hotword_type == "contextual")
        else:
            self.decoder = TransformerDecoder(config, shape, has_embedding)
        if config.hotword_type is not None:
            self.bias_encoder = HotwordEncoder(config)
            own = not config.hotword_embed_from_decoder
            self.bias_embed = nn.Embedding(config.vocab_size, config.hidden_size) if own else None
            both = config.hotword_encoder_bidirectional
            self.bias_proj = nn.Linear(2 * config.hidden_size, config.hidden_size) if both else None
        if config.hotword_type == "seaco":
            self.seaco_decoder = SanmDecoder(config, DecoderShape.of(config, "seaco"), has_embedding=False)
        self.post_init()

    @capture_outputs
    def forward(
        self, input_features: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> FunasrParaformerEncoderOutput:
        """The encoder's output for `input_features` `(b, f, input_size)` and `attention_mask` `(b, f)`, 1 = real."""
        features = input_features.to(self.predictor.conv.weight.dtype)
        frame_mask = None
        if attention_mask is not None and not bool(attention_mask.all()):
            frame_mask = attention_mask.bool()
        if self.config.encoder_type == "conformer":
            hidden_states, frame_mask = self.encoder(features, frame_mask)
        elif features.shape[1]:
            hidden_states, _ = self.encoder(features, frame_mask)
        else:
            hidden_states, frame_mask = features.new_zeros(len(features), 0, self.config.hidden_size), None
        if frame_mask is None:
            frame_mask = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        elif self.config.padding == "invariant":
            hidden_states = hidden_states.masked_fill(~frame_mask[..., None], 0.0)
        return FunasrParaformerEncoderOutput(last_hidden_state=hidden_states, attention_mask=frame_mask)

    def encode_joined(self, utterances: list[Tensor]) -> list[Tensor]:
        """Frames `(t, hidden_size)` of a SAN-M encoder for utterances `(t, input_size)`, each as it would be alone."""
        dtype = self.predictor.conv.weight.dtype
        return self.encoder.forward_joined([frames.to(dtype) for frames in utterances])

    def encode_hotwords(self, hotword_ids: Tensor) -> Tensor:
        """Token ids `(w, m)`, negative = padding, at least one token each → vectors `(w, hidden_size)`."""
        lengths = (hotword_ids >= 0).sum(dim=-1)
        ids = hotword_ids.clamp_min(0)
        embedded = self.decoder.embed(ids) if self.bias_embed is None else self.bias_embed(ids)
        encoded = self.bias_encoder.encode(embedded, lengths)
        return encoded if self.bias_proj is None else self.bias_proj(encoded)

    def decode(
        self,
        embeddings: Tensor,
        token_lengths: Tensor,
        memory: Tensor,
        memory_mask: Tensor,
        hotwords: Tensor | None = None,
        hotword_scale: float = 1.0,
    ) -> Tensor:
        """One pass of the decoder.

        Args:
            embeddings (`(b, n, hidden_size)`), token_lengths (`(b,)`): tokens and how many of them are real.
            memory (`(b, t, hidden_size)`), memory_mask (`(b, t)`, bool): the encoder's frames.
            hotwords (`(b, w, hidden_size)`), hotword_scale: for a contextual decoder; `None` = "no hotword".
        """
        if not embeddings.shape[1]:
            return embeddings
        token_mask, memory_mask = mask_of(embeddings, token_lengths), optional_mask(memory_mask)
        if self.config.hotword_type != "contextual":
            return self.decoder(embeddings, token_mask, memory, memory_mask)
        if hotwords is None:
            none = torch.tensor([[self.config.bos_token_id]], device=embeddings.device)
            hotwords = self.encode_hotwords(none)[None].expand(len(embeddings), -1, -1)
        return self.decoder(embeddings, token_mask, memory, memory_mask, hotwords, hotword_scale)

    def attend_to_hotwords(
        self, embeddings: Tensor, decoded: Tensor, token_lengths: Tensor, hotwords: Tensor
    ) -> Tensor:
        """SeACo: tokens `(b, n, c)` and the decoder's output for them look at `hotwords` `(b, w, c)`; their sum."""
        mask = mask_of(embeddings, token_lengths)
        return self.seaco_decoder(embeddings, mask, hotwords, None) + self.seaco_decoder(decoded, mask, hotwords, None)


class FunasrParaformerForSpeechRecognition(
    FunasrParaformerGenerationMixin, FunasrParaformerStreamingMixin, FunasrParaformerPreTrainedModel
):
    """The complete recogniser: encoder, predictor, decoder, heads, joint loss, `generate` and `stream_step`."""

    output_modalities = ("text",)

    def __init__(self, config: FunasrParaformerConfig) -> None:
        super().__init__(config)
        self.model = FunasrParaformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.ctc_head = nn.Linear(config.hidden_size, config.vocab_size) if config.has_ctc_head else None
        is_seaco = config.hotword_type == "seaco"
        self.hotword_head = nn.Linear(config.hidden_size, config.vocab_size) if is_seaco else None
        self.post_init()

    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        hotword_ids: Tensor | None = None,
        hotword_labels: Tensor | None = None,
        sampler_permutations: list[Tensor | None] | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> FunasrParaformerOutput | tuple:
        """
        Args:
            input_features (`(b, f, input_size)`): stacked filter banks after CMVN. attention_mask (`(b, f)`): 1 =
                real frame.
            labels (`(b, n)`): token ids without sentence marks, -100 = ignored, real ones first.
            hotword_ids (`(w, m)`): hotwords that the whole batch sees, -100 = padding; upstream's last one is `[bos]`.
            hotword_labels (`(b, n)`): SeACo's targets: the token inside a hotword, `seaco_no_bias_token_id` elsewhere.
            sampler_permutations: a permutation of the token positions per item, for the sampler; instead of a draw.
            generator: draws the sampler's positions and the MWER candidates (CPU); `None` = torch's global one.

        Raises:
            ValueError: `hotword_labels` without `hotword_ids`, or for a model without SeACo.

        Example:

        ```python
        >>> inputs = processor(audio=waveform, sampling_rate=16000, text="three one")
        >>> model(**inputs).loss.backward()
        ```
        """
        if hotword_labels is not None and (hotword_ids is None or self.config.hotword_type != "seaco"):
            raise ValueError("hotword_labels: expected hotword_ids beside them and a model with hotword_type 'seaco'")
        encoded = self.model(input_features, attention_mask, **kwargs)
        hidden, mask = encoded.last_hidden_state, encoded.attention_mask
        output = FunasrParaformerOutput(
            encoder_last_hidden_state=hidden,
            encoder_attention_mask=mask,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        if self.ctc_head is not None:
            output.ctc_logits = self._blank_padding(self.ctc_head(hidden), mask)
        hotwords = None
        if hotword_ids is not None and self.config.hotword_type is not None:
            hotwords = self.model.encode_hotwords(hotword_ids)[None].expand(len(hidden), -1, -1)
        if labels is None:
            predicted = self.model.predictor(hidden, optional_mask(mask))
            decoded = self.model.decode(predicted.embeddings, predicted.token_lengths, hidden, mask, hotwords)
            self._describe(output, predicted, self.lm_head(decoded))
        else:
            self._add_losses(output, labels, hotwords, hotword_labels, sampler_permutations, generator)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _describe(self, output: FunasrParaformerOutput, predicted: CifOutput, logits: Tensor) -> None:
        real = torch.arange(logits.shape[1], device=logits.device) < predicted.token_lengths[:, None]
        output.logits = self._blank_padding(logits, real)
        output.token_lengths, output.alphas, output.peaks = predicted.token_lengths, predicted.alphas, predicted.peaks

    def _blank_padding(self, logits: Tensor, real: Tensor) -> Tensor:
        padded = logits.new_full((logits.shape[-1],), _PADDED_OTHER_LOGIT)
        padded[self.config.pad_token_id] = _PADDED_BLANK_LOGIT
        return torch.where(real[..., None], logits, padded)

    def _add_losses(
        self,
        output: FunasrParaformerOutput,
        labels: Tensor,
        hotwords: Tensor | None,
        hotword_labels: Tensor | None,
        permutations: list[Tensor | None] | None,
        generator: torch.Generator | None,
    ) -> None:
        config = self.config
        hidden, mask = output.encoder_last_hidden_state, output.encoder_attention_mask
        targets, lengths = self._targets(labels)
        predicted = self.model.predictor(hidden, optional_mask(mask), lengths)
        if hotword_labels is not None:
            output.loss_hotword = self._hotword_loss(predicted, hidden, mask, hotwords, hotword_labels)
            if not config.seaco_train_decoder:
                # The recogniser is frozen; nothing else is trained.
                output.loss = output.loss_hotword
                return
        embeddings, first_ids = self._sample_embeddings(
            predicted, targets, hidden, mask, hotwords, permutations, generator
        )
        logits = self.lm_head(self.model.decode(embeddings, lengths, hidden, mask, hotwords))
        first_ids = logits.argmax(dim=-1) if first_ids is None else first_ids
        self._describe(output, predicted, logits)
        real = targets != -100
        output.accuracy = ((first_ids == targets) & real).sum() / real.sum().clamp_min(1)
        output.loss_att = smoothed_cross_entropy(
            logits, targets, config.label_smoothing, config.length_normalized_loss
        )
        if hotword_labels is not None:
            output.loss = output.loss_hotword + config.seaco_decoder_weight * output.loss_att
            return
        output.loss_length = self._length_loss(predicted.token_counts, lengths)
        loss = config.decoder_weight * output.loss_att + config.predictor_weight * output.loss_length
        if config.timestamp_head is not None:
            fine = self.model.predictor.fine_weights(hidden, optional_mask(mask))
            output.loss_timestamp_length = self._length_loss(fine.sum(dim=-1), lengths)
            loss = loss + config.predictor_weight * config.timestamp_loss_scale * output.loss_timestamp_length
        if config.ctc_weight > 0:
            output.loss_ctc = self._ctc_loss(self.ctc_head(hidden), mask, labels)
            loss = loss + config.ctc_weight * output.loss_ctc
        if config.mwer_weight > 0:
            candidates = sample_candidates(logits, config.mwer_num_candidates, config.mwer_mask_probability, generator)
            ignored = (config.pad_token_id, config.bos_token_id, config.eos_token_id)
            output.loss_mwer, expected = mwer_loss(logits, real, candidates, labels, ignored)
            output.expected_errors = expected.mean()
            loss = loss + config.mwer_weight * output.loss_mwer
        output.loss = loss

    def _targets(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Targets `(b, n)` padded with -100, with the end mark where it counts as a token, and their lengths."""
        lengths = (labels != -100).sum(dim=-1)
        width = int(lengths.max()) if len(lengths) else 0
        targets = labels[:, :width]
        if not self.config.append_eos:
            return targets, lengths
        targets = nn.functional.pad(targets, (0, 1), value=-100)
        return targets.scatter(1, lengths[:, None], self.config.eos_token_id), lengths + 1

    def _sample_embeddings(
        self,
        predicted: CifOutput,
        targets: Tensor,
        hidden: Tensor,
        mask: Tensor,
        hotwords: Tensor | None,
        permutations: list[Tensor | None] | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The glancing sampler: a first pass without gradient, then some tokens see their label (section 2.3).

        As many positions as `sampling_ratio` times the wrong ones, drawn over all positions of the text, the right
        ones too (as upstream does).

        Returns:
            embeddings `(b, n, hidden_size)` and the first pass' ids `(b, n)`, `None` without a sampler.
        """
        lengths, real = predicted.token_lengths, targets != -100
        if self.config.sampling_ratio == 0:
            return predicted.embeddings, None
        with torch.no_grad():
            first = self.model.decode(predicted.embeddings, lengths, hidden, mask, hotwords)
            first_ids = self.lm_head(first).argmax(dim=-1)
        ids, counted = targets.clamp_min(0), real
        if self.config.hotword_type == "contextual" and self.config.padding == "upstream":
            # Upstream's contextual sampler takes padded positions for tokens with id 0.
            counted, lengths = torch.ones_like(real), torch.full_like(lengths, real.shape[1])
        right = ((first_ids == ids) & counted).sum(dim=-1)
        counts = ((lengths - right).float() * self.config.sampling_ratio).long().tolist()
        shown = torch.zeros_like(real)
        for row, (count, length) in enumerate(zip(counts, lengths.tolist(), strict=True)):
            if count == 0:
                continue
            if permutations is None:
                device = "cpu" if generator is None else generator.device
                order = torch.randperm(length, generator=generator, device=device)
            else:
                order = permutations[row]
            shown[row, order[:count].to(shown.device)] = True
        if self.config.share_embedding:
            embedded = nn.functional.embedding(ids, self.lm_head.weight)
        else:
            embedded = self.model.decoder.embed(ids)
        mixed = torch.where(shown[..., None], embedded.to(predicted.embeddings.dtype), predicted.embeddings)
        return mixed * real[..., None], first_ids

    def _hotword_loss(
        self, predicted: CifOutput, hidden: Tensor, mask: Tensor, hotwords: Tensor, hotword_labels: Tensor
    ) -> Tensor:
        """SeACo's cross-entropy; the end mark's position has no target."""
        decoded = self.model.decode(predicted.embeddings, predicted.token_lengths, hidden, mask)
        merged = self.model.attend_to_hotwords(predicted.embeddings, decoded, predicted.token_lengths, hotwords)
        merged = merged[:, :-1] if self.config.append_eos else merged
        return smoothed_cross_entropy(
            self.hotword_head(merged),
            hotword_labels[:, : merged.shape[1]],
            self.config.seaco_label_smoothing,
            self.config.seaco_length_normalized_loss,
        )

    def _length_loss(self, counts: Tensor, lengths: Tensor) -> Tensor:
        """Mean absolute error of the predicted number of tokens, per token or per utterance."""
        normalizer = lengths.sum().clamp_min(1) if self.config.predictor_length_normalized else len(lengths)
        return (counts - lengths).abs().sum() / normalizer

    def _ctc_loss(self, logits: Tensor, frame_mask: Tensor, labels: Tensor) -> Tensor:
        """Mean over the items whose text fits into their frames, as upstream; 0 where none does."""
        lengths, label_lengths = frame_mask.sum(dim=-1), (labels != -100).sum(dim=-1)
        if logits.shape[1] == 0:
            return logits.sum()
        losses = nn.functional.ctc_loss(
            logits.float().log_softmax(dim=-1).transpose(0, 1),
            labels.clamp_min(0),
            lengths,
            label_lengths,
            blank=self.config.pad_token_id,
            reduction="none",
            zero_infinity=True,
        )
        repeats = ((labels[:, 1:] == labels[:, :-1]) & (labels[:, 1:] != -100)).sum(dim=-1)
        fits = label_lengths + repeats <= lengths
        return losses.masked_fill(~fits, 0.0).sum() / fits.sum().clamp_min(1)


def optional_mask(mask: Tensor) -> Tensor | None:
    """`None` where nothing is masked, so that kernels without a mask are taken."""
    return None if bool(mask.all()) else mask


def mask_of(embeddings: Tensor, token_lengths: Tensor) -> Tensor | None:
    """`(b, n)` bool, True = a token of the item; `None` where all are."""
    real = torch.arange(embeddings.shape[1], device=embeddings.device) < token_lengths[:, None]
    return optional_mask(real)


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, smoothing: float, per_token: bool) -> Tensor:
    """KL divergence to `1 - s` on the target and `s / (v - 1)` elsewhere (upstream's `LabelSmoothingLoss`).

    Written as cross-entropy minus the entropy of the smoothed target, so that no `(tokens, v)` target is built.

    Args:
        logits (`(b, n, v)`), targets (`(b, n)`): -100 = ignored.
        per_token: average over tokens instead of utterances.
    """
    real = targets != -100
    log_probs = logits[real].float().log_softmax(dim=-1)
    picked = log_probs.gather(1, targets[real][:, None])[:, 0]
    confidence, rest = 1.0 - smoothing, smoothing / (logits.shape[-1] - 1)
    cross_entropy = -(confidence * picked + rest * (log_probs.sum(dim=-1) - picked)).sum()
    negative_entropy = sum(
        count * share * math.log(share)
        for count, share in ((1, confidence), (logits.shape[-1] - 1, rest))
        if share > 0
    )
    total = cross_entropy + negative_entropy * len(picked)
    return total / (max(len(picked), 1) if per_token else logits.shape[0])


FunasrParaformerForSpeechRecognition.register_for_auto_class("AutoModelForSpeechSeq2Seq")

if TYPE_CHECKING:
    # Never runs: names the pipeline so that saving a fine-tune copies its file along with the model's code.
    from .pipeline_speech_recognition import SpeechRecognitionPipeline  # noqa: F401
