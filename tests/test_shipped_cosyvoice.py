"""The shipped CosyVoice: small, current in its code, and understood by the shipped recogniser."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoModelForTextToWaveform, AutoProcessor

import hf_speechllm
from hf_speechllm.audio import resample
from hf_speechllm.hub.refresh import code_files
from hf_speechllm.models.pipeline_cosyvoice import CosyVoiceTextToSpeechPipeline
from hf_speechllm.shipped import SHIPPED_SYNTHESISER, shipped_folder, shipped_model_path


FOLDER = shipped_folder("pretrained", SHIPPED_SYNTHESISER)
TEXTS = ["three one four", "nine two", "six", "zero seven five", "eight one", "four four two"]


@pytest.fixture(scope="module")
def speak() -> CosyVoiceTextToSpeechPipeline:
    processor = AutoProcessor.from_pretrained(FOLDER)
    return CosyVoiceTextToSpeechPipeline(AutoModelForTextToWaveform.from_pretrained(FOLDER).eval(), processor)


def heard(waveforms: list[np.ndarray]) -> list[str]:
    processor = AutoProcessor.from_pretrained(shipped_model_path())
    model = AutoModelForSpeechSeq2Seq.from_pretrained(shipped_model_path()).eval()
    audio = [resample(torch.from_numpy(waveform), 8000, 16000).numpy() for waveform in waveforms]
    ids = model.generate(**processor(audio=audio, sampling_rate=16000, return_tensors="pt"))
    return processor.batch_decode(ids, skip_special_tokens=True)


def test_folder_is_small_and_carries_the_code_of_the_package():
    size = sum(path.stat().st_size for path in FOLDER.iterdir())
    assert size <= 8_000_000
    needed = code_files(FOLDER)
    assert {path.name for path in FOLDER.glob("*.py")} == needed, "refresh the folder with `make pretrained`"
    package = Path(hf_speechllm.__file__).parent / "models"
    stale = [name for name in needed if (FOLDER / name).read_bytes() != (package / name).read_bytes()]
    assert not stale, f"{stale}: refresh them with `make pretrained`"


def test_digits_are_understood(speak):
    jiwer = pytest.importorskip("jiwer")
    assert len(speak.processor.speakers) == 5
    audio = [speak(text, speaker="jackson", seed=1)["audio"] for text in TEXTS]
    assert jiwer.wer(TEXTS, heard(audio)) <= 0.3, heard(audio)


def test_streamed_digits_are_understood(speak):
    jiwer = pytest.importorskip("jiwer")
    audio = [np.concatenate(list(speak.stream(text, speaker="george", seed=1))) for text in TEXTS]
    assert jiwer.wer(TEXTS, heard(audio)) <= 0.35, heard(audio)
