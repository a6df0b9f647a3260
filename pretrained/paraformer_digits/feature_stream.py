"""Stacked filter banks of a stream: any cut of the audio gives the frames of the whole."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .feature_extraction_kaldi_fbank import AudioError, KaldiFbankFeatureExtractor, to_mono_waveform
from .kaldi_fbank import kaldi_fbank, num_fbank_frames, num_lfr_frames


_INT16_SCALE = 32768.0


@dataclass
class StackedFeatureStreamState:
    """What a stream of stacked features keeps between two pieces of audio.

    Args:
        samples (`(n,)`, float32): tail of the audio that fills no analysis window yet.
        frames (`(f, bins)`): filter banks that the next stacked frame starts with; the first frame's copies included.
        num_frames, num_stacked: filter-bank frames seen and stacked frames given so far.
        ended: whether the last piece has been seen.
    """

    samples: Tensor
    frames: Tensor
    num_frames: int = 0
    num_stacked: int = 0
    ended: bool = False


def stream_stacked_features(
    extractor: KaldiFbankFeatureExtractor,
    samples: np.ndarray | Tensor,
    state: StackedFeatureStreamState | None = None,
    is_last: bool = False,
) -> tuple[Tensor, StackedFeatureStreamState]:
    """The stacked frames that a piece of audio completes.

    Args:
        extractor: one that stacks at least as many frames as it advances.
        samples: the next piece, mono, at the extractor's rate, of any length (also 0).
        state: from the last piece; `None` opens a stream.
        is_last: nothing follows: the last frames are stacked with copies of the last one.

    Returns:
        `(frames, lfr_m * bins)` after normalisation, and the new state. All pieces' frames together are those that the
        extractor gives for the whole.

    Raises:
        AudioError: a piece after the last one.
    """
    lfr_m, lfr_n = extractor.lfr_m, extractor.lfr_n
    if state is None:
        state = StackedFeatureStreamState(torch.zeros(0), torch.zeros(0, extractor.feature_size))
    if state.ended:
        raise AudioError("stream: audio after the last piece")
    waveform = torch.cat([state.samples, to_mono_waveform(samples)])
    count = int(num_fbank_frames(torch.tensor(len(waveform)), extractor.window_length, extractor.hop_length))
    frames = state.frames
    if count:
        new = kaldi_fbank(
            waveform[None] * _INT16_SCALE,
            sampling_rate=extractor.sampling_rate,
            num_mel_bins=extractor.feature_size,
            frame_length_ms=extractor.frame_length_ms,
            frame_shift_ms=extractor.frame_shift_ms,
            window_type=extractor.window_type,
        )[0]
        if not state.num_frames:
            frames = new[:1].expand((lfr_m - 1) // 2, -1)
        frames = torch.cat([frames, new])
        waveform = waveform[count * extractor.hop_length :]
    total = state.num_frames + count
    if is_last and total:
        stacked = int(num_lfr_frames(torch.tensor(total), lfr_n)) - state.num_stacked
        missing = max((stacked - 1) * lfr_n + lfr_m - len(frames), 0)
        frames = torch.cat([frames, frames[-1:].expand(missing, -1)])
    else:
        stacked = max((len(frames) - lfr_m) // lfr_n + 1, 0)
    features = torch.zeros(0, lfr_m * extractor.feature_size)
    if stacked:
        first = torch.arange(stacked)[:, None] * lfr_n
        features = frames[first + torch.arange(lfr_m)].flatten(1)
    if extractor.cmvn_mean is not None:
        features = (features - torch.tensor(extractor.cmvn_mean)) * torch.tensor(extractor.cmvn_inverse_std)
    kept = frames[min(stacked * lfr_n, len(frames)) :]
    return features, StackedFeatureStreamState(waveform, kept, total, state.num_stacked + stacked, is_last)
