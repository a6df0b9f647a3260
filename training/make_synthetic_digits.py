"""Speak the ten digits with many espeak-ng voices, as an audiofolder that a recipe can mix into its training data.

    python training/make_synthetic_digits.py OUT --speakers 300 --seed 0

A synthetic speaker is an English accent, a voice variant, a pitch and a speed; each speaks every digit once.
Silence at the ends is cut, as in the recordings that the digits recipe trains on. Needs the `espeak-ng` program.
Equal arguments and an equal espeak-ng version give equal files. The output is not part of the repository.
"""

import argparse
import csv
import io
import random
import subprocess
from pathlib import Path


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029", "en-us-nyc")
VARIANTS = """
    m1 m2 m3 m4 m5 m6 m7 m8 f1 f2 f3 f4 f5 klatt klatt2 klatt3 klatt4 klatt5 klatt6 steph steph2 steph3 rob
    robert Alex Alicia Andrea Andy Annie Denis Diogo Gene Gene2 Henrique Hugo Jacky Lee Marco Mario Michael
    Mike Nguyen adam anika antonio aunty belinda benjamin boris caleb david ed edward edward2 gustave iven
    iven2 iven3 iven4 john linda marcelo max michel miguel norbert pablo paul pedro quincy sandro shelby
    travis victor zac
""".split()


def trim(waveform, rate: int, floor_db: float = -45.0, margin_seconds: float = 0.01):
    """Cut the ends that stay below `floor_db` relative to the peak, leaving a margin."""
    import numpy as np

    loud = np.flatnonzero(np.abs(waveform) > np.abs(waveform).max() * 10 ** (floor_db / 20))
    margin = int(margin_seconds * rate)
    return waveform[max(loud[0] - margin, 0) : loud[-1] + margin]


def main() -> None:
    """Write OUT/metadata.csv and one FLAC file per speaker and digit."""
    import soundfile
    from tqdm import tqdm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder that is created")
    parser.add_argument("--speakers", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)

    draw = random.Random(arguments.seed)
    rows = []
    for number in tqdm(range(arguments.speakers), desc="speakers"):
        voice = f"{draw.choice(ACCENTS)}+{draw.choice(VARIANTS)}"
        options = ["-s", str(draw.randint(120, 230)), "-p", str(draw.randint(20, 75)), "-v", voice]
        for digit in DIGITS:
            spoken = subprocess.run(["espeak-ng", *options, "--stdout", digit], capture_output=True, check=True).stdout
            waveform, rate = soundfile.read(io.BytesIO(spoken), dtype="float32")
            waveform = trim(waveform, rate)
            name = f"{number:04d}_{digit}.flac"
            soundfile.write(arguments.out / name, waveform, rate, subtype="PCM_16")
            rows.append((name, digit, f"espeak-{number:04d}", "train", f"{len(waveform) / rate:.4f}", voice))
    with (arguments.out / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("file_name", "transcription", "speaker", "split", "duration", "voice"))
        writer.writerows(rows)


if __name__ == "__main__":
    main()
