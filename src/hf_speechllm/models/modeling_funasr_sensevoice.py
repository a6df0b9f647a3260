"""SenseVoice-Small: one non-autoregressive network for text, language, emotion and audio events.

Paper: https://arxiv.org/abs/2407.04051. Upstream: modelscope/FunASR, `funasr/models/sense_voice/model.py`.

Shape legend: `b` batch, `t` feature frames, `n` labels, `v` vocabulary. Four prompt frames (language, emotion, event,
text normalisation) come before the features in the encoder; what the output says there are the answers.

What differs from upstream: padded frames are zero and read blank, an evaluation shows the model the true language
unless a generator is given (upstream draws in evaluation too), a label that a CTC path cannot spell in the frames at
hand counts nothing in evaluation as in training, and labels without a usable tag are refused by name.
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

from .configuration_funasr_sensevoice import FunasrSenseVoiceConfig
from .generation_funasr_sensevoice import FunasrSenseVoiceGenerationMixin
from .sanm import SanmAttention, SanmEncoder, SanmEncoderLayer


# Logit of blank on padded frames (all others stay below it), so that a greedy decoder reads nothing there.
_PADDED_BLANK_LOGIT = 0.0
_PADDED_OTHER_LOGIT = -1.0e4


@dataclass
class FunasrSenseVoiceEncoderOutput(BaseModelOutput):
    """
    Args:
        last_hidden_state (`(b, 4 + t, hidden_size)`): zero on padded frames.
        attention_mask (`(b, 4 + t)`, bool): True = prompt or real frame.
    """

    attention_mask: Tensor | None = None


@dataclass
class FunasrSenseVoiceOutput(ModelOutput):
    """
    Args:
        loss (scalar): `loss_ctc + loss_rich`, with `labels`.
        logits (`(b, t, v)`): CTC logits of the audio's frames; padded frames read blank.
        prompt_logits (`(b, 4, v)`): logits of the answers: language, emotion, event, text normalisation.
        loss_ctc, loss_rich, accuracy (scalars): CTC on the text, cross-entropy on the answers, share of right answers.
        encoder_last_hidden_state (`(b, t, hidden_size)`), encoder_attention_mask (`(b, t)`, bool, True = real): of
            the audio's frames.
        hidden_states, attentions: of the encoder over `4 + t` frames, when asked for.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    prompt_logits: Tensor | None = None
    loss_ctc: Tensor | None = None
    loss_rich: Tensor | None = None
    accuracy: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_attention_mask: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class FunasrSenseVoicePreTrainedModel(PreTrainedModel):
    """What the networks of the family share: loading and initialisation."""

    config_class = FunasrSenseVoiceConfig
    config: FunasrSenseVoiceConfig
    base_model_prefix = "model"
    main_input_name = "input_features"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["SanmEncoderLayer"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _supports_flash_attn = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear | nn.Conv1d):
            # torch's own defaults, as upstream trains from.
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, mean=0.0, std=1.0)


