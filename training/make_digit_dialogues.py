"""Spoken digit strings and a dialogue about them, joined from single clips: data for the three stages of a unit LM.

    python training/make_digit_dialogues.py DATA/digits OUT --voice jackson

Writes flac files at 16 kHz and jsonl manifests under OUT:

* `speech_train.jsonl`, `speech_test_seen.jsonl`, `speech_test_unseen.jsonl`: strings of one to four digits, each of
  one speaker, with `text` and `speaker`; for next-unit prediction, recognition and synthesis;
* `voice_train.jsonl`: strings of the speaker `--voice` alone, who will speak the answers;
* `dialogue_train.jsonl`, `dialogue_test_seen.jsonl`, `dialogue_test_unseen.jsonl`: a spoken string and the answer to
  it, `answer_text`: every digit plus one (nine becomes zero);
* `answer_train.jsonl`: the same answers, with the same keys, spoken by `--voice`.

No string of a test manifest occurs in training, whoever speaks it, unless it is a single digit.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATE = 16000


def answer_to(words: Sequence[str]) -> list[str]:
    """Every digit plus one, modulo ten."""
    return [DIGITS[(DIGITS.index(word) + 1) % 10] for word in words]


def is_test_string(words: Sequence[str]) -> bool:
    """One in eight strings of two and more digits is for tests, whichever way round it is drawn."""
    number = sum(DIGITS.index(word) * 10**place for place, word in enumerate(words))
    return len(words) > 1 and (number * 2654435761) % 2**32 < 2**29


def main(argv: Sequence[str]) -> None:
    """Write the data set; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder `digits` with train, test_seen and test_unseen")
    parser.add_argument("output", type=Path)
    parser.add_argument("--voice", default="jackson", help="the training speaker who speaks the answers")
    parser.add_argument("--train_strings", type=int, default=6000)
    parser.add_argument("--voice_strings", type=int, default=4000)
    parser.add_argument("--train_dialogues", type=int, default=3000)
    parser.add_argument("--test_strings", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    import numpy as np
    import soundfile
    from tqdm import tqdm

    from hf_speechllm.audio import load_audio
    from hf_speechllm.data.augmentation import join_clips
    from hf_speechllm.data.manifests import read_manifest

    clips: dict[str, dict[str, dict[str, list[np.ndarray]]]] = {}
    for split in ("train", "test_seen", "test_unseen"):
        voices = clips.setdefault(split, {})
        for item in read_manifest(arguments.data / split):
            words = voices.setdefault(item.speaker, {})
            words.setdefault(item.text, []).append(load_audio(item.audio, RATE))
    if arguments.voice not in clips["train"]:
        raise SystemExit(f"--voice: expected one of {sorted(clips['train'])}, got {arguments.voice!r}")
    rng = np.random.Generator(np.random.Philox(arguments.seed))
    (arguments.output / "audio").mkdir(parents=True, exist_ok=True)

    def draw_words(test: bool) -> list[str]:
        while True:
            length = int(rng.choice([1, 2, 3, 4], p=[0.15, 0.25, 0.3, 0.3]))
            words = [DIGITS[number] for number in rng.integers(10, size=length)]
            if is_test_string(words) == (test and length > 1):
                return words

    def speak(name: str, split: str, speaker: str, words: Sequence[str]) -> str:
        chosen = [clips[split][speaker][word] for word in words]
        parts = [options[int(rng.integers(len(options)))] for options in chosen]
        gaps = [int(seconds * RATE) for seconds in rng.uniform(0.05, 0.2, len(parts) + 1)]
        waveform = join_clips(parts, gaps, (-70.0,) * len(gaps), rng)
        soundfile.write(arguments.output / "audio" / f"{name}.flac", waveform, RATE)
        return f"audio/{name}.flac"

    def write(manifest: str, split: str, count: int, speakers: Sequence[str], dialogue: bool = False) -> None:
        rows, answers = [], []
        for number in tqdm(range(count), desc=manifest):
            words, speaker = draw_words(split != "train"), speakers[number % len(speakers)]
            name = f"{manifest}_{number:05d}"
            row = {"key": name, "audio": speak(name, split, speaker, words), "text": " ".join(words)}
            rows.append(row | {"speaker": speaker, "split": split})
            if dialogue:
                rows[-1]["answer_text"] = " ".join(answer_to(words))
            if dialogue and split == "train":
                audio = speak(f"{name}_answer", split, arguments.voice, answer_to(words))
                row = {"key": name, "audio": audio, "text": rows[-1]["answer_text"]}
                answers.append(row | {"speaker": arguments.voice, "split": split})
        save(manifest, rows)
        if answers:
            save(manifest.replace("dialogue", "answer"), answers)

    def save(manifest: str, rows: Sequence[dict[str, str]]) -> None:
        lines = [json.dumps(row) + "\n" for row in rows]
        (arguments.output / f"{manifest}.jsonl").write_text("".join(lines), encoding="utf-8")

    speakers = sorted(clips["train"])
    write("speech_train", "train", arguments.train_strings, speakers)
    write("voice_train", "train", arguments.voice_strings, [arguments.voice])
    write("dialogue_train", "train", arguments.train_dialogues, speakers, dialogue=True)
    for split in ("test_seen", "test_unseen"):
        write(f"speech_{split}", split, arguments.test_strings, sorted(clips[split]))
        write(f"dialogue_{split}", split, arguments.test_strings, sorted(clips[split]), dialogue=True)


if __name__ == "__main__":
    main(sys.argv[1:])
