"""Tiny U2++ models for the tests: every option of the configuration, random weights that make the output change."""

import torch

from hf_speechllm.models.configuration_wenet_u2pp import WenetU2ppConfig
from hf_speechllm.models.modeling_wenet_u2pp import WenetU2ppForSpeechRecognition


VOCABULARY = 13

BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "conv_kernel_size": 5,
    "conv_causal": True,
    "conv_norm_type": "layer_norm",
    "use_dynamic_chunk": True,
    "decoder_layers": 2,
    "right_decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_intermediate_size": 12,
    "reverse_weight": 0.3,
}
MOE = {"mlp_type": "moe", "num_experts": 4, "decoder_mlp_type": "moe", "decoder_num_experts": 3}

VARIANTS: dict[str, dict] = {
    "u2pp": {},
    "moe": MOE,
    "moe top-1": {**MOE, "num_experts_per_tok": 1, "decoder_num_experts_per_tok": 3},
    "moe without bias": {**MOE, "mlp_bias": False, "decoder_mlp_bias": False},
    "gated": {"mlp_type": "gated", "decoder_mlp_type": "gated"},
    "conv2d6": {"subsampling_type": "conv2d6"},
    "conv2d8": {"subsampling_type": "conv2d8"},
    "linear": {"subsampling_type": "linear"},
    "absolute": {"position_embedding_type": "abs_pos", "attention_type": "selfattn"},
    "no positions": {"position_embedding_type": "no_pos", "attention_type": "selfattn"},
    "relative without table": {"position_embedding_type": "no_pos"},
    "rel_pos, plain attention": {"attention_type": "selfattn"},
    "no macaron": {"macaron_style": False},
    "no convolution": {"use_conv_module": False},
    "non-causal": {"conv_causal": False},
    "non-causal batch norm": {"conv_causal": False, "conv_norm_type": "batch_norm"},
    "causal batch norm": {"conv_norm_type": "batch_norm"},
    "rms norms": {"conv_norm_type": "rms_norm", "norm_type": "rms_norm", "decoder_norm_type": "rms_norm"},
    "even kernel": {"conv_kernel_size": 8},
    "kernel 1, wide": {"conv_kernel_size": 1, "conv_inner_factor": 4},
    "transformer": {
        "encoder_type": "transformer",
        "attention_type": "selfattn",
        "position_embedding_type": "abs_pos",
        "hidden_act": "relu",
    },
    "transformer post-norm moe": {
        "encoder_type": "transformer",
        "attention_type": "selfattn",
        "normalize_before": False,
        **MOE,
    },
    "grouped queries": {
        "attention_type": "selfattn",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "decoder_attention_heads": 4,
        "decoder_num_key_value_heads": 1,
        "decoder_head_dim": 3,
    },
    "relative grouped queries": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4},
    "post-norm": {"normalize_before": False, "decoder_normalize_before": False},
    "no final norm": {"final_norm": False},
    "static chunk": {"use_dynamic_chunk": False, "static_chunk_size": 3},
    "full context only": {"use_dynamic_chunk": False},
    "no biases": {
        "query_bias": False,
        "key_bias": False,
        "value_bias": False,
        "conv_bias": False,
        "mlp_bias": False,
        "decoder_mlp_bias": False,
        "decoder_key_bias": False,
        "decoder_cross_query_bias": False,
    },
    "no cmvn": {"has_cmvn": False},
    "lite": {"apply_non_blank_embedding": True},
    "one decoder": {"right_decoder_layers": 0, "reverse_weight": 0.0},
    "ctc only": {"decoder_layers": 0, "right_decoder_layers": 0, "reverse_weight": 0.0, "ctc_weight": 1.0},
    "attention only": {"ctc_weight": 0.0},
    "label smoothing": {"label_smoothing": 0.1},
    "tied": {"tie_word_embeddings": True},
    "other ids": {"pad_token_id": 4, "bos_token_id": 0, "eos_token_id": 1},
    "other activations": {"hidden_act": "gelu", "decoder_hidden_act": "hardtanh"},
}


def tiny_model(variant: str = "u2pp", seed: int = 0, **changes) -> WenetU2ppForSpeechRecognition:
    """A model in evaluation mode whose CTC output varies over time and whose every parameter matters."""
    torch.manual_seed(seed)
    model = WenetU2ppForSpeechRecognition(WenetU2ppConfig(**{**BASE, **VARIANTS[variant], **changes})).eval()
    encoder, generator = model.model.encoder, torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if encoder.cmvn is not None:
            encoder.cmvn.mean.fill_(8.0)
            encoder.cmvn.inverse_std.fill_(0.5)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.3 * torch.rand(buffer.shape, generator=generator))
        model.ctc_head.weight.mul_(6.0)
        model.ctc_head.bias.zero_()
        model.ctc_head.bias[model.config.pad_token_id] = 7.0
        for head, decoder in (
            (model.decoder_head, model.model.decoder),
            (model.right_decoder_head, model.model.right_decoder),
        ):
            if head is None:
                continue
            head.weight.mul_(1.0 if model.config.tie_word_embeddings else 3.0)
            for layer in decoder.layers:
                layer.cross_attn.o_proj.weight.mul_(6.0)
    return model


def tiny_features(*num_frames: int, seed: int = 0) -> list[torch.Tensor]:
    """Smooth random features `(frames, 80)`, one per length."""
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for frames in num_frames:
        steps = torch.randn(frames // 6 + 2, 80, generator=generator).repeat_interleave(6, dim=0)[:frames]
        pieces.append(8.0 + 2.0 * steps + 0.3 * torch.randn(frames, 80, generator=generator))
    return pieces


def pad(pieces: list[torch.Tensor], extra: int = 0) -> dict[str, torch.Tensor]:
    """Model inputs of a batch; `extra` padded frames beyond the longest item, filled with rubbish like all padding."""
    width = max(len(piece) for piece in pieces) + extra
    features = torch.full((len(pieces), width, 80), 50.0)
    mask = torch.zeros(len(pieces), width, dtype=torch.long)
    for row, piece in enumerate(pieces):
        features[row, : len(piece)] = piece
        mask[row, : len(piece)] = 1
    return {"input_features": features, "attention_mask": mask}


def pad_labels(rows: list[list[int]]) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [-100] * (width - len(row)) for row in rows], dtype=torch.long).reshape(
        len(rows), width
    )
