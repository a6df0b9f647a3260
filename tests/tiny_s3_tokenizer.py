"""Tiny S3 tokenizers and CAM++ encoders for the tests: random weights."""

import torch

from hf_speechllm.models.configuration_campplus import CampplusConfig
from hf_speechllm.models.configuration_s3_tokenizer import S3TokenizerConfig
from hf_speechllm.models.modeling_campplus import CampplusModel
from hf_speechllm.models.modeling_s3_tokenizer import S3TokenizerForCTC, S3TokenizerModel


S3_SIZES = {
    **{"num_mel_bins": 16, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2},
    **{"num_attention_heads": 2, "fsmn_kernel_size": 5, "fsq_size": 3, "codebook_size": 27},
    **{"num_recognition_layers": 1, "vocab_size": 9, "initializer_range": 0.2},
}
# The three published shapes: what makes each of them.
VERSIONS = {
    "v1_50hz": {
        **{"conv1_stride": 1, "position_embedding": "sinusoidal", "use_fsmn": False, "quantizer": "vq"},
        "codebook_size": 24,
    },
    "v1_25hz": {"position_embedding": "sinusoidal", "use_fsmn": False, "quantizer": "vq", "codebook_size": 24},
    "v2": {},
}


def tiny_s3_tokenizer(version: str = "v2", **changes) -> S3TokenizerModel:
    torch.manual_seed(0)
    return S3TokenizerModel(S3TokenizerConfig(**{**S3_SIZES, **VERSIONS[version], **changes})).eval()


def tiny_s3_recogniser(version: str = "v2", **changes) -> S3TokenizerForCTC:
    torch.manual_seed(0)
    return S3TokenizerForCTC(S3TokenizerConfig(**{**S3_SIZES, **VERSIONS[version], **changes}))


CAMPPLUS_SIZES = {
    **{"num_mel_bins": 16, "head_channels": 4, "initial_size": 8, "growth_rate": 4, "bottleneck_size": 8},
    **{"num_block_layers": [2, 2], "block_dilations": [1, 2], "segment_length": 7, "embedding_size": 6},
    "initializer_range": 0.3,
}


def tiny_campplus(**changes) -> CampplusModel:
    """An encoder whose norms have seen data, so that padding would show."""
    torch.manual_seed(0)
    model = CampplusModel(CampplusConfig(**{**CAMPPLUS_SIZES, **changes})).eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_(std=0.3)
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    return model
