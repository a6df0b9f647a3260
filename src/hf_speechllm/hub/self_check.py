"""Does a model folder work for somebody who has only transformers? A clean process answers before publication."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq, AutoProcessor

from .. import auto  # noqa: F401
from ..models.pipeline_cosyvoice import CosyVoiceTextToSpeechPipeline
from .clean_process import PROBE_TEXT, PROMPT_RATE, probe_voice


AUDIO_SECONDS = 1.5
LOGIT_TOLERANCE = 1e-5
WAVEFORM_TOLERANCE = 1e-4
TIMEOUT_SECONDS = 300


class SelfCheckError(RuntimeError):
    """A folder does not load in a clean process, or gives something else there."""


def self_check(folder: str | os.PathLike) -> dict[str, object]:
    """Loads `folder` here by the installed package and elsewhere by its own code, and compares logits and ids.

    The other process is isolated (`python -I`), offline, has an empty module cache, and cannot import this package.

    Args:
        folder: an exported recogniser, or a synthesiser, of which the waveforms are compared.

    Returns:
        `max_logit_difference`, `text` of the probe signal, and where the other process took its classes from.

    Raises:
        SelfCheckError: the other process failed (with its last lines), or logits or ids differ.
    """
    folder = Path(folder).resolve()
    processor = AutoProcessor.from_pretrained(folder)
    if AutoConfig.from_pretrained(folder).model_type == "cosyvoice":
        return check_synthesiser(folder)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder).eval()
    audio = probe_signal(processor.feature_extractor.sampling_rate)
    features = processor(
        audio=audio.numpy(), sampling_rate=processor.feature_extractor.sampling_rate, return_tensors="pt"
    )
    with torch.no_grad():
        output = model(**features)
        logits = output.logits
        ids = model.generate(**features)

    with tempfile.TemporaryDirectory(prefix="self_check_") as scratch:
        audio_file, output_file = Path(scratch, "audio.safetensors"), Path(scratch, "output.safetensors")
        save_file({"audio": audio}, audio_file)
        report = run_clean_process(folder, audio_file, output_file, Path(scratch, "cache"))
        other = load_file(output_file)

    if other["logits"].shape != logits.shape:
        raise SelfCheckError(f"{folder}: logits: expected {tuple(logits.shape)}, got {tuple(other['logits'].shape)}")
    # A recogniser that decides on the number of tokens may find none in the probe: then there is only the encoder.
    pairs = ((other["logits"], logits), (other["encoder"], output.encoder_last_hidden_state))
    difference = max((theirs - ours).abs().max().item() for theirs, ours in pairs if ours.numel())
    if not difference <= LOGIT_TOLERANCE:
        raise SelfCheckError(f"{folder}: logits: expected a difference of at most {LOGIT_TOLERANCE}, got {difference}")
    if not torch.equal(other["ids"], ids):
        raise SelfCheckError(f"{folder}: ids: expected {ids.tolist()}, got {other['ids'].tolist()}")
    return {"max_logit_difference": difference, **report}


def check_synthesiser(folder: Path) -> dict[str, object]:
    """[`self_check`] of a synthesiser: a text in the voice of the probe signal, drawn from one seed.

    Raises:
        SelfCheckError: the other process failed, or said something else.
    """
    speak = CosyVoiceTextToSpeechPipeline(folder)
    audio = probe_signal(PROMPT_RATE)
    expected = torch.from_numpy(speak(PROBE_TEXT, **probe_voice(audio))["audio"])
    with tempfile.TemporaryDirectory(prefix="self_check_") as scratch:
        audio_file, output_file = Path(scratch, "audio.safetensors"), Path(scratch, "output.safetensors")
        save_file({"audio": audio}, audio_file)
        report = run_clean_process(folder, audio_file, output_file, Path(scratch, "cache"), "--synthesiser")
        other = load_file(output_file)["audio"]
    if other.shape != expected.shape:
        raise SelfCheckError(f"{folder}: audio: expected {len(expected)} samples, got {len(other)}")
    difference = float((other - expected).abs().max()) if len(other) else 0.0
    if not difference <= WAVEFORM_TOLERANCE:
        raise SelfCheckError(
            f"{folder}: audio: expected a difference of at most {WAVEFORM_TOLERANCE}, got {difference}"
        )
    return {"max_waveform_difference": difference, "samples": len(expected), **report}


def probe_signal(sampling_rate: int) -> torch.Tensor:
    """A fixed sum of swept tones and noise, `(samples,)` float32."""
    time = torch.arange(int(AUDIO_SECONDS * sampling_rate)) / sampling_rate
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(0))
    return 0.3 * torch.sin(2 * torch.pi * (200 + 400 * time) * time) + 0.02 * noise


def run_clean_process(
    folder: Path, audio_file: Path, output_file: Path, cache: Path, *options: str
) -> dict[str, object]:
    """Runs `clean_process.py` and returns its report.

    Raises:
        SelfCheckError: it exited with an error or took longer than 300 s.
    """
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "HF_", "TRANSFORMERS_"))},
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("clean_process.py")
    command = [sys.executable, "-I", str(script), str(folder), str(audio_file), str(output_file), *options]
    try:
        done = subprocess.run(
            command, env=environment, cwd=audio_file.parent, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise SelfCheckError(f"{folder}: the clean process took longer than {TIMEOUT_SECONDS} s") from error
    if done.returncode != 0:
        last_lines = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise SelfCheckError(f"{folder}: the clean process failed with exit code {done.returncode}:\n{last_lines}")
    return json.loads(done.stdout.strip().splitlines()[-1])
