"""CosyVoice's feature front-ends against Matcha, Whisper and torchaudio, on fixed waveforms."""

from pathlib import Path

import torch
from torch import Tensor

from hf_speechllm.models.hann_sinc_resampling import resample_hann_sinc
from hf_speechllm.models.kaldi_fbank import kaldi_fbank
from hf_speechllm.models.mel_spectrogram import log_mel_spectrogram
from hf_speechllm.models.whisper_log_mel import whisper_log_mel

from .case import Case


# Settings of the three packs' yaml files (`feat_extractor`).
MEL_SETTINGS = {
    "v1": {"sampling_rate": 22050, "fft_length": 1024, "hop_length": 256, "high_freq": 8000.0},
    "v2": {"sampling_rate": 24000, "fft_length": 1920, "hop_length": 480, "high_freq": 8000.0},
    "v3": {"sampling_rate": 24000, "fft_length": 1920, "hop_length": 480, "high_freq": None},
}


def check_frontend(case: Case, work: Path) -> None:
    """Compare every output of `case`; it has no pack to convert."""
    for name, settings in MEL_SETTINGS.items():
        if f"{name}.wav" in case.tensors:
            compare_batched(case, f"{name}.mel", log_mel_spectrogram, case.tensors[f"{name}.wav"], settings)
            case.use(f"{name}.wav")
    waveform = case.tensors["w16.wav"]
    case.use("w16.wav")
    compare_batched(case, "whisper.mel", whisper_log_mel, waveform, {"num_mel_bins": 128})
    fbank = kaldi_fbank(waveform)[0]
    case.compare("campplus.fbank_raw", fbank)
    case.compare("campplus.fbank", fbank - fbank.mean(dim=0, keepdim=True))
    for name in sorted(case.tensors):
        if name.startswith("resample.") and name.endswith(".in"):
            rates = [int(rate) for rate in name.split(".")[1].split("_")]
            case.use(name)
            case.compare(name.replace(".in", ".out"), resample_hann_sinc(case.tensors[name], *rates))


def compare_batched(case: Case, name: str, features: object, waveform: Tensor, settings: dict[str, object]) -> None:
    """An item alone, and the same item beside a longer one."""
    case.compare(name, features(waveform, **settings).transpose(1, 2))
    length = waveform.shape[1]
    batch = torch.zeros(2, length + 3001)
    batch[0, :length], batch[1] = waveform[0], torch.linspace(-0.5, 0.5, length + 3001)
    both = features(batch, torch.tensor([length, length + 3001]), **settings)
    expected = case.tensors[name]
    case.compare(f"{name} (in a batch)", both[:1, : expected.shape[2]].transpose(1, 2), expected)
