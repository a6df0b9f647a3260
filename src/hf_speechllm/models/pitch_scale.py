"""Pitch in Hz as what a unit vocoder reads: a bin, or one number, of each frame."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PitchScale:
    """Equal steps of the logarithm of the frequency, and 0 where there is no voice.

    Args:
        lowest, highest: Hz; what lies beyond counts as the edge. num_bins: see [`encode`]; 0 = no bins.
    """

    lowest: float
    highest: float
    num_bins: int = 0

    def encode(self, f0: Tensor) -> Tensor:
        """Bins or numbers, in the shape of `f0`, of frequencies in Hz of which 0 means no voice.

        Returns:
            with bins, int64: 0 without a voice, 1 to `num_bins - 1` from `lowest` to `highest`. Else float32: 0
            without a voice, and 1 plus the octaves above `lowest`, so that its size is that of an embedding's values.
        """
        ratio = f0.float().clamp(self.lowest, self.highest) / self.lowest
        if not self.num_bins:
            return (1 + ratio.log2()).masked_fill(f0 <= 0, 0.0)
        steps = ratio.log() * ((self.num_bins - 1) / math.log(self.highest / self.lowest))
        return (1 + steps.long().clamp(max=self.num_bins - 2)).masked_fill(f0 <= 0, 0)
