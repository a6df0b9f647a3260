"""Tiny Paraformers for the tests: every option of the configuration, random weights that fire a few tokens."""

import torch

from hf_speechllm.models.configuration_funasr_paraformer import FunasrParaformerConfig
from hf_speechllm.models.modeling_funasr_paraformer import FunasrParaformerForSpeechRecognition


VOCABULARY = 23
INPUT_SIZE = 12

BASE = {
    "vocab_size": VOCABULARY,
    "input_size": INPUT_SIZE,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_intermediate_size": 12,
    "seaco_layers": 2,
    "seaco_attention_heads": 2,
    "seaco_intermediate_size": 12,
}
CONFORMER = {
    "encoder_type": "conformer",
    "input_size": 20,
    "stacked_frames": 1,
    "conv_kernel_size": 5,
    "subsampling_type": "conv2d4",
}
BICIF = {"cif_integration": "sequential", "timestamp_head": "cnn_blstm"}

VARIANTS: dict[str, dict] = {
    "paraformer": {},
    "decoder without cross-attention": {"decoder_fsmn_layers": 2},
    "causal memory": {"fsmn_shift": 2, "decoder_fsmn_shift": 5},
    "one layer": {"num_hidden_layers": 1, "decoder_layers": 1},
    "first predictor": {"cif_groups": 16, "cif_residual": True, "cif_integration": "sequential"},
    "dynamic threshold": {"cif_dynamic_threshold": True},
    "no tail": {"cif_tail_threshold": 0.0},
    "smooth": {"cif_smooth_factor": 0.8, "cif_noise_threshold": 0.05, "cif_left_order": 2},
    "bicif": BICIF,
    "bicif with convolution": {**BICIF, "timestamp_head": "cnn", "timestamp_from_conv": True, "upsample_times": 5},
    "shared embedding": {"share_embedding": True},
    "no end mark": {"append_eos": False},
    "no sampler": {"sampling_ratio": 0.0},
    "ctc": {"ctc_weight": 0.3, "length_normalized_loss": False},
    "mwer": {"mwer_weight": 0.5},
    "transformer decoder": {"decoder_type": "transformer"},
    "wenet's conformer": CONFORMER,
    "conformer, shifted": {**CONFORMER, "attention_type": "shifted_rel_selfattn", "conv_norm_type": "layer_norm"},
    "conformer, legacy": {**CONFORMER, "attention_type": "legacy_rel_selfattn", "decoder_type": "transformer"},
    "conformer, absolute": {**CONFORMER, "attention_type": "selfattn", "position_embedding_type": "abs_pos"},
    "contextual": {"hotword_type": "contextual", "hotword_encoder_layers": 1, "hotword_embed_from_decoder": False},
    "contextual, last of three": {
        "hotword_type": "contextual",
        "hotword_encoder_layers": 1,
        "decoder_layers": 2,
        "decoder_fsmn_layers": 1,
    },
    "seaco": {**BICIF, "hotword_type": "seaco", "seaco_no_bias_token_id": 19, "hotword_filter_size": 3},
    "seaco, both directions": {
        "hotword_type": "seaco",
        "seaco_no_bias_token_id": 19,
        "hotword_encoder_bidirectional": True,
    },
}


def tiny_model(variant: str, seed: int = 0, **changes) -> FunasrParaformerForSpeechRecognition:
    """A model in evaluation mode whose weights are large enough for the output to depend on the input."""
    config = FunasrParaformerConfig(**{**BASE, **VARIANTS[variant], **changes})
    torch.manual_seed(seed)
    model = FunasrParaformerForSpeechRecognition(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=1.2 * parameter[0].numel() ** -0.5)
            elif "norm" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        # About one token every three frames.
        model.model.predictor.alpha_proj.bias.fill_(-0.7)
    return model


def tiny_features(model: FunasrParaformerForSpeechRecognition, *lengths: int, seed: int = 1) -> list[torch.Tensor]:
    """Random features `(length, input_size)`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, model.config.input_size, generator=generator) for length in lengths]


def pad(pieces: list[torch.Tensor], extra: int = 0) -> dict[str, torch.Tensor]:
    """Model inputs; padded frames hold large numbers, which nothing may read."""
    width = max(len(piece) for piece in pieces) + extra
    features = torch.full((len(pieces), width, pieces[0].shape[1]), 7.0)
    mask = torch.zeros(len(pieces), width, dtype=torch.long)
    for row, piece in enumerate(pieces):
        features[row, : len(piece)] = piece
        mask[row, : len(piece)] = 1
    return {"input_features": features, "attention_mask": mask}


def pad_labels(rows: list[list[int]]) -> torch.Tensor:
    """`(b, n)` int64, padded with -100."""
    width = max(len(row) for row in rows)
    return torch.tensor([row + [-100] * (width - len(row)) for row in rows], dtype=torch.long).view(len(rows), width)
