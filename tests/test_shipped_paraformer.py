"""The shipped Paraformer: small, current in its code, and able to recognise."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

import hf_speechllm
from hf_speechllm.audio import load_audio
from hf_speechllm.hub.refresh import code_files
from hf_speechllm.shipped import shipped_folder


FOLDER = shipped_folder("pretrained", "paraformer_digits")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "audio"


def test_folder_is_small_and_carries_the_code_of_the_package():
    assert (FOLDER / "model.safetensors").stat().st_size <= 4_000_000
    needed = code_files(FOLDER)
    assert {path.name for path in FOLDER.glob("*.py")} == needed, "refresh the folder with `make pretrained`"
    package = Path(hf_speechllm.__file__).parent / "models"
    stale = [name for name in needed if (FOLDER / name).read_bytes() != (package / name).read_bytes()]
    assert not stale, f"{stale}: refresh them with `make pretrained`"


def test_recognises_the_examples_alone_and_in_a_batch():
    jiwer = pytest.importorskip("jiwer")
    processor = AutoProcessor.from_pretrained(FOLDER)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(FOLDER).eval()
    paths = sorted(EXAMPLES.glob("*.wav"))
    audio = [load_audio(path, 16000) for path in paths]
    output = model.generate(**processor(audio=audio, sampling_rate=16000), return_dict_in_generate=True)
    texts = processor.batch_decode(output.sequences)
    assert jiwer.wer([path.stem.replace("_", " ") for path in paths], texts) <= 0.25, texts
    for row, waveform in enumerate(audio):
        alone = model.generate(**processor(audio=waveform, sampling_rate=16000))
        assert processor.batch_decode(alone)[0] == texts[row]
        count = int(output.sequences_lengths[row])
        times = output.token_timestamps[row, :count]
        assert (times[:, 1] >= times[:, 0]).all() and (times[1:, 0] >= times[:-1, 0]).all()
        assert times.max() <= len(waveform) / 16000 + 0.1
        assert torch.equal(output.sequences[row, count:], torch.zeros_like(output.sequences[row, count:]))
