"""Loads a model by remote code alone and runs it; `self_check.py` starts this file in an isolated interpreter.

    python -I clean_process.py FOLDER AUDIO.safetensors OUTPUT.safetensors [--synthesiser]

The package itself cannot be imported here, whatever is installed, so the folder's own code files have to do.
"""

import json
import sys
from importlib.abc import MetaPathFinder


# What a synthesiser says, and the rate in Hz of the signal in whose voice it does.
PROBE_TEXT = "one two"
PROMPT_RATE = 16000


class PackageBlocker(MetaPathFinder):
    """Makes every import of the package fail as if it were not installed."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname.split(".")[0] == "hf_speechllm":
            raise ModuleNotFoundError(f"No module named {fullname!r} (blocked)", name=fullname)
        return None


def probe_voice(audio) -> dict[str, object]:
    """Options of the text-to-speech pipeline: the waveform `audio` as prompt, and all draws from one seed."""
    return {"prompt_audio": audio, "sampling_rate": PROMPT_RATE, "seed": 0, "max_token_text_ratio": 6.0}


def synthesise(folder: str, audio_file: str, output_file: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import pipeline

    torch.set_num_threads(1)
    speak = pipeline("text-to-speech", model=folder, trust_remote_code=True, device="cpu")
    result = speak(PROBE_TEXT, **probe_voice(load_file(audio_file)["audio"]))
    save_file({"audio": torch.from_numpy(result["audio"])}, output_file)
    print(json.dumps({"class": type(speak.model).__module__, "pipeline": type(speak).__module__}))


def main(folder: str, audio_file: str, output_file: str, kind: str = "--recogniser") -> None:
    sys.meta_path.insert(0, PackageBlocker())
    if kind == "--synthesiser":
        synthesise(folder, audio_file, output_file)
        return

    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline

    torch.set_num_threads(1)
    audio = load_file(audio_file)["audio"]
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(folder, trust_remote_code=True).eval()
    rate = processor.feature_extractor.sampling_rate
    features = processor(audio=audio.numpy(), sampling_rate=rate, return_tensors="pt")
    with torch.no_grad():
        output = model(**features)
        ids = model.generate(**features)
    recognise = pipeline("automatic-speech-recognition", model=folder, trust_remote_code=True, device="cpu")
    text = recognise({"array": audio.numpy(), "sampling_rate": rate})["text"]
    tensors = {"logits": output.logits, "encoder": output.encoder_last_hidden_state, "ids": ids}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, output_file)
    print(json.dumps({"class": type(model).__module__, "pipeline": type(recognise).__module__, "text": text}))


if __name__ == "__main__":
    main(*sys.argv[1:])
