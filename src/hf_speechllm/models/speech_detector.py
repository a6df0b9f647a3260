"""Speech segments out of frame-wise silence probabilities: the state machine behind FSMN-VAD.

Upstream: modelscope/FunASR, `funasr/models/fsmn_vad_streaming/model.py` (`WindowDetector`, `FsmnVADStreaming`). A
frame is speech where its probability exceeds that of silence by a margin. A window over the last frames smooths that.
A segment starts some frames before the window notices, ends after a pause, and is cut when it grows too long.

The detector is the state: [`SpeechDetector.copy`] before [`SpeechDetector.advance`] keeps the old one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace


# (milliseconds of speech so far, pause in milliseconds that ends a segment): the longer a segment, the shorter the
# pause. What upstream applies to whole recordings unless a fixed pause is asked for.
SILENCE_SCHEDULE = (
    (10000.0, 2000.0),
    (20000.0, 1000.0),
    (30000.0, 800.0),
    (40000.0, 600.0),
    (50000.0, 400.0),
    (60000.0, 200.0),
    (math.inf, 100.0),
)


@dataclass(frozen=True)
class SpeechDetectorOptions:
    """
    Args:
        frame_shift_ms: duration of a frame. All times are in milliseconds.
        window_ms: length of the smoothing window.
        silence_to_speech_ms, speech_to_silence_ms: speech in the window from which on, and down to which, it changes.
        max_end_silence_ms: pause that ends a segment.
        max_start_silence_ms: silence after which a detector of a single utterance gives up.
        lookback_ms, lookahead_ms: how much a segment is extended at its start and into the pause after it.
        extend: whether it is extended at all.
        max_segment_ms: longest segment.
        single_utterance: stop after the first segment.
        speech_noise_threshold: by how much the probability of speech exceeds that of silence in a frame of speech.
        speech_noise_ratio: power that the probability of silence is raised to before.
        decibel_threshold, snr_threshold: quieter frames are silence. At -100 they never are.
        num_noise_frames: frames over which the level of the noise is averaged.
    """

    frame_shift_ms: float
    window_ms: int
    silence_to_speech_ms: int
    speech_to_silence_ms: int
    max_end_silence_ms: int
    max_start_silence_ms: int
    lookback_ms: int
    lookahead_ms: int
    extend: bool
    max_segment_ms: int
    single_utterance: bool
    speech_noise_threshold: float
    speech_noise_ratio: float
    decibel_threshold: float
    snr_threshold: float
    num_noise_frames: int

    def frames(self, milliseconds: float) -> int:
        """Whole frames in a time."""
        return int(milliseconds / self.frame_shift_ms)


@dataclass
class SpeechDetector:
    """
    Args:
        options: what stays the same.
        pause_ms: pause that ends a segment, counted from the moment the window has noticed it.
        speech_noise_threshold: see `SpeechDetectorOptions`; both may change between two calls of `advance`.
        num_frames: frames seen.
        window (`list[int]`): 1 = speech; a ring whose oldest entry is at `window_position`.
        window_speech: what the window says.
        phase: `"waiting"` for speech, in `"speech"`, or `"ended"`.
        silence_run: frames since the window has noticed the pause.
        segment_start, last_speech_frame: first frame of the segment, and the last that was added to it.
        next_free_frame: first frame that may belong to the next segment.
        noise_decibels: running level of the noise.
        open_segment: first frame, and the one after the last so far, of a segment that has not ended.
    """

    options: SpeechDetectorOptions
    pause_ms: float
    speech_noise_threshold: float
    num_frames: int = 0
    window: list[int] = field(default_factory=list)
    window_position: int = 0
    window_speech: bool = False
    phase: str = "waiting"
    silence_run: int = 0
    segment_start: int = -1
    last_speech_frame: int = 0
    next_free_frame: int = 0
    noise_decibels: float = -100.0
    open_segment: tuple[int, int] | None = None

    @classmethod
    def new(cls, options: SpeechDetectorOptions) -> "SpeechDetector":
        """A detector at the start of a recording."""
        detector = cls(options, 0.0, options.speech_noise_threshold, window=[0] * options.frames(options.window_ms))
        detector.wait_for(options.max_end_silence_ms)
        return detector

    def copy(self) -> "SpeechDetector":
        """An independent detector in the same state."""
        return replace(self, window=list(self.window))

    def wait_for(self, max_end_silence_ms: float) -> None:
        """Sets the pause that ends a segment; the window has waited for a part of it already."""
        self.pause_ms = max(max_end_silence_ms - self.options.speech_to_silence_ms, 0)

    def advance(self, silence: Sequence[float], decibels: Sequence[float], is_last: bool) -> list[tuple[int, int]]:
        """Takes the next frames.

        Args:
            silence: probability of silence, one per frame.
            decibels: level of the same frames.
            is_last: the recording ends here, and with it the open segment.

        Returns:
            the segments that ended: first frame, and the one after the last.
        """
        ended: list[tuple[int, int]] = []
        for position, (probability, level) in enumerate(zip(silence, decibels, strict=True)):
            index = self.num_frames
            self.num_frames += 1
            if self.phase == "ended":
                continue
            is_last_frame = is_last and position == len(silence) - 1
            self._take(index, self._is_speech(probability, level), is_last_frame)
            if self.phase == "ended":
                if self.open_segment is not None:
                    ended.append(self.open_segment)
                    self.open_segment = None
                if not self.options.single_utterance:
                    self._start_over()
        if is_last and self.open_segment is not None:
            # The last frame itself made the window change: upstream gives such a segment as it is.
            ended.append(self.open_segment)
            self.open_segment = None
        return ended

    def _is_speech(self, silence: float, decibels: float) -> bool:
        options = self.options
        if decibels < options.decibel_threshold:
            return False
        # Through logarithms like upstream, so that a comparison at the very threshold falls out the same.
        speech = math.exp(math.log(1.0 - silence)) if silence < 1.0 else 0.0
        noise = math.exp(math.log(silence) * options.speech_noise_ratio) if silence > 0.0 else 0.0
        if speech >= noise + self.speech_noise_threshold:
            return decibels - self.noise_decibels >= options.snr_threshold
        if self.noise_decibels < -99.9:
            self.noise_decibels = decibels
        else:
            count = options.num_noise_frames
            self.noise_decibels = (decibels + self.noise_decibels * (count - 1)) / count
        return False

    def _take(self, index: int, speech: bool, is_last: bool) -> None:
        options = self.options
        before = self.window_speech
        self.window[self.window_position] = int(speech)
        self.window_position = (self.window_position + 1) % len(self.window)
        active = sum(self.window)
        if not before and active >= options.frames(options.silence_to_speech_ms):
            self.window_speech = True
        elif before and active <= options.frames(options.speech_to_silence_ms):
            self.window_speech = False

        if before or self.window_speech:
            self.silence_run = 0
            if self.phase == "waiting" and self.window_speech and not before:
                self._start(max(self.next_free_frame, index - self._latency()), index)
            elif self.phase == "speech":
                self._extend_to(index)
                self._add_or_end(index, is_last)
            return
        self.silence_run += 1
        silence_ms = self.silence_run * options.frame_shift_ms
        if self.phase == "waiting":
            if options.single_utterance and silence_ms > options.max_start_silence_ms:
                self.phase = "ended"
            else:
                self.next_free_frame = max(self.next_free_frame, index - self._latency())
        elif silence_ms >= self.pause_ms:
            behind = options.frames(self.pause_ms)
            if options.extend:
                behind = max(0, behind - options.frames(options.lookahead_ms) - 1)
            self._end(index - behind)
        elif self._is_too_long(index):
            self._end(index)
        elif not options.extend or is_last:
            if is_last:
                self._end(index)
        elif self.silence_run <= options.frames(options.lookahead_ms):
            self._add(index)

    def _latency(self) -> int:
        """Frames between the start of a segment and the moment when the window notices."""
        return len(self.window) + (self.options.frames(self.options.lookback_ms) if self.options.extend else 0)

    def _is_too_long(self, index: int) -> bool:
        return index - self.segment_start + 1 > self.options.max_segment_ms / self.options.frame_shift_ms

    def _start(self, start: int, index: int) -> None:
        self.phase, self.segment_start = "speech", start
        self.open_segment = (start, start)
        for frame in range(start, index + 1):
            self._add(frame)

    def _add_or_end(self, index: int, is_last: bool) -> None:
        if is_last or self._is_too_long(index):
            self._end(index)
        else:
            self._add(index)

    def _add(self, frame: int) -> None:
        self.last_speech_frame = frame
        self._take_out(frame)

    def _extend_to(self, index: int) -> None:
        """Frames of a pause that was too short, and were left out so far, belong to the segment."""
        for frame in range(self.last_speech_frame + 1, index):
            self._add(frame)

    def _end(self, frame: int) -> None:
        self._extend_to(frame)
        self._take_out(frame)
        self.phase = "ended"

    def _take_out(self, frame: int) -> None:
        self.next_free_frame = max(self.next_free_frame, frame) + 1
        self.open_segment = (self.segment_start, frame + 1)

    def _start_over(self) -> None:
        self.phase = "waiting"
        self.window = [0] * len(self.window)
        self.window_position, self.window_speech = 0, False
        self.silence_run, self.segment_start, self.last_speech_frame = 0, -1, 0
