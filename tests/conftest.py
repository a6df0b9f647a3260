"""Shared set-up: no network, one thread, a private cache, deprecations as errors, a tiny model with random weights."""

import logging
import os
import tempfile


# Before anything imports huggingface_hub, transformers or torch.
_CACHE = tempfile.mkdtemp(prefix="hf_speechllm_tests_")
os.environ.update(
    HF_HOME=_CACHE,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
)

import shutil  # noqa: E402
import socket  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402


torch.set_num_threads(1)

WORDS = ("eight", "five", "four", "nine", "one", "seven", "six", "three", "two", "zero")


def pytest_configure(config: pytest.Config) -> None:
    """Marks that transformers' own tests carry (`test_transformers_mixin.py`)."""
    flash = [f"flash_attn_{version}test" for version in ("", "3_", "4_")]
    for mark in ("accelerate_tests", "torch_compile_test", *flash):
        config.addinivalue_line("markers", f"{mark}: of transformers' own tests")


def pytest_sessionfinish() -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Any connection that leaves this machine is an error."""
    connect = socket.socket.connect

    def guarded(self, address):
        here = ("127.0.0.1", "::1", "localhost", socket.gethostname())
        if self.family != socket.AF_UNIX and address[0] not in here:
            raise RuntimeError(f"a test tried to reach {address}")
        return connect(self, address)

    socket.socket.connect = guarded
    yield
    socket.socket.connect = connect


class _DeprecationIsAnError(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message.lower():
            raise AssertionError(f"transformers logged a deprecation: {message}")


@pytest.fixture(autouse=True, scope="session")
def deprecation_log_lines_are_errors():
    """transformers announces many removals by its logger instead of by a warning."""
    logger, handler = logging.getLogger("transformers"), _DeprecationIsAnError(level=logging.WARNING)
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


def build_tiny_processor():
    """Processor over ten digit words in WeNet's layout: `<blank>` 0, `<unk>` 1, words, `<sos/eos>` last."""
    from hf_speechllm.models.feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor
    from hf_speechllm.models.processing_wenet_u2pp import WenetU2ppProcessor
    from hf_speechllm.upstream.tokens import build_word_tokenizer

    units = {unit: index for index, unit in enumerate(("<blank>", "<unk>", *WORDS, "<sos/eos>"))}
    return WenetU2ppProcessor(KaldiFbankFeatureExtractor(), build_word_tokenizer(units))


def free_port() -> int:
    """For processes that meet on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def build_tiny_model(seed: int = 0, **changes):
    """U2++ MoE of two layers with random weights, scaled so that its output changes over time."""
    from hf_speechllm.models.configuration_wenet_u2pp import WenetU2ppConfig
    from hf_speechllm.models.modeling_wenet_u2pp import WenetU2ppForSpeechRecognition

    arguments = {
        "vocab_size": len(WORDS) + 3,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "conv_kernel_size": 5,
        "conv_causal": True,
        "conv_norm_type": "layer_norm",
        "use_dynamic_chunk": True,
        "mlp_type": "moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_layers": 1,
        "right_decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_intermediate_size": 16,
        "reverse_weight": 0.3,
    }
    torch.manual_seed(seed)
    model = WenetU2ppForSpeechRecognition(WenetU2ppConfig(**{**arguments, **changes})).eval()
    with torch.no_grad():
        model.model.encoder.cmvn.mean.fill_(11.0)
        model.model.encoder.cmvn.inverse_std.fill_(0.25)
        model.ctc_head.weight.mul_(8.0)
        # Only words and blanks, so that every token has a text.
        model.ctc_head.bias[[1, -1]] = -1e3
    return model


@pytest.fixture(scope="session")
def tiny_processor():
    return build_tiny_processor()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory) -> Path:
    """Folder with model, processor and code, as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("models") / "tiny_u2pp"
    build_tiny_model().save_pretrained(folder)
    build_tiny_processor().save_pretrained(folder)
    return folder


def speech_like(seconds: float, sampling_rate: int = 16000, seed: int = 0) -> np.ndarray:
    """Bursts of swept tones in a little noise, `(samples,)` float32 in [-1, 1]."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * sampling_rate)) / sampling_rate
    frequency = 300 + 250 * rng.random() + 900 * (0.5 + 0.5 * np.sin(2 * np.pi * 1.3 * time + 6 * rng.random()))
    envelope = 0.5 + 0.5 * np.sign(np.sin(2 * np.pi * 2.1 * time + 6 * rng.random()))
    tone = np.sin(2 * np.pi * np.cumsum(frequency) / sampling_rate)
    return (0.4 * envelope * tone + 0.01 * rng.standard_normal(len(time))).astype(np.float32)
