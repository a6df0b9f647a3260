"""The shipped SenseVoice: small, current in its code, and able to recognise digits and their language."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

import hf_speechllm
from hf_speechllm.audio import load_audio
from hf_speechllm.hub.refresh import code_files
from hf_speechllm.shipped import shipped_folder


FOLDER = shipped_folder("pretrained", "sensevoice_digits")
EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "audio"


def test_folder_is_small_and_carries_the_code_of_the_package():
    assert (FOLDER / "model.safetensors").stat().st_size <= 2_000_000
    needed = code_files(FOLDER)
    assert {path.name for path in FOLDER.glob("*.py")} == needed, "refresh the folder with `make pretrained`"
    package = Path(hf_speechllm.__file__).parent / "models"
    stale = [name for name in needed if (FOLDER / name).read_bytes() != (package / name).read_bytes()]
    assert not stale, f"{stale}: refresh them with `make pretrained`"


def test_weights_are_halves_and_the_model_is_not():
    assert {tensor.dtype for tensor in load_file(FOLDER / "model.safetensors").values()} == {torch.float16}
    model = AutoModelForSpeechSeq2Seq.from_pretrained(FOLDER)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_recognises_the_examples_and_their_language():
    jiwer = pytest.importorskip("jiwer")
    processor = AutoProcessor.from_pretrained(FOLDER)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(FOLDER).eval()
    paths = sorted(EXAMPLES.glob("*.wav"))
    audio = [load_audio(path, 16000) for path in paths]
    output = model.generate(**processor(audio=audio, sampling_rate=16000), return_dict_in_generate=True)
    texts = processor.batch_decode(output.sequences, skip_special_tokens=True)
    assert jiwer.wer([path.stem.replace("_", " ") for path in paths], texts) <= 0.25, texts
    heard = processor.tokenizer.convert_ids_to_tokens(output.prompt_answers[:, 0].tolist())
    assert set(heard) == {"<|en|>"}
