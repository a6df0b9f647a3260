"""Augmentation of speech, every draw a function of (seed, epoch, sample).

Nothing here touches a global random number generator: [`sample_generator`] makes one NumPy generator per sample and
epoch, and everything that is drawn for that sample comes from it in a fixed order. A resumed run, another number of
workers or another batch composition therefore gives the same features bit by bit.

Waveforms are float32 in [-1, 1], shape `(samples,)`; features are log-mel, shape `(frames, bins)`, before CMVN. What
masks frames (`mask_features`) works on what the feature extractor gives to the model: WeNet's has no CMVN, FunASR's
has, and stacks frames; both toolkits mask there.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class AugmentationConfig:
    """What is done to a training clip. The defaults change nothing; a probability of 1 means always.

    Args:
        speeds (`list[float]`): speed factors, one is drawn per clip; resampling, so pitch and formants move as well.
        join_weights (`list[float]`): weight of joining 1, 2, 3 ... clips of one speaker to one utterance; `[1]` never.
        join_gap_seconds (`tuple[float, float]`): pause between joined clips.
        edge_silence_seconds (`tuple[float, float]`): silence before and, drawn again, after the utterance.
        edge_silence_probability (`float`): how often silence is added at the edges at all.
        silence_level_db (`tuple[float, float]`): level of the noise that stands for silence, dB of full scale.
        gain_db (`tuple[float, float]`): level change of the utterance.
        noise_probability (`float`), noise_snr_db (`tuple[float, float]`): additive noise whose spectrum falls by a
            random exponent between white (0) and brown (2).
        dither (`float`): standard deviation of the dither in int16 units, as in WeNet's `fbank_conf`; 0 is off.
        warp_probability (`float`), warp_factors (`tuple[float, float]`): vocal-tract-length perturbation, a linear
            warp of the frequency axis (in Hz) applied to the mel bins by interpolation.
        tempo_probability (`float`), tempo_factors (`tuple[float, float]`): change of duration at the same pitch, by
            interpolation between frames. A factor above 1 is faster.
        equalizer_probability (`float`), equalizer_db (`float`): a smooth random curve over frequency is added to the
            log-mel; the number is its largest excursion. It stands for another microphone or room.
        spec_aug (`bool`), num_time_masks, max_time_mask, num_frequency_masks, max_frequency_mask: SpecAugment
            filled with 0.
        spec_sub (`bool`), num_substitutions, max_substitution: frames are overwritten by earlier frames.
        spec_trim (`bool`), max_trim: frames are cut from the end.
    """

    speeds: list[float] = field(default_factory=lambda: [1.0])
    join_weights: list[float] = field(default_factory=lambda: [1.0])
    join_gap_seconds: tuple[float, float] = (0.0, 0.3)
    edge_silence_seconds: tuple[float, float] = (0.0, 0.0)
    edge_silence_probability: float = 1.0
    silence_level_db: tuple[float, float] = (-90.0, -50.0)
    gain_db: tuple[float, float] = (0.0, 0.0)
    noise_probability: float = 0.0
    noise_snr_db: tuple[float, float] = (5.0, 30.0)
    dither: float = 0.0
    warp_probability: float = 0.0
    warp_factors: tuple[float, float] = (0.9, 1.1)
    tempo_probability: float = 0.0
    tempo_factors: tuple[float, float] = (0.9, 1.1)
    equalizer_probability: float = 0.0
    equalizer_db: float = 6.0
    spec_aug: bool = False
    num_time_masks: int = 2
    max_time_mask: int = 50
    num_frequency_masks: int = 2
    max_frequency_mask: int = 10
    spec_sub: bool = False
    num_substitutions: int = 3
    max_substitution: int = 20
    spec_trim: bool = False
    max_trim: int = 20

    def __post_init__(self):
        if not self.speeds or min(self.speeds) <= 0:
            raise ValueError(f"speeds: expected positive factors, found {self.speeds}")
        if not self.join_weights or min(self.join_weights) < 0 or sum(self.join_weights) <= 0:
            raise ValueError(
                f"join_weights: expected non-negative weights with a positive sum, found {self.join_weights}"
            )
        for name in ("join_gap_seconds", "edge_silence_seconds", "silence_level_db", "gain_db", "noise_snr_db"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: expected (low, high), found {(low, high)}")
        for name in ("warp_factors", "tempo_factors"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name}: expected 0 < low <= high, found {(low, high)}")


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch: equal arguments give equal numbers on every machine."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch, index))))


def level(decibels: float) -> float:
    """Amplitude factor of a level in dB."""
    return float(10.0 ** (decibels / 20.0))


def colored_noise(samples: int, exponent: float, rng: np.random.Generator) -> np.ndarray:
    """Noise of unit root mean square with a power spectrum falling as 1/f**exponent, float32 `(samples,)`."""
    if samples == 0:
        return np.zeros(0, dtype=np.float32)
    if exponent == 0.0:
        return rng.standard_normal(samples, dtype=np.float32)
    size = 1 << max(int(samples - 1).bit_length(), 4)
    spectrum = np.fft.rfft(rng.standard_normal(size, dtype=np.float32))
    spectrum[1:] *= np.arange(1, spectrum.size, dtype=np.float32) ** (-exponent / 2)
    spectrum[0] = 0
    noise = np.fft.irfft(spectrum, size)[:samples]
    return (noise / max(float(np.sqrt(np.mean(noise**2))), 1e-9)).astype(np.float32)


def add_noise(waveform: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """Add noise at a signal-to-noise ratio over the whole clip. An all-zero clip stays as it is."""
    noise = colored_noise(waveform.size, float(rng.uniform(0.0, 2.0)), rng)
    power = float(np.sqrt(np.mean(waveform**2))) if waveform.size else 0.0
    return waveform + noise * np.float32(power * level(-snr_db))


def change_speed(
    waveform: np.ndarray, speed: float, sampling_rate: int, resample: Callable[[np.ndarray, int, int], np.ndarray]
) -> np.ndarray:
    """Play a clip `speed` times as fast: it becomes shorter by that factor and its pitch rises by it.

    Args:
        waveform (`np.ndarray` of shape `(samples,)`): the clip.
        speed (`float`): factor; 1 returns the clip itself.
        sampling_rate (`int`): the clip's rate.
        resample (`Callable`): `resample(waveform, rate_in, rate_out)`.
    """
    if speed == 1.0:
        return waveform
    return resample(waveform, int(round(sampling_rate * speed)), sampling_rate)


def warp_frequencies(
    features: np.ndarray, factor: float, sampling_rate: int, low_frequency: float = 20.0
) -> np.ndarray:
    """Vocal-tract-length perturbation of a log-mel spectrogram.

    Bin `i` of the result is read, by linear interpolation, where the frequency of bin `i` times `factor` lies on
    the mel axis; a factor below 1 moves formants up. Above the last bin the last bin is repeated.

    Args:
        features (`np.ndarray` of shape `(frames, bins)`): log-mel, before CMVN.
        factor (`float`): warp of the frequency axis in Hz.
        sampling_rate (`int`): rate of the audio; the filter bank ends at half of it.
        low_frequency (`float`): lower end of the filter bank in Hz.
    """
    bins = features.shape[1]
    low, high = (1127.0 * np.log1p(f / 700.0) for f in (low_frequency, sampling_rate / 2))
    step = (high - low) / (bins + 1)
    centers = 700.0 * np.expm1((low + step * np.arange(1, bins + 1)) / 1127.0)
    position = (1127.0 * np.log1p(centers * factor / 700.0) - low) / step - 1.0
    position = np.clip(position, 0.0, bins - 1.0)
    lower = np.minimum(position.astype(np.int64), bins - 2)
    weight = (position - lower).astype(np.float32)
    return features[:, lower] * (1 - weight) + features[:, lower + 1] * weight


def change_tempo(features: np.ndarray, factor: float) -> np.ndarray:
    """Change the number of frames to `round(frames / factor)` by linear interpolation; pitch and formants stay."""
    frames = features.shape[0]
    wanted = max(int(round(frames / factor)), 1)
    if frames < 2 or wanted == frames:
        return features
    position = np.linspace(0.0, frames - 1.0, wanted)
    lower = np.minimum(position.astype(np.int64), frames - 2)
    weight = (position - lower).astype(np.float32)[:, None]
    return features[lower] * (1 - weight) + features[lower + 1] * weight


def equalize(features: np.ndarray, largest_db: float, rng: np.random.Generator, points: int = 5) -> np.ndarray:
    """Add one smooth random curve over frequency to every frame of a log-mel (power) spectrogram.

    Args:
        features (`np.ndarray` of shape `(frames, bins)`): natural logarithm of mel power.
        largest_db (`float`): the curve's support points are uniform in plus or minus this.
        rng (`np.random.Generator`): source of the curve.
        points (`int`): number of support points.
    """
    decibels = rng.uniform(-largest_db, largest_db, points)
    curve = np.interp(np.linspace(0.0, points - 1.0, features.shape[1]), np.arange(points), decibels)
    return features + (curve * (np.log(10.0) / 10.0)).astype(np.float32)


def spec_augment(
    features: np.ndarray,
    rng: np.random.Generator,
    num_time_masks: int = 2,
    max_time_mask: int = 50,
    num_frequency_masks: int = 2,
    max_frequency_mask: int = 10,
) -> np.ndarray:
    """SpecAugment (arXiv 1904.08779): spans of what the extractor gives are set to 0 (in WeNet that is before CMVN).

    A span starts uniformly on its axis and is 1 to the largest length long, cut at the axis' end.

    Args:
        features (`np.ndarray` of shape `(frames, bins)`): not changed; a copy is returned.
    """
    masked = features.copy()
    frames, bins = features.shape
    for _ in range(num_time_masks if frames else 0):
        start, length = int(rng.integers(frames)), int(rng.integers(1, max_time_mask + 1))
        masked[start : start + length] = 0.0
    for _ in range(num_frequency_masks):
        start, length = int(rng.integers(bins)), int(rng.integers(1, max_frequency_mask + 1))
        masked[:, start : start + length] = 0.0
    return masked


def spec_substitute(
    features: np.ndarray, rng: np.random.Generator, num_substitutions: int = 3, max_substitution: int = 20
) -> np.ndarray:
    """SpecSub (U2++, arXiv 2106.05642): spans are overwritten by spans of the **unchanged** input that start no later.

    Args:
        features (`np.ndarray` of shape `(frames, bins)`): not changed; a copy is returned.
    """
    changed = features.copy()
    frames = features.shape[0]
    for _ in range(num_substitutions if frames else 0):
        start, length = int(rng.integers(frames)), int(rng.integers(1, max_substitution + 1))
        end = min(start + length, frames)
        back = int(rng.integers(start + 1))
        changed[start:end] = features[start - back : end - back]
    return changed


def spec_trim(features: np.ndarray, rng: np.random.Generator, max_trim: int = 20) -> np.ndarray:
    """TrimTail (arXiv 2211.00522): cut 1 to `max_trim` frames from the end, unless that is half of them or more."""
    length = int(rng.integers(1, max_trim + 1))
    return features[: features.shape[0] - length] if length < features.shape[0] / 2 else features


def join_clips(
    clips: Sequence[np.ndarray], gaps: Sequence[int], silence_levels: Sequence[float], rng: np.random.Generator
) -> np.ndarray:
    """Put clips one after the other with noise of a given level between and around them.

    Args:
        clips (`Sequence[np.ndarray]`): n waveforms.
        gaps (`Sequence[int]`): n + 1 lengths in samples: before the first clip, between the clips, after the last.
        silence_levels (`Sequence[float]`): n + 1 levels in dB relative to full scale.
        rng (`np.random.Generator`): source of the noise.
    """
    parts = []
    for number, (gap, decibels) in enumerate(zip(gaps, silence_levels, strict=True)):
        parts.append(rng.standard_normal(gap, dtype=np.float32) * np.float32(level(decibels)))
        if number < len(clips):
            parts.append(clips[number])
    return np.concatenate(parts)


def augment_waveform(waveform: np.ndarray, config: AugmentationConfig, rng: np.random.Generator) -> np.ndarray:
    """Gain and noise. The order of draws does not depend on the outcome of earlier ones."""
    gain, noisy, snr = rng.uniform(*config.gain_db), rng.random(), rng.uniform(*config.noise_snr_db)
    waveform = waveform * np.float32(level(gain))
    if noisy < config.noise_probability:
        waveform = add_noise(waveform, snr, rng)
    peak = float(np.abs(waveform).max()) if waveform.size else 0.0
    return (waveform / np.float32(peak) if peak > 1.0 else waveform).astype(np.float32)


def augment_log_mel(
    features: np.ndarray, config: AugmentationConfig, rng: np.random.Generator, sampling_rate: int
) -> np.ndarray:
    """Frequency warp and equaliser, for log-mel `(frames, bins)` before stacking and CMVN."""
    warped, factor = rng.random(), rng.uniform(*config.warp_factors)
    equalized = rng.random()
    if warped < config.warp_probability:
        features = warp_frequencies(features, factor, sampling_rate)
    if equalized < config.equalizer_probability:
        features = equalize(features, config.equalizer_db, rng)
    return np.ascontiguousarray(features, dtype=np.float32)


def mask_features(features: np.ndarray, config: AugmentationConfig, rng: np.random.Generator) -> np.ndarray:
    """SpecAugment, SpecSub and SpecTrim in WeNet's order, for features `(frames, size)` as the model gets them."""
    if config.spec_aug:
        features = spec_augment(
            features,
            rng,
            config.num_time_masks,
            config.max_time_mask,
            config.num_frequency_masks,
            config.max_frequency_mask,
        )
    if config.spec_sub:
        features = spec_substitute(features, rng, config.num_substitutions, config.max_substitution)
    if config.spec_trim:
        features = spec_trim(features, rng, config.max_trim)
    return np.ascontiguousarray(features, dtype=np.float32)
