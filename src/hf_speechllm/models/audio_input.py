"""Audio as callers hold it, files, arrays or rows of a data set, to a waveform and its rate."""

import os
from typing import Any

import numpy as np
from torch import Tensor

from .audio_file import decode_audio_file
from .feature_extraction_kaldi_fbank import AudioError, to_mono_waveform


# Where a data set has its audio.
AUDIO_KEYS = ("array", "raw", "bytes", "path", "sampling_rate")


def read_audio(audio: Any, sampling_rate: int | None = None) -> tuple[Tensor, int]:
    """Mono waveform `(samples,)`, float32, on the CPU, and its rate in Hz.

    Args:
        audio: a path, the bytes of a file, an open file, an array or tensor at `sampling_rate`, or a dictionary with
            `array` or `raw` and `sampling_rate`, or with `bytes` or `path` (as data sets give it).

    Raises:
        AudioError: anything else, an unknown rate, or audio that cannot be used.
    """
    if isinstance(audio, dict):
        samples = audio.get("array") if audio.get("array") is not None else audio.get("raw")
        if samples is not None:
            rate = audio.get("sampling_rate", sampling_rate)
            if rate is None:
                raise AudioError("audio: a dictionary with samples needs `sampling_rate`")
            return read_audio(samples, rate)
        source = audio.get("bytes") if audio.get("bytes") is not None else audio.get("path")
        if source is None:
            raise AudioError(f"audio: expected `array`, `raw`, `bytes` or `path`, got {list(audio)}")
        return read_audio(source)
    if isinstance(audio, str | os.PathLike | bytes | bytearray | memoryview) or hasattr(audio, "read"):
        return decode_audio_file(audio)
    if not isinstance(audio, list | tuple | np.ndarray | Tensor):
        name = type(audio).__name__
        raise AudioError(f"audio: expected a path, bytes, a file, an array or a dictionary, got {name}")
    if sampling_rate is None or sampling_rate != int(sampling_rate) or sampling_rate <= 0:
        raise AudioError(f"sampling_rate: expected a positive integer in Hz, got {sampling_rate}")
    return to_mono_waveform(audio).cpu(), int(sampling_rate)
