"""Decoding of audio files (wav, flac, mp3, ogg, ... whatever libsndfile reads) to a mono waveform, within limits.

Neither ffmpeg nor torchaudio is needed. Decoders are written in C and fed with other people's files, hence the limits:
the header is checked before samples are decoded, and samples are decoded in blocks so that a wrong header cannot
exhaust memory.
"""

import io
import os
from typing import BinaryIO

import numpy as np
import torch

from .feature_extraction_kaldi_fbank import AudioError


MAX_DURATION_S = 6 * 3600.0
MAX_CHANNELS = 32
MIN_SAMPLING_RATE = 1000
MAX_SAMPLING_RATE = 768000
_BLOCK_FRAMES = 1 << 20


def decode_audio_file(
    source: str | os.PathLike | bytes | BinaryIO, max_duration_s: float = MAX_DURATION_S
) -> tuple[torch.Tensor, int]:
    """Reads a file, averages its channels, and keeps its sampling rate.

    Args:
        source: path, the bytes of a file, or an open binary file.
        max_duration_s: longer files are refused.

    Returns:
        waveform `(samples,)` float32 in [-1, 1], and the sampling rate in Hz.

    Raises:
        AudioError: no such file, not an audio file, outside of the limits above, truncated to nothing, or NaN in it.
        ImportError: the package soundfile is not installed.
    """
    try:
        import soundfile
    except ImportError as error:
        raise ImportError(
            "reading audio files needs soundfile: pip install soundfile (arrays work without)"
        ) from error

    if isinstance(source, bytes | bytearray | memoryview):
        name, source = f"<{len(source)} bytes>", io.BytesIO(source)
    elif isinstance(source, str | os.PathLike):
        name = os.fspath(source)
        if not os.path.isfile(name):
            raise AudioError(f"{name}: {'expected a file, got a folder' if os.path.isdir(name) else 'no such file'}")
    else:
        name = str(getattr(source, "name", "<file object>"))

    try:
        with soundfile.SoundFile(source) as file:
            sampling_rate, channels = file.samplerate, file.channels
            if not MIN_SAMPLING_RATE <= sampling_rate <= MAX_SAMPLING_RATE:
                raise AudioError(
                    f"{name}: sampling rate: expected {MIN_SAMPLING_RATE} to {MAX_SAMPLING_RATE} Hz, "
                    f"got {sampling_rate}"
                )
            if channels > MAX_CHANNELS:
                raise AudioError(f"{name}: channels: expected at most {MAX_CHANNELS}, got {channels}")
            max_frames = int(max_duration_s * sampling_rate)
            blocks, num_frames = [], 0
            while True:
                block = file.read(_BLOCK_FRAMES, dtype="float32", always_2d=True)
                if len(block) == 0:
                    break
                num_frames += len(block)
                if num_frames > max_frames:
                    raise AudioError(f"{name}: duration: expected at most {max_duration_s:g} s")
                blocks.append(block[:, 0] if channels == 1 else block.mean(axis=1))
    except soundfile.LibsndfileError as error:
        reason = _reason(name, list(soundfile.available_formats()))
        raise AudioError(f"{name}: cannot be read as audio: {reason}") from error
    except (soundfile.SoundFileError, TypeError, OSError) as error:
        raise AudioError(f"{name}: cannot be read as audio: {error}") from error

    waveform = np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.float32)
    if not np.isfinite(waveform).all():
        raise AudioError(f"{name}: contains NaN or infinite samples")
    return torch.from_numpy(np.ascontiguousarray(waveform)), sampling_rate


def _reason(name: str, formats: list[str]) -> str:
    """Why libsndfile refused a file; of a format that is not built into it, it would say that there is no file."""
    kind = os.path.splitext(name)[1].removeprefix(".").upper()
    if kind and kind not in formats:
        return f"expected one of {', '.join(sorted(formats))}, which libsndfile reads here, got {kind}"
    return f"expected audio{f' ({kind})' if kind else ''}, got what libsndfile cannot decode"
