"""A byte-level BPE tokenizer out of the texts at hand, for a language model that is trained from nothing."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


def train_byte_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train it; any text can be encoded, and decoding gives the text back.

    Args:
        texts: what the pairs are counted in.
        vocab_size (`int`): at most this many tokens: `<pad>` 0, `<s>` 1 (put before every text), `</s>` 2, the 256
            bytes, and merges.

    Raises:
        ValueError: a vocabulary too small for the bytes.
    """
    if vocab_size < 259:
        raise ValueError(f"vocab_size: expected at least 259 (256 bytes, <pad>, <s>, </s>), got {vocab_size}")
    special = ["<pad>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
