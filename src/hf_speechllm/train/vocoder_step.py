"""One training step of CosyVoice's HiFT vocoder: spectrogram and pitch of recordings, losses of what comes back.

Upstream: FunAudioLLM/CosyVoice, `cosyvoice/hifigan/hifigan.py`, and the GAN pipeline of
`cosyvoice/dataset/processor.py`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_speechllm.models.feature_extraction_cosyvoice_mel import CosyVoiceMelFeatureExtractor
from hf_speechllm.models.mel_spectrogram import log_mel_spectrogram
from hf_speechllm.models.modeling_cosyvoice_hift import CosyVoiceHiftModel
from hf_speechllm.train.gan_trainer import GeneratorStep
from hf_speechllm.train.pitch import track_pitch


# Upstream's weights; the feature matching of `adversarial_losses.py` already counts twice, as upstream's.
LOSS_WEIGHTS = {"mel": 45.0, "f0": 1.0, "adversarial": 1.0, "feature_matching": 2.0}


class VocoderStep:
    """Recordings to a [`GeneratorStep`]: L1 distance of full-band mel spectrograms, L1 error of the pitch in Hz.

    Args:
        extractor: of the spectrograms that the vocoder reads; the loss compares the same without an upper edge, so
            that the vocoder learns what they do not say.
        lowest_f0, highest_f0: Hz, see [`track_pitch`].
    """

    def __init__(
        self, extractor: CosyVoiceMelFeatureExtractor, lowest_f0: float = 65.0, highest_f0: float = 800.0
    ) -> None:
        self.extractor = extractor
        self.pitch_range = {"lowest": lowest_f0, "highest": highest_f0}

    def __call__(self, generator: nn.Module, batch: dict[str, Any]) -> GeneratorStep:
        real = batch["waveform"]
        mel, f0 = self.inputs(real)
        output = generator(mel, return_dict=True)
        losses = {
            "mel": functional.l1_loss(self.spectrogram(output.waveform), self.spectrogram(real)),
            "f0": functional.l1_loss(output.f0, f0),
        }
        return GeneratorStep(real, output.waveform, losses)

    @torch.no_grad()
    def inputs(self, waveform: Tensor) -> tuple[Tensor, Tensor]:
        """What a vocoder reads, `(b, t, mels)`, and what it has to find, `(b, t)` Hz, of `(b, n)` samples."""
        extractor = self.extractor
        f0 = track_pitch(waveform, extractor.sampling_rate, extractor.hop_length, **self.pitch_range)
        return self.spectrogram(waveform, extractor.high_freq), f0

    def spectrogram(self, waveform: Tensor, high_freq: float | None = None) -> Tensor:
        """Log-mel spectrogram `(b, t, mels)` of `(b, n)` samples, up to `high_freq` Hz or to the top."""
        extractor = self.extractor
        return log_mel_spectrogram(
            waveform,
            sampling_rate=extractor.sampling_rate,
            fft_length=extractor.fft_length,
            hop_length=extractor.hop_length,
            num_mel_bins=extractor.feature_size,
            low_freq=extractor.low_freq,
            high_freq=high_freq,
        )


def resynthesis_metrics(
    waveforms: Sequence[Tensor], step: VocoderStep, seed: int = 0
) -> Callable[[CosyVoiceHiftModel], dict[str, float]]:
    """A function that speaks the spectrograms of recordings and says how far off it is.

    Args:
        waveforms: `(n,)` each; those shorter than a frame are left out. seed: of the noise.

    Returns:
        model → `mel_l1`: mean distance of full-band log-mel spectrograms; `f0_l1`: mean error in Hz where both say
        that there is a voice; `voicing_error`: share of frames where they disagree about that.
    """

    def evaluate(model: CosyVoiceHiftModel) -> dict[str, float]:
        hop, threshold = model.config.hop_length, model.config.voiced_threshold
        distances, errors, voiced, wrong, frames = [], 0.0, 0, 0, 0
        generator = torch.Generator(device="cpu").manual_seed(seed)
        for waveform in waveforms:
            real = waveform[None, : len(waveform) // hop * hop].to(model.device)
            if real.shape[1] == 0:
                continue
            mel, f0 = step.inputs(real)
            output = model(mel, generator=generator, return_dict=True)
            distance = (step.spectrogram(output.waveform.float()) - step.spectrogram(real)).abs().mean()
            distances.append(float(distance))
            found, expected = output.f0 > threshold, f0 > 0
            both = found & expected
            errors += float((output.f0 - f0).abs()[both].sum())
            voiced += int(both.sum())
            wrong += int((found != expected).sum())
            frames += expected.numel()
        return {
            "mel_l1": sum(distances) / max(1, len(distances)),
            "f0_l1": errors / max(1, voiced),
            "voicing_error": wrong / max(1, frames),
        }

    return evaluate
