"""One pass of SpeechTokenizer while it is trained: reconstruction, commitment, distillation.

Source: https://arxiv.org/abs/2308.16692, section 3.4, and upstream's `speechtokenizer/trainer/trainer.py`. The
adversarial losses are those of `gan_trainer.py`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from hf_speechllm.models.modeling_speechtokenizer import SpeechTokenizerModel
from hf_speechllm.train.distillation import d_axis_loss, t_axis_loss
from hf_speechllm.train.gan_trainer import GeneratorStep
from hf_speechllm.train.mel_loss import MultiScaleMelLoss
from hf_speechllm.train.semantic_teacher import SemanticTeacher


# Upstream's weights of the losses; those of the mel spectrograms are inside of `MultiScaleMelLoss`.
LOSS_WEIGHTS = {"mel": 1.0, "waveform": 500.0, "commitment": 10.0, "distillation": 120.0}


def waveform_distance(real: Tensor, fake: Tensor) -> Tensor:
    """Mean absolute difference of two waveforms `(b, 1, samples)`; of two lengths the common beginning counts."""
    samples = min(real.shape[-1], fake.shape[-1])
    return functional.l1_loss(fake[..., :samples], real[..., :samples])


class SpeechTokenizerStep:
    """The step function of a [`GanTrainer`] for batches of `WaveformCropDataset`.

    Args:
        mel_loss: its spectrograms move to the device of the batch. hop_length: samples per frame of the codec.
        teacher: gives the targets of the distillation; `None` trains a codec without it.
        distillation: `"d_axis"` or `"t_axis"`, see `distillation.py`. cosine_weight: of the latter.

    Raises:
        ValueError: another `distillation`.
    """

    def __init__(
        self,
        mel_loss: MultiScaleMelLoss,
        hop_length: int,
        teacher: SemanticTeacher | None = None,
        distillation: str = "d_axis",
        cosine_weight: float = 1.0,
    ) -> None:
        if distillation not in ("d_axis", "t_axis"):
            raise ValueError(f"distillation: expected 'd_axis' or 't_axis', got {distillation!r}")
        self.mel_loss, self.hop_length, self.teacher = mel_loss, hop_length, teacher
        self.distillation, self.cosine_weight = distillation, cosine_weight

    def __call__(self, generator: nn.Module, batch: dict[str, Tensor]) -> GeneratorStep:
        """Losses `mel`, `waveform`, `commitment` and, with a teacher, `distillation`."""
        real = batch["waveform"][:, None]
        # As upstream, the zeros after a short recording are trained on: they are silence of known length.
        output = generator(batch["waveform"])
        fake = output.audio_values[..., : real.shape[-1]].float()
        losses = {
            "mel": self.mel_loss.to(real.device)(real, fake),
            "waveform": waveform_distance(real, fake),
            "commitment": output.commitment_loss,
        }
        if self.teacher is not None:
            losses["distillation"] = self.distill(output.semantic_features, batch)
        return GeneratorStep(real, fake, losses)

    def distill(self, features: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Distance of the first level's `features` `(b, frames, channels)` to what the teacher hears."""
        mask = batch["attention_mask"]
        targets = self.teacher.to(features.device)(batch["teacher_values"], mask)
        recorded = mask[:, :: self.hop_length]
        if self.distillation == "d_axis":
            return d_axis_loss(features, targets, recorded)
        return t_axis_loss(features, targets, recorded, self.cosine_weight)


def reconstruction_metrics(
    waveforms: Sequence[Tensor], mel_loss: MultiScaleMelLoss
) -> Callable[[SpeechTokenizerModel], dict[str, float]]:
    """An evaluation for [`GanTrainer`]: whole recordings through the codec, one by one.

    Args:
        waveforms: float32 `(samples,)` each, at least as long as the longest window.
        mel_loss: its first spectrogram is compared.
    Returns:
        a function from a model to `mel` (mean absolute difference of log-mel), `waveform` (mean absolute difference),
        and for the first and the last level the share of the codebook that occurs, `codebook_use_first` and `_last`.
    """
    shortest = mel_loss.spectrograms[0].n_fft
    kept = [waveform for waveform in waveforms if waveform.numel() >= shortest]

    def evaluate(model: SpeechTokenizerModel) -> dict[str, float]:
        mel = waveform_error = 0.0
        seen: list[list[Tensor]] = [[], []]
        for recording in kept:
            real = recording.to(model.device)[None, None]
            output = model(real)
            fake = output.audio_values[..., : real.shape[-1]]
            mel += float(mel_loss.to(real.device).scales(real, fake)[0])
            waveform_error += float(waveform_distance(real, fake))
            for codes, level in zip(seen, (0, -1), strict=True):
                codes.append(output.audio_codes[0, level])
        size = model.config.codebook_size
        use = [len(torch.cat(codes).unique()) / size for codes in seen]
        count = len(kept)
        return {
            "mel": mel / count,
            "waveform": waveform_error / count,
            "codebook_use_first": use[0],
            "codebook_use_last": use[1],
        }

    return evaluate
