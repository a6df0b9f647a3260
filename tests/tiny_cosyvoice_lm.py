"""Tiny language models of CosyVoice with random weights, and the packs that upstream would load them from."""

from pathlib import Path

import torch
from torch import Tensor

from hf_speechllm.models.configuration_cosyvoice_lm import CosyVoiceLmConfig
from hf_speechllm.models.configuration_cosyvoice_transformer_lm import CosyVoiceTransformerLmConfig
from hf_speechllm.models.modeling_cosyvoice_lm import CosyVoiceLmForCausalLM
from hf_speechllm.models.modeling_cosyvoice_transformer_lm import CosyVoiceTransformerLm


TEXT_SIZE, SPEECH_SIZE, END_OF_PROMPT = 64, 40, 62
QWEN = {
    "text_vocab_size": TEXT_SIZE,
    "speech_vocab_size": SPEECH_SIZE,
    "end_of_prompt_id": END_OF_PROMPT,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Large enough for choices that are not all alike.
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
TRANSFORMER = {
    "text_vocab_size": TEXT_SIZE,
    "text_embedding_size": 24,
    "speech_vocab_size": SPEECH_SIZE,
    "text_encoder_hidden_size": 16,
    "text_encoder_num_layers": 2,
    "text_encoder_num_heads": 2,
    "text_encoder_intermediate_size": 24,
    "input_size": 20,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.3,
    "dropout": 0.0,
    "positional_dropout": 0.0,
    "text_encoder_dropout": 0.0,
    "text_encoder_positional_dropout": 0.0,
}


def build_qwen(version: int = 2, seed: int = 0, **changes) -> CosyVoiceLmForCausalLM:
    """Version 2 or 3, in evaluation mode."""
    torch.manual_seed(seed)
    model = CosyVoiceLmForCausalLM(CosyVoiceLmConfig(version=version, **{**QWEN, **changes})).eval()
    if model.lm_head.bias is not None:
        torch.nn.init.normal_(model.lm_head.bias, std=0.3)
    return model


def build_transformer(seed: int = 0, **changes) -> CosyVoiceTransformerLm:
    """Version 1, in evaluation mode."""
    torch.manual_seed(seed)
    model = CosyVoiceTransformerLm(CosyVoiceTransformerLmConfig(**{**TRANSFORMER, **changes})).eval()
    # A fresh model has no biases and norms of ones, which hides mistakes.
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=float("norm" in name and "weight" in name), std=0.2)
    return model


def build(version: int, **changes) -> CosyVoiceLmForCausalLM | CosyVoiceTransformerLm:
    """Any version."""
    return build_transformer(**changes) if version == 1 else build_qwen(version, **changes)


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows and mask, padded on the right with an id that is none."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [-7] * (width - len(row)) for row in rows], dtype=torch.long)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], dtype=torch.long)
    return ids, mask


def sentences(version: int, seed: int = 0) -> dict[str, Tensor]:
    """Three sentences of different lengths, with and without prompt text, prompt speech and speaker."""
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int, size: int) -> list[int]:
        return torch.randint(1, size, (count,), generator=generator).tolist()

    text = [ids(count, TEXT_SIZE - 4) for count in (6, 3, 4)]
    before = [ids(count, TEXT_SIZE - 4) for count in (4, 0, 2)]
    if version == 3:
        before = [[*row, END_OF_PROMPT] for row in before]
    speech = [ids(count, SPEECH_SIZE) for count in (8, 0, 3)]
    inputs = {}
    for name, rows in (("text", text), ("prompt_text", before), ("prompt_speech", speech)):
        inputs[f"{name}_ids"], inputs[f"{name}_mask"] = padded(rows)
    if version == 1:
        inputs["speaker_embedding"] = torch.randn(3, 192, generator=generator)
        inputs["speaker_mask"] = torch.tensor([1, 0, 1])
    return inputs


def row_alone(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One of the sentences without its padding."""
    alone = {}
    for name in ("text", "prompt_text", "prompt_speech"):
        real = inputs[f"{name}_mask"][row].bool()
        alone[f"{name}_ids"] = inputs[f"{name}_ids"][row : row + 1, real]
    if "speaker_mask" in inputs and inputs["speaker_mask"][row]:
        alone["speaker_embedding"] = inputs["speaker_embedding"][row : row + 1]
    return alone


def save(version: int, folder: Path, **changes) -> Path:
    """A folder that `from_pretrained` loads."""
    build(version, **changes).save_pretrained(folder)
    return folder
