"""Audio files to what a model wants: mono float32 at the model's sampling rate."""

import os
from typing import BinaryIO

import numpy as np

from .models.audio_file import MAX_DURATION_S, decode_audio_file
from .models.feature_extraction_kaldi_fbank import AudioError
from .models.resampling import resample, resample_sinc


__all__ = ["AudioError", "load_audio", "resample", "resample_sinc"]


def load_audio(
    source: str | os.PathLike | bytes | BinaryIO,
    sampling_rate: int = 16000,
    max_duration_s: float = MAX_DURATION_S,
) -> np.ndarray:
    """Reads wav, flac, mp3 or ogg of any rate and channel count.

    Args:
        source: path, the bytes of a file, or an open binary file.
        sampling_rate: rate of the result in Hz.
        max_duration_s: longer files are refused.

    Returns:
        `(samples,)` float32; several channels are averaged. An empty file gives an empty array.

    Raises:
        AudioError: the file cannot be read as audio or is outside of the limits.
    """
    waveform, file_rate = decode_audio_file(source, max_duration_s=max_duration_s)
    return resample(waveform, file_rate, sampling_rate).numpy()
