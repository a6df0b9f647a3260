"""Makes the example recordings in examples/audio with the espeak-ng program: digit strings, 16 kHz mono, 16-bit wav.

python examples/make_audio.py
"""

import subprocess
from pathlib import Path

import numpy as np
import soundfile

from hf_speechllm.audio import load_audio


RATE = 16000
SILENCE_SECONDS = 0.2
# file name: voice, speed in words per minute, pitch 0..99, pause between words in 10 ms, text
RECORDINGS = {
    "seven_three_one_nine": ("en-us", 130, 40, 8, "seven three one nine"),
    "four_two_zero_five": ("en-gb", 130, 35, 8, "four two zero five"),
    "eight_six_six": ("en-us+m3", 120, 45, 10, "eight six six"),
    "one_two_three_four_five": ("en-gb-x-rp+m7", 130, 40, 8, "one two three four five"),
}


def main() -> None:
    folder = Path(__file__).parent / "audio"
    for name, (voice, speed, pitch, gap, text) in RECORDINGS.items():
        command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "-g", str(gap), "--stdout", text]
        wav = subprocess.run(command, check=True, capture_output=True).stdout
        samples = load_audio(wav, RATE)
        silence = np.zeros(int(SILENCE_SECONDS * RATE), dtype=np.float32)
        samples = np.concatenate([silence, 0.5 * samples / np.abs(samples).max(), silence])
        soundfile.write(folder / f"{name}.wav", samples, RATE, subtype="PCM_16")
        print(f"{name}.wav  {len(samples) / RATE:.2f} s")


if __name__ == "__main__":
    main()
