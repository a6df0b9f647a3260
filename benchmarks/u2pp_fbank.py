"""Filter banks of 10 s of audio against kaldi-native-fbank through Python."""

import numpy as np
import torch
from timing import Comparison, compare

from hf_speechllm.models.kaldi_fbank import kaldi_fbank


def fbank() -> list[Comparison]:
    import kaldi_native_fbank as knf

    options = knf.FbankOptions()
    options.frame_opts.dither = 0
    options.mel_opts.num_bins = 80
    options.energy_floor = 0

    def native(waveform: np.ndarray) -> np.ndarray:
        extractor = knf.OnlineFbank(options)
        extractor.accept_waveform(16000, waveform)
        extractor.input_finished()
        return np.stack([extractor.get_frame(i) for i in range(extractor.num_frames_ready)])

    waveforms = torch.randn(8, 160000, generator=torch.Generator().manual_seed(0)) * 3000
    arrays = [row.numpy() for row in waveforms]
    difference = np.abs(native(arrays[0]) - kaldi_fbank(waveforms[:1])[0].numpy()).max()
    assert difference < 1e-3, f"log-mel differs by {difference}"
    return [
        compare("fbank, 10 s, batch 1", ">= 5", lambda: native(arrays[0]), lambda: kaldi_fbank(waveforms[:1])),
        compare("fbank, 10 s, batch 8", ">= 5", lambda: [native(a) for a in arrays], lambda: kaldi_fbank(waveforms)),
    ]