class FunasrSenseVoiceModel(FunasrSenseVoicePreTrainedModel):
    """The network without its head: prompt embeddings and SAN-M encoder."""

    _can_record_outputs = {
        "hidden_states": OutputRecorder(SanmEncoderLayer, index=0),
        "attentions": OutputRecorder(SanmAttention, index=1),
    }

    def __init__(self, config: FunasrSenseVoiceConfig) -> None:
        super().__init__(config)
        self.prompt_embeddings = nn.Embedding(config.num_prompts, config.input_size)
        self.encoder = SanmEncoder(config)
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        prompt_ids: Tensor | None = None,
        **kwargs,
    ) -> FunasrSenseVoiceEncoderOutput:
        """
        Args:
            input_features (`(b, t, input_size)`): stacked filter banks after CMVN; `t` may be 0.
            attention_mask (`(b, t)`): 1 = real frame; `None` = all real.
            prompt_ids (`(b, 4)`, int64): rows of the prompt embedding; `None` = any language, no text normalisation.
        """
        config, batch = self.config, input_features.shape[0]
        if prompt_ids is None:
            row = [config.language_prompt_ids["auto"], config.emotion_prompt_id, config.event_prompt_id]
            row.append(config.textnorm_prompt_ids["woitn"])
            prompt_ids = torch.tensor([row], device=input_features.device).expand(batch, -1)
        frames = self.with_prompts(input_features, prompt_ids)
        mask = torch.ones(frames.shape[:2], dtype=torch.bool, device=frames.device)
        padded = None
        if attention_mask is not None and not bool(attention_mask.all()):
            mask[:, config.num_prompt_frames :] = attention_mask.bool()
            padded = mask
        hidden_states, _ = self.encoder(frames, padded)
        if padded is not None:
            hidden_states = hidden_states.masked_fill(~mask[..., None], 0.0)
        return FunasrSenseVoiceEncoderOutput(last_hidden_state=hidden_states, attention_mask=mask)

    def with_prompts(self, input_features: Tensor, prompt_ids: Tensor) -> Tensor:
        """The encoder's input `(b, 4 + t, input_size)`: embeddings of the prompts `(b, 4)`, then the features."""
        prompts = self.prompt_embeddings(prompt_ids)
        return torch.cat([prompts, input_features.to(prompts.dtype)], dim=1)


