"""A speaker encoder that learns to tell speakers apart: additive angular margin softmax on its embeddings.

Paper: ArcFace (https://arxiv.org/abs/1801.07698), equation 3.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput


@dataclass
class SpeakerClassifierOutput(ModelOutput):
    """
    Args:
        loss (`()`): cross entropy with the margin; only with labels.
        logits (`(b, classes)`): cosines with the class centres, without margin and scale.
        embeddings (`(b, size)`): of the encoder, not normalised.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    embeddings: Tensor | None = None


def angular_margin_logits(cosines: Tensor, labels: Tensor, scale: float, margin: float) -> Tensor:
    """Logits in which the angle to the right class counts as larger by a margin.

    Past `pi - margin`, where cos(angle + margin) would rise again, the cosine is lowered by `margin * sin(margin)`
    instead, so that the logit falls with the angle everywhere.

    Args:
        cosines (`(b, classes)`): of the angles between embeddings and class centres.
        labels (`(b,)`, int64): the right class of each. scale: factor of all cosines. margin: angle in radians.
    """
    right = cosines.gather(1, labels[:, None])
    # The slope of the root is infinite at 0.
    sines = (1.0 - right.square()).clamp_min(1e-8).sqrt()
    shifted = right * math.cos(margin) - sines * math.sin(margin)
    shifted = torch.where(right > -math.cos(margin), shifted, right - margin * math.sin(margin))
    return scale * cosines.scatter(1, labels[:, None], shifted.to(cosines.dtype))


class SpeakerClassifier(nn.Module):
    """An encoder, and a centre for each class of its normalised embeddings.

    Args:
        encoder: gives `embeddings` for `input_features` and `attention_mask`; its configuration has `embedding_size`.
        num_classes: speakers, or variants of speakers.
        scale, margin: see [`angular_margin_logits`]. A margin of 0 is a softmax over scaled cosines.

    Raises:
        ValueError: less than two classes, a scale that is not positive, or a margin outside [0, pi / 2).
    """

    def __init__(self, encoder: PreTrainedModel, num_classes: int, scale: float = 30.0, margin: float = 0.2) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
        if not scale > 0:
            raise ValueError(f"scale: expected a positive number, got {scale}")
        if not 0 <= margin < math.pi / 2:
            raise ValueError(f"margin: expected an angle in [0, pi / 2), got {margin}")
        self.encoder, self.scale, self.margin = encoder, scale, margin
        self.centres = nn.Parameter(torch.empty(num_classes, encoder.config.embedding_size))
        nn.init.xavier_normal_(self.centres)

    def forward(
        self, input_features: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> SpeakerClassifierOutput:
        """
        Args:
            input_features (`(b, t, f)`), attention_mask (`(b, t)`): as the encoder takes them.
            labels (`(b,)`, int64): the right classes.
        """
        embeddings = self.encoder(input_features, attention_mask).embeddings
        cosines = nn.functional.linear(
            nn.functional.normalize(embeddings.float(), dim=-1), nn.functional.normalize(self.centres.float(), dim=-1)
        )
        loss = None
        if labels is not None:
            logits = angular_margin_logits(cosines, labels, self.scale, self.margin)
            loss = nn.functional.cross_entropy(logits, labels)
        return SpeakerClassifierOutput(loss, cosines, embeddings)


def initialize_convolutions(encoder: nn.Module) -> None:
    """New convolutions of one scale through all layers, biases of 0 (He et al., https://arxiv.org/abs/1502.01852).

    CAM++ as published was trained with a norm behind every convolution; without those, weights of a small standard
    deviation let the signal fade before it reaches the first norm that is left.
    """
    for module in encoder.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
