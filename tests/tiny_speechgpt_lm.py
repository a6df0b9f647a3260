"""A unit language model of a few thousand parameters, and the pack that upstream would publish of it."""

import json
import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from hf_speechllm.models.configuration_speechgpt_unit_vocoder import SpeechGptUnitVocoderConfig
from hf_speechllm.models.configuration_speechgpt_units import SpeechGptUnitsConfig
from hf_speechllm.models.modeling_speechgpt_lm import SpeechGptForCausalLM
from hf_speechllm.models.modeling_speechgpt_unit_vocoder import SpeechGptUnitVocoderModel
from hf_speechllm.models.modeling_speechgpt_units import SpeechGptUnitsModel
from hf_speechllm.models.processing_speechgpt_lm import SpeechGptProcessor
from hf_speechllm.upstream.speechgpt_tokenizer import build_speechgpt_tokenizer, read_published_tokenizer


GOLDEN = Path(__file__).parent / "golden" / "speechgpt" / "prompts_three_stages"
TOKENIZER_FILES = ("tokenizer.model", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json")
# 420 pieces, 1000 units, <sosp>, <eosp>, four dialogue tokens.
VOCABULARY, FIRST_UNIT, NUM_UNITS = 1426, 420, 1000
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BASES = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}


def build_tokenizer() -> PreTrainedTokenizerFast:
    return build_speechgpt_tokenizer(read_published_tokenizer(GOLDEN))


def build_plain(base: str = "llama", seed: int = 0, **changes) -> LlamaForCausalLM | Qwen2ForCausalLM:
    """The plain causal LM, with weights large enough that its output depends on its input."""
    config, model = BASES[base]
    torch.manual_seed(seed)
    plain = model(config(**{**SIZES, "initializer_range": 0.4, **changes})).eval()
    plain.config.initializer_range = 0.02
    return plain


def build_model(base: str = "llama", seed: int = 0, **changes) -> SpeechGptForCausalLM:
    return SpeechGptForCausalLM.from_plain(build_plain(base, seed, **changes), FIRST_UNIT, NUM_UNITS)


def save_folder(folder: Path, **changes) -> Path:
    build_model(**changes).save_pretrained(folder)
    SpeechGptProcessor(build_tokenizer()).save_pretrained(folder)
    return folder


def write_pack(folder: Path, plain: LlamaForCausalLM, **config_changes) -> Path:
    """The layout of `fnlp/SpeechGPT-7B-cm`, weights in one `pytorch_model.bin`."""
    folder.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(GOLDEN / name, folder / name)
    text = plain.config
    config = {
        "_name_or_path": "output/stage2/",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings,
        "model_type": "llama",
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": text.tie_word_embeddings,
        "torch_dtype": "float32",
        "transformers_version": "4.29.0.dev0",
        "use_cache": True,
        "vocab_size": text.vocab_size,
    }
    (folder / "config.json").write_text(json.dumps({**config, **config_changes}), encoding="utf-8")
    torch.save(upstream_state(plain), folder / "pytorch_model.bin")
    return folder


def upstream_state(plain: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """With the inverse frequencies that releases before 4.32 wrote."""
    state = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    size = plain.config.hidden_size // plain.config.num_attention_heads
    for layer in range(plain.config.num_hidden_layers):
        frequencies = 10000.0 ** -(torch.arange(0, size, 2).float() / size)
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies
    return state


def build_units() -> SpeechGptUnitsModel:
    """1000 units of a HuBERT of two layers."""
    torch.manual_seed(0)
    hubert = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "conv_dim": [8] * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
    }
    return SpeechGptUnitsModel(SpeechGptUnitsConfig(hubert_config=hubert, layer=2, num_units=NUM_UNITS)).eval()


def build_vocoder(durations: bool = True, kernels: tuple[int, ...] = (11, 8, 8, 4, 4)) -> SpeechGptUnitVocoderModel:
    """The published strides, few channels, weights large enough that it sounds."""
    torch.manual_seed(0)
    generator = {
        "model_in_dim": 8,
        "upsample_rates": [5, 4, 4, 2, 2],
        "upsample_kernel_sizes": list(kernels),
        "upsample_initial_channel": 32,
        "resblock_kernel_sizes": [3, 7],
        "resblock_dilation_sizes": [[1, 3], [1, 3]],
        "normalize_before": False,
    }
    config = SpeechGptUnitVocoderConfig(
        embedding_size=8, duration_hidden_size=8 if durations else 0, hifigan_config=generator
    )
    vocoder = SpeechGptUnitVocoderModel(config).eval()
    with torch.no_grad():
        if durations:
            vocoder.duration_predictor.proj.bias.fill_(1.0)
        for parameter in vocoder.generator.parameters():
            if parameter.dim() > 1:
                parameter.mul_(20)
    return vocoder
