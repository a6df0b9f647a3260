"""Timed words to subtitle files (SubRip and WebVTT)."""

from collections.abc import Iterable
from typing import Any


MAX_LINE_CHARACTERS = 42
MAX_CUE_SECONDS = 6.0
MIN_PAUSE_SECONDS = 0.8


def cues(words: Iterable[dict[str, Any]]) -> list[tuple[float, float, str]]:
    """Groups words into cues of at most 42 characters and 6 s, split at pauses of 0.8 s.

    Args:
        words: `{"text": str, "timestamp": (start_s, end_s)}` in order, as the pipeline gives with
            `return_timestamps="word"`. Chinese characters are joined without a space.

    Returns:
        `(start_s, end_s, text)` for every cue.
    """
    result: list[tuple[float, float, str]] = []
    for word in words:
        text, (start, end) = word["text"].strip(), word["timestamp"]
        if not text:
            continue
        if result:
            cue_start, cue_end, cue_text = result[-1]
            joined = f"{cue_text}{_separator(cue_text, text)}{text}"
            if (
                len(joined) <= MAX_LINE_CHARACTERS
                and end - cue_start <= MAX_CUE_SECONDS
                and start - cue_end < MIN_PAUSE_SECONDS
            ):
                result[-1] = (cue_start, end, joined)
                continue
        result.append((start, end, text))
    return result


def _separator(left: str, right: str) -> str:
    return "" if ord(left[-1]) >= 0x2E80 and ord(right[0]) >= 0x2E80 else " "


def to_srt(words: Iterable[dict[str, Any]]) -> str:
    """SubRip text of timed words."""
    blocks = (
        f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{text}\n"
        for number, (start, end, text) in enumerate(cues(words), start=1)
    )
    return "\n".join(blocks)


def to_vtt(words: Iterable[dict[str, Any]]) -> str:
    """WebVTT text of timed words (https://www.w3.org/TR/webvtt1/)."""
    escaped = ((s, e, t.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")) for s, e, t in cues(words))
    return "WEBVTT\n\n" + "\n".join(f"{_clock(s, '.')} --> {_clock(e, '.')}\n{text}\n" for s, e, text in escaped)


def _clock(seconds: float, separator: str) -> str:
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60000)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{milliseconds // 1000:02d}{separator}{milliseconds % 1000:03d}"
