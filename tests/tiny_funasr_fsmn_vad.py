"""Tiny speech detectors for the tests: random weights, with one path through the network that follows loudness."""

import numpy as np
import torch
from conftest import speech_like

from hf_speechllm.models.configuration_funasr_fsmn_vad import FunasrFsmnVadConfig
from hf_speechllm.models.modeling_funasr_fsmn_vad import FunasrFsmnVadForAudioFrameClassification


TINY = {
    "input_affine_size": 12,
    "hidden_size": 16,
    "projection_size": 8,
    "num_hidden_layers": 2,
    "output_affine_size": 10,
    "num_classes": 6,
    "max_end_silence_ms": 300,
    "max_segment_ms": 4000,
}


def tiny_detector(seed: int = 0, **changes) -> FunasrFsmnVadForAudioFrameClassification:
    """A detector in evaluation mode: loud frames are speech."""
    torch.manual_seed(seed)
    model = FunasrFsmnVadForAudioFrameClassification(FunasrFsmnVadConfig(**{**TINY, **changes})).eval()
    with torch.no_grad():
        model.cmvn_mean.fill_(11.0)
        model.cmvn_inverse_std.fill_(0.4)
        model.input_fc1.weight[0] = 1 / model.config.input_size
        model.input_fc1.bias[0] = 0.0
        path = [model.input_fc2, model.output_fc]
        for layer in model.layers:
            path += [layer.down_proj, layer.up_proj]
            layer.memory.conv.weight[0].mul_(0.1)
        for linear in path:
            linear.weight[0].mul_(0.15)
            linear.weight[0, 0] = 1.0
            if linear.bias is not None:
                linear.bias[0] = 0.0
        model.classifier.weight[0, 0] = -4.0
        model.classifier.bias[0] = 4.0
    return model


def bursts(loud: tuple[int, ...], levels: tuple[float, ...] = (0.3,), seed: int = 3) -> np.ndarray:
    """One second of tones per entry of `loud` where it is 1, else faint noise: float32 `(samples,)` at 16 kHz."""
    tones = np.concatenate([speech_like(5, seed=i) * levels[i % len(levels)] for i in range(len(loud) // 5 + 1)])
    samples = len(loud) * 16000
    noise = 1e-4 * np.random.RandomState(seed).randn(samples)
    return (tones[:samples] * np.repeat(loud, 16000) + noise).astype(np.float32)


def golden_waveform() -> np.ndarray:
    """What `golden/funasr_helpers/fsmn_vad_tiny` was recorded with: 20 s."""
    return bursts((1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 1, 1, 1, 1, 1), levels=(0.3, 0.02, 1.0, 0.1))
