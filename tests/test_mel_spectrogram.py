"""Mel spectrograms, Whisper's and resampling: items of a batch, edges, and what the golden case does not say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoFeatureExtractor, WhisperFeatureExtractor

from hf_speechllm.models.cross_fade import cross_fade, hamming_window
from hf_speechllm.models.feature_extraction_cosyvoice_mel import CosyVoiceMelFeatureExtractor
from hf_speechllm.models.feature_extraction_kaldi_fbank import AudioError
from hf_speechllm.models.hann_sinc_resampling import num_resampled, resample_hann_sinc
from hf_speechllm.models.mel_spectrogram import log_mel_spectrogram
from hf_speechllm.models.reflected_edges import reflect_edges
from hf_speechllm.models.whisper_log_mel import num_whisper_frames, whisper_log_mel


GOLDEN = Path(__file__).parent / "golden" / "cosyvoice" / "frontend" / "io.safetensors"


def waves(*lengths: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [0.3 * torch.randn(length, generator=generator) for length in lengths]


@pytest.mark.parametrize("edge", [3, 9])
def test_reflection_is_that_of_numpy(edge):
    """At each item's own end, and again and again where an item is shorter than the edge."""
    items = waves(20, 4, 2, 1)
    padded = reflect_edges(pad_sequence(items, batch_first=True), torch.tensor([20, 4, 2, 1]), edge)
    for row, item in enumerate(items):
        expected = np.pad(item.numpy(), edge, mode="reflect")
        np.testing.assert_array_equal(padded[row, : len(expected)].numpy(), expected)
    assert torch.equal(reflect_edges(items[0][None], None, edge), padded[:1])


@pytest.mark.parametrize("features, hop", [(log_mel_spectrogram, 480), (whisper_log_mel, 160)])
def test_item_of_a_batch_equals_the_item_alone(features, hop):
    items = waves(4801, 9600, 700, 3000)
    items[1] *= 3.0
    batch = pad_sequence(items, batch_first=True)
    batch = torch.where(torch.arange(batch.shape[1]) < torch.tensor([[len(item)] for item in items]), batch, 0.9)
    output = features(batch, torch.tensor([len(item) for item in items]))
    for row, item in enumerate(items):
        alone = features(item[None])[0]
        assert len(alone) == len(item) // hop
        torch.testing.assert_close(output[row, : len(alone)], alone, rtol=0, atol=1e-5)