class FunasrSenseVoiceForSpeechRecognition(FunasrSenseVoiceGenerationMixin, FunasrSenseVoicePreTrainedModel):
    """The complete recogniser: encoder, CTC head, losses, `generate` and `align`."""

    output_modalities = ("text",)

    def __init__(self, config: FunasrSenseVoiceConfig) -> None:
        super().__init__(config)
        self.model = FunasrSenseVoiceModel(config)
        self.ctc_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        prompt_ids: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> FunasrSenseVoiceOutput | tuple:
        """
        Args:
            input_features (`(b, t, input_size)`): stacked filter banks after CMVN. attention_mask (`(b, t)`): 1 =
                real frame.
            labels (`(b, 4 + n)`): language, emotion, event, text normalisation, then the text; -100 = padding, and
                for an answer that nobody knows (but see `prompt_ids_of_labels`).
            prompt_ids (`(b, 4)`): rows of the prompt embedding. By default those of `labels`, else any language
                without text normalisation.
            generator: decides which language prompts are hidden, see `prompt_ids_of_labels`.

        Raises:
            ValueError: labels without the four answers, or with a text normalisation that has no prompt.

        Example:

        ```python
        >>> inputs = processor(audio=waveform, sampling_rate=16000, text="hello", language="en", emotion="HAPPY")
        >>> model(**inputs).loss.backward()
        ```
        """
        if prompt_ids is None and labels is not None:
            prompt_ids = self.prompt_ids_of_labels(labels, generator)
        encoded = self.model(input_features, attention_mask, prompt_ids, **kwargs)
        first = self.config.num_prompt_frames
        hidden, mask = encoded.last_hidden_state, encoded.attention_mask[:, first:]
        all_logits = self.ctc_head(hidden)
        prompt_logits, logits = all_logits[:, :first], all_logits[:, first:]
        output = FunasrSenseVoiceOutput(
            logits=self._blank_padded_frames(logits, mask),
            prompt_logits=prompt_logits,
            encoder_last_hidden_state=hidden[:, first:],
            encoder_attention_mask=mask,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        if labels is not None:
            output.loss_ctc = self._ctc_loss(logits, mask, labels[:, first:])
            output.loss_rich = self._rich_loss(prompt_logits, labels[:, :first])
            known = labels[:, :first] >= 0
            right = (prompt_logits.argmax(dim=-1) == labels[:, :first]) & known
            output.accuracy = (right.sum() / known.sum().clamp_min(1)).detach()
            output.loss = output.loss_ctc + output.loss_rich
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def prompt_ids_of_labels(self, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Prompts that training shows for a batch of labels.

        The language is that of the label with probability `1 - config.language_dropout` and `"auto"` otherwise, or
        where the label has no prompt of its own. One number per utterance is drawn from `generator`. In evaluation
        without a generator nothing is hidden. The text normalisation is always that of the label.

        Args:
            labels (`(b, 4 + n)`): see [`forward`].

        Returns:
            `(b, 4)` int64 rows of the prompt embedding.

        Raises:
            ValueError: no room for the four answers, or a fourth label that is no text normalisation.
        """
        config = self.config
        if labels.dim() != 2 or labels.shape[1] < config.num_prompt_frames:
            raise ValueError(
                f"labels: expected (batch, {config.num_prompt_frames} + text): language, emotion, event, text "
                f"normalisation, text; got {tuple(labels.shape)}"
            )
        auto = config.language_prompt_ids["auto"]
        prompt_of = {
            unit: config.language_prompt_ids.get(name, auto) for name, unit in config.language_token_ids.items()
        }
        languages = [prompt_of.get(unit, auto) for unit in labels[:, 0].tolist()]
        styles = {unit: config.textnorm_prompt_ids[name] for name, unit in config.textnorm_token_ids.items()}
        for row, unit in enumerate(labels[:, 3].tolist()):
            if unit not in styles:
                names = {unit: f"<|{name}|>" for name, unit in config.textnorm_token_ids.items()}
                raise ValueError(f"labels[{row}, 3]: expected a text normalisation, one of {names}, got {unit}")
        rows = [
            [language, config.emotion_prompt_id, config.event_prompt_id, styles[unit]]
            for language, unit in zip(languages, labels[:, 3].tolist(), strict=True)
        ]
        prompt_ids = torch.tensor(rows, device=labels.device)
        if self.training or generator is not None:
            device = "cpu" if generator is None else generator.device
            drawn = torch.rand(len(rows), generator=generator, device=device).to(labels.device)
            prompt_ids[:, 0] = prompt_ids[:, 0].masked_fill(drawn <= config.language_dropout, auto)
        return prompt_ids

    def _blank_padded_frames(self, logits: Tensor, frame_mask: Tensor) -> Tensor:
        padded = logits.new_full((logits.shape[-1],), _PADDED_OTHER_LOGIT)
        padded[self.config.pad_token_id] = _PADDED_BLANK_LOGIT
        return torch.where(frame_mask[..., None], logits, padded)

    def _ctc_loss(self, logits: Tensor, frame_mask: Tensor, labels: Tensor) -> Tensor:
        """Mean over the items whose text fits into their frames; 0 where none does."""
        lengths, label_lengths = frame_mask.sum(dim=-1), (labels != -100).sum(dim=-1)
        if logits.shape[1] == 0:
            # An empty time axis is more than the kernel takes; these items cannot spell anything.
            return logits.sum()
        log_probs = logits.float().log_softmax(dim=-1).transpose(0, 1)
        losses = nn.functional.ctc_loss(
            log_probs,
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

    def _rich_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """KL divergence of the four answers to `1 - s` on the label and `s / (v - 1)` elsewhere (upstream's
        `LabelSmoothingLoss`), written as cross-entropy minus the entropy of the smoothed target."""
        smoothing, vocabulary = self.config.label_smoothing, logits.shape[-1]
        known = targets != -100
        log_probs = logits[known].float().log_softmax(dim=-1)
        picked = log_probs.gather(1, targets[known][:, None])[:, 0]
        confidence, rest = 1.0 - smoothing, smoothing / (vocabulary - 1)
        cross_entropy = -(confidence * picked + rest * (log_probs.sum(dim=-1) - picked)).sum()
        negative_entropy = sum(
            count * share * math.log(share) for count, share in ((1, confidence), (vocabulary - 1, rest)) if share > 0
        )
        total = cross_entropy + negative_entropy * len(picked)
        return total / (max(len(picked), 1) if self.config.length_normalized_loss else logits.shape[0])


FunasrSenseVoiceForSpeechRecognition.register_for_auto_class("AutoModelForSpeechSeq2Seq")

if TYPE_CHECKING:
    # Never runs: names the pipeline so that saving a fine-tune copies its file along with the model's code.
    from .pipeline_speech_recognition import SpeechRecognitionPipeline  # noqa: F401
