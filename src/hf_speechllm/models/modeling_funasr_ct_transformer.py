"""CT-Transformer: which punctuation mark follows each word of a recognised text.

Paper: https://arxiv.org/abs/2003.01309. Upstream: modelscope/FunASR, `funasr/models/ct_transformer/model.py`.

Shape legend: `b` batch, `n` words, `v` vocabulary. What differs from upstream: no space before the text, and the label
`<unk>` puts no "<unk>" into it.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers import initialization as init
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_funasr_ct_transformer import FunasrCtTransformerConfig
from .punctuation_text import end_of_finished, end_text, join_words, split_words
from .sanm import SanmAttention, SanmEncoder, SanmEncoderLayer


class FunasrCtTransformerPreTrainedModel(PreTrainedModel):
    """Loading and initialisation."""

    config_class = FunasrCtTransformerConfig
    config: FunasrCtTransformerConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
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


class FunasrCtTransformerForTokenClassification(FunasrCtTransformerPreTrainedModel):
    """Embedding, encoder, a label per word, and `punctuate` for a text of any length."""

    _can_record_outputs = {
        "hidden_states": OutputRecorder(SanmEncoderLayer, index=0),
        "attentions": OutputRecorder(SanmAttention, index=1),
    }

    def __init__(self, config: FunasrCtTransformerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.input_size)
        self.encoder = SanmEncoder(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs,
    ) -> TokenClassifierOutput:
        """
        Args:
            input_ids (`(b, n)`, int64): words. attention_mask (`(b, n)`): 1 = real word.
            labels (`(b, n)`, int64): mark after each word, -100 = none.

        Returns:
            `logits` `(b, n, num_labels)`, those of padded words mean nothing; `loss`, a mean over the words with a
            label, weighted by `config.label_weights`.
        """
        mask = None
        if attention_mask is not None and not bool(attention_mask.all()):
            mask = attention_mask.bool()
        hidden_states, _ = self.encoder(self.embed_tokens(input_ids), mask)
        logits = self.classifier(hidden_states)
        loss = None
        if labels is not None:
            weights = self.config.label_weights
            weight = None if weights is None else torch.tensor(weights, device=logits.device)
            losses = nn.functional.cross_entropy(
                logits.float().flatten(0, 1), labels.flatten(), weight, ignore_index=-100, reduction="sum"
            )
            # Upstream divides by the number of words, not by their weights.
            loss = losses / (labels != -100).sum().clamp_min(1)
        return TokenClassifierOutput(loss=loss, logits=logits)

    @torch.no_grad()
    def punctuate(
        self, text: str, tokenizer: PreTrainedTokenizerBase, piece_size: int = 20, longest_sentence: int = 200
    ) -> str:
        """The text with punctuation marks.

        The words come in pieces. What follows the last finished sentence is looked at again with the next piece.

        Args:
            text: without punctuation; of any length.
            tokenizer: of the model; it knows words.
            piece_size: words in a piece.
            longest_sentence: words after which a comma becomes the end of a sentence.
        """
        marks_of_labels = [self.config.id2label[label] for label in range(self.config.num_labels)]
        words = split_words(text)
        written, waiting = "", []
        for start in range(0, len(words), piece_size):
            waiting += words[start : start + piece_size]
            ids = torch.tensor([tokenizer.convert_tokens_to_ids(waiting)], device=self.device)
            labels = self(input_ids=ids).logits[0].argmax(dim=-1).tolist()
            marks = [marks_of_labels[label] for label in labels]
            finished = len(waiting)
            if start + piece_size < len(words):
                finished, is_comma = end_of_finished(marks, longest_sentence)
                if is_comma:
                    marks[finished - 1] = marks_of_labels[self.config.sentence_end_id]
            written += join_words(waiting[:finished], marks[:finished])
            waiting = waiting[finished:]
        return end_text(written).lstrip(" ")


FunasrCtTransformerForTokenClassification.register_for_auto_class("AutoModel")
