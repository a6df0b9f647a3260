"""Text to units: the encoder-decoder that speaks the answers of chains of modality, for which nobody made recordings.

Upstream: `fnlp/text2unit`, a fairseq Transformer on pairs of text and units (SpeechGPT, section 3.2), beam 5. Here it
is one of transformers' encoder-decoders over the vocabulary of a unit language model.
"""

from collections.abc import Sequence

import torch
from tqdm import tqdm
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_speechllm.models.unit_string import parse_unit_string


@torch.no_grad()
def speak_texts(
    model: str, texts: Sequence[str], num_beams: int = 5, max_new_tokens: int = 1000, batch_size: int = 16
) -> list[list[int]]:
    """Units of each text, adjacent repeats removed, as a text-to-unit model says them.

    Args:
        model: folder or Hub id of a model of `training/train_text_to_unit.py`.
        texts: what to say. num_beams, max_new_tokens: of the search; upstream's by default, and never more tokens than
            the model has positions for.
    """
    network = AutoModelForSeq2SeqLM.from_pretrained(model).eval()
    max_new_tokens = min(max_new_tokens, network.config.max_position_embeddings - 1)
    tokenizer = AutoTokenizer.from_pretrained(model)
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    units: list[list[int]] = [[] for _ in texts]
    for start in tqdm(range(0, len(order), batch_size), desc="text to units", unit="batch"):
        rows = order[start : start + batch_size]
        inputs = tokenizer([texts[index] for index in rows], padding=True, return_tensors="pt").to(network.device)
        found = network.generate(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        for index, ids in zip(rows, found, strict=True):
            units[index] = parse_unit_string(tokenizer.decode(ids))
    return units
