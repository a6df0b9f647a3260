"""FSMN-VAD on audio that arrives in pieces, and on recordings of any length: features, network, state machine.

Any cut of the audio gives the same segments. A recording is a stream in blocks of a minute, so that memory is bounded.
Upstream: `funasr/frontends/wav_frontend.py` (`WavFrontendOnline`), `funasr/models/fsmn_vad_streaming/model.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .feature_extraction_kaldi_fbank import AudioError, to_mono_waveform
from .kaldi_fbank import kaldi_fbank
from .speech_detector import SpeechDetector, SpeechDetectorOptions


_INT16_SCALE = 32768.0
_BLOCK_S = 60.0
# Upstream lowers its threshold to this where the pause depends on the length of the segment.
_SCHEDULED_SPEECH_NOISE_THRESHOLD = 0.5


@dataclass
class FunasrFsmnVadStreamingState:
    """One stream between two pieces of audio. A value: a step returns a new one.

    Args:
        samples (`(n,)`): what fills no analysis window yet.
        filter_banks (`(f, num_mel_bins)`): frames that the next stacked frames look at.
        decibels (`list[float]`): levels of the frames whose stacked features are still to come.
        past: memories of the network's layers; `None` before the first frame.
        detector: state machine.
        silence_schedule: see `speech_segments`.
        speech_ms: length of the present segment, as far as the schedule counts it; `None` outside of one.
        ended: whether the last piece has been seen.
    """

    samples: Tensor
    filter_banks: Tensor
    decibels: list[float]
    past: list[Tensor] | None
    detector: SpeechDetector
    silence_schedule: tuple[tuple[float, float], ...] | None
    speech_ms: float | None
    ended: bool


@dataclass
class FunasrFsmnVadStreamOutput:
    """
    Args:
        segments: start and end in seconds since the start of the stream, of the segments that ended in this piece.
        speech_since: start in seconds of the segment that has not ended.
        silence_probabilities (`(frames,)`): of the frames that this piece completed.
        state: goes into the next step.
    """

    segments: list[tuple[float, float]]
    speech_since: float | None
    silence_probabilities: Tensor
    state: FunasrFsmnVadStreamingState


class FunasrFsmnVadStreamingMixin:
    """`open_stream`, `stream_step` and `speech_segments` of the detector."""

    def open_stream(
        self,
        silence_schedule: Sequence[tuple[float, float]] | None = None,
        max_end_silence_ms: float | None = None,
    ) -> FunasrFsmnVadStreamingState:
        """State at the start of a recording; see `speech_segments` for the options."""
        config = self.config
        options = SpeechDetectorOptions(
            **{name: getattr(config, name) for name in SpeechDetectorOptions.__dataclass_fields__}
        )
        detector = SpeechDetector.new(options)
        if max_end_silence_ms is not None:
            detector.wait_for(max_end_silence_ms)
        return FunasrFsmnVadStreamingState(
            samples=torch.zeros(0, device=self.device),
            filter_banks=torch.zeros(0, config.num_mel_bins, device=self.device),
            decibels=[],
            past=None,
            detector=detector,
            silence_schedule=None if silence_schedule is None else tuple(silence_schedule),
            speech_ms=None,
            ended=False,
        )

    @torch.no_grad()
    def stream_step(
        self,
        samples: np.ndarray | Tensor | Sequence[float],
        state: FunasrFsmnVadStreamingState,
        sampling_rate: int | None = None,
        is_last: bool = False,
        counted_ms: float | None = None,
    ) -> FunasrFsmnVadStreamOutput:
        """Takes the next piece of audio, of any length.

        Args:
            samples (`(n,)`): see `to_mono_waveform`.
            state: of `open_stream` or of the step before; it stays as it is.
            sampling_rate: of `samples` in Hz; must be the model's own.
            is_last: the recording ends after this piece.
            counted_ms: what the piece counts for a silence schedule; its own length by default.

        Raises:
            AudioError: wrong sampling rate, or unusable samples.
            ValueError: the stream has ended already.
        """
        config = self.config
        if state.ended:
            raise ValueError("stream_step: this stream has ended; open a new one")
        if sampling_rate is not None and sampling_rate != config.sampling_rate:
            raise AudioError(f"sampling_rate: this detector expects {config.sampling_rate} Hz, got {sampling_rate} Hz")
        waveform = to_mono_waveform(samples).to(self.device)
        if counted_ms is None:
            counted_ms = 1000.0 * len(waveform) / config.sampling_rate
        state = replace(state, detector=state.detector.copy(), decibels=list(state.decibels), ended=is_last)
        self._apply_schedule(state, counted_ms)
        features = self._stream_features(waveform, state, is_last)

        silence = torch.zeros(0, device=self.device)
        if len(features):
            output = self(features[None], past=state.past, return_dict=True)
            state.past, silence = output.past, output.silence_probabilities[0]
        levels, state.decibels = state.decibels[: len(silence)], state.decibels[len(silence) :]
        segments = state.detector.advance(silence.double().tolist(), levels, is_last)
        if segments:
            state.speech_ms = None
        is_open = state.detector.open_segment
        return FunasrFsmnVadStreamOutput(
            segments=[(self._seconds(start), self._seconds(end)) for start, end in segments],
            speech_since=None if is_open is None else self._seconds(is_open[0]),
            silence_probabilities=silence,
            state=state,
        )

    def speech_segments(
        self,
        waveform: np.ndarray | Tensor | Sequence[float],
        sampling_rate: int | None = None,
        silence_schedule: Sequence[tuple[float, float]] | None = None,
        max_end_silence_ms: float | None = None,
    ) -> list[tuple[float, float]]:
        """Speech in a recording of any length.

        Args:
            waveform (`(n,)`): see `to_mono_waveform`.
            sampling_rate: of `waveform` in Hz; must be the model's own.
            silence_schedule: pairs (milliseconds of speech so far, pause in milliseconds that ends a segment); the
                first pair that the segment does not exceed holds. Looked up once a minute of audio, and with a lower
                threshold, as upstream's `dynamic_silence`; `SILENCE_SCHEDULE` has its values.
            max_end_silence_ms: pause that ends a segment, instead of the configuration's.

        Returns:
            start and end of each segment in seconds, in order, without overlap.

        Raises:
            AudioError: wrong sampling rate, or unusable samples.
        """
        state = self.open_stream(silence_schedule, max_end_silence_ms)
        audio = to_mono_waveform(waveform)
        size = int(_BLOCK_S * self.config.sampling_rate)
        segments = []
        # Upstream's last block is empty where the length is a multiple of a minute.
        for start in range(0, len(audio) + 1, size):
            output = self.stream_step(
                audio[start : start + size],
                state,
                sampling_rate,
                is_last=start + size > len(audio),
                counted_ms=1000.0 * _BLOCK_S,
            )
            segments += output.segments
            state = output.state
        return segments

    def _seconds(self, frames: int) -> float:
        return frames * self.config.frame_shift_ms / 1000.0

    def _apply_schedule(self, state: FunasrFsmnVadStreamingState, counted_ms: float) -> None:
        if state.silence_schedule is None:
            return
        if state.detector.phase == "speech":
            state.speech_ms = (state.speech_ms or 0.0) + counted_ms
        speech_ms = state.speech_ms or 0.0
        for limit_ms, pause_ms in state.silence_schedule:
            if speech_ms <= limit_ms:
                state.detector.wait_for(pause_ms)
                state.detector.speech_noise_threshold = _SCHEDULED_SPEECH_NOISE_THRESHOLD
                break

    def _stream_features(self, waveform: Tensor, state: FunasrFsmnVadStreamingState, is_last: bool) -> Tensor:
        """Stacked filter banks `(frames, input_size)` that `waveform` completes; moves the state's buffers on.

        A stacked frame looks at half of the others before and behind it. At the start the first frame is repeated, at
        the end the last one.
        """
        config, stacked = self.config, self.config.stacked_frames
        samples = torch.cat([state.samples, waveform])
        if len(samples) >= config.window_length:
            banks = kaldi_fbank(
                samples[None] * _INT16_SCALE,
                sampling_rate=config.sampling_rate,
                num_mel_bins=config.num_mel_bins,
                frame_length_ms=config.frame_length_ms,
                frame_shift_ms=config.frame_shift_ms,
                window_type=config.window_type,
            )[0]
            energies = samples.unfold(0, config.window_length, config.hop_length).square().sum(dim=-1)
            state.decibels += (10 * (energies + 1e-6).log10()).tolist()
            if state.past is None and not len(state.filter_banks):
                banks = torch.cat([banks[:1].expand((stacked - 1) // 2, -1), banks])
            state.filter_banks = torch.cat([state.filter_banks, banks])
            samples = samples[len(energies) * config.hop_length :]
        state.samples = samples.clone()
        if is_last and len(state.filter_banks):
            behind = state.filter_banks[-1:].expand(stacked - 1 - (stacked - 1) // 2, -1)
            state.filter_banks = torch.cat([state.filter_banks, behind])
        if len(state.filter_banks) < stacked:
            return state.filter_banks.new_zeros(0, config.input_size)
        features = state.filter_banks.unfold(0, stacked, 1).transpose(1, 2).flatten(1)
        state.filter_banks = state.filter_banks[len(features) :].clone()
        return features