def test_short_and_silent_audio():
    for length in (0, 1, 100, 479, 480, 500):
        mel = log_mel_spectrogram(torch.zeros(1, length))
        assert mel.shape == (1, length // 480, 80) and torch.isfinite(mel).all()
    torch.testing.assert_close(
        log_mel_spectrogram(torch.zeros(1, 4800)).exp(), torch.full((1, 10, 80), 1e-5), atol=5e-5, rtol=0
    )
    whisper = whisper_log_mel(torch.zeros(2, 1600), torch.tensor([1600, 100]))
    assert whisper.shape == (2, 10, 128) and torch.isfinite(whisper).all() and not whisper[1].any()


def test_two_rates_in_one_process_have_their_own_filters():
    """Upstream remembers filters by their upper edge alone."""
    waveform = waves(9600)[0][None]
    first = log_mel_spectrogram(waveform)
    log_mel_spectrogram(waveform, sampling_rate=16000)
    assert torch.equal(log_mel_spectrogram(waveform), first)
    assert not torch.allclose(log_mel_spectrogram(waveform, sampling_rate=16000), first)


def test_whisper_is_that_of_transformers():
    """On 30 s, where the extractor of transformers neither pads nor cuts."""
    waveform = waves(480000)[0]
    expected = WhisperFeatureExtractor(feature_size=128)(waveform.numpy(), sampling_rate=16000, return_tensors="pt")
    found = whisper_log_mel(waveform[None])
    torch.testing.assert_close(found.transpose(1, 2), expected["input_features"], rtol=0, atol=1e-4)
    assert num_whisper_frames(torch.tensor(480000)) == 3000


def test_gradient_reaches_silence():
    waveform = torch.zeros(1, 4800, requires_grad=True)
    log_mel_spectrogram(waveform).sum().backward()
    assert torch.isfinite(waveform.grad).all()


def test_mel_after_inference_mode_has_a_gradient():
    """What is remembered between calls is no tensor of inference mode."""
    settings = {"sampling_rate": 12345, "fft_length": 512, "hop_length": 128, "high_freq": 6000.0}
    with torch.inference_mode():
        log_mel_spectrogram(torch.zeros(1, 1024), **settings)
    waveform = torch.ones(1, 1024, requires_grad=True)
    log_mel_spectrogram(waveform, **settings).sum().backward()


def test_odd_edges_are_refused():
    with pytest.raises(ValueError, match="fft_length"):
        log_mel_spectrogram(torch.zeros(1, 4800), fft_length=1025, hop_length=256)


@pytest.mark.parametrize("rates", [(44100, 24000), (24000, 16000), (16000, 22050), (8000, 8001)])
def test_resampling_keeps_a_tone_and_its_length(rates):
    rate, target = rates
    tone = torch.sin(2 * torch.pi * 440 * torch.arange(rate // 2, dtype=torch.float64) / rate).float()
    found = resample_hann_sinc(tone, rate, target)
    assert len(found) == num_resampled(len(tone), rate, target) == -(-len(tone) * target // rate)
    expected = torch.sin(2 * torch.pi * 440 * torch.arange(len(found), dtype=torch.float64) / target).float()
    assert (found - expected)[200:-200].abs().max() < 0.02


def test_resampling_of_a_padded_batch():
    items = waves(1000, 613)
    batch = resample_hann_sinc(pad_sequence(items, batch_first=True), 16000, 24000)
    for row, item in enumerate(items):
        alone = resample_hann_sinc(item, 16000, 24000)
        torch.testing.assert_close(batch[row, : len(alone)], alone, rtol=0, atol=1e-6)
    assert resample_hann_sinc(items[0], 16000, 16000) is items[0]
    assert resample_hann_sinc(items[0][:0], 16000, 24000).shape == (0,)
    with pytest.raises(ValueError, match="sampling_rate"):
        resample_hann_sinc(items[0], 16000, 0)


def test_fade_needs_enough_on_both_sides():
    window = hamming_window(8)
    np.testing.assert_allclose(window.numpy(), np.hamming(8), rtol=0, atol=1e-7)
    piece, before = torch.ones(2, 9), torch.full((2, 5), 3.0)
    faded = cross_fade(piece, before, window)
    torch.testing.assert_close(faded[:, :4], (window[:4] + 3 * window[4:]).expand(2, -1))
    assert torch.equal(faded[:, 4:], piece[:, 4:]) and piece.eq(1).all()
    with pytest.raises(ValueError, match="at least 4"):
        cross_fade(piece[:, :3], before, window)


def test_extractor(tmp_path):
    """Batch, mask, saving; bad audio is an error."""
    extractor = CosyVoiceMelFeatureExtractor(sampling_rate=22050, fft_length=1024, hop_length=256)
    golden = load_file(GOLDEN)
    waveform = golden["v1.wav"][0]
    output = extractor([waveform.numpy(), waveform[:3000]], sampling_rate=22050)
    frames = waveform.shape[0] // 256
    assert output["attention_mask"].sum(dim=1).tolist() == [frames, 11]
    torch.testing.assert_close(output["input_features"][0], golden["v1.mel"][0].T, rtol=0, atol=1e-5)
    assert not output["input_features"][1, 11:].any()
    extractor.save_pretrained(tmp_path)
    again = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert again.to_dict() == extractor.to_dict()
    for audio, rate in ((np.full(4000, np.nan), 22050), (np.zeros((2, 3, 4)), 22050), (np.zeros(4000), 16000)):
        with pytest.raises(AudioError):
            extractor(audio, sampling_rate=rate)
