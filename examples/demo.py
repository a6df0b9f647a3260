"""What `make demo` runs: the shipped digits model on the example recordings, then a stream with partial results.

python examples/demo.py [--model FOLDER_OR_REPO] [FILES...]
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor, pipeline
from transformers.utils import logging

import hf_speechllm  # noqa: F401  (registers the model classes)
from hf_speechllm.audio import load_audio
from hf_speechllm.shipped import shipped_model_path


BLOCK_SECONDS = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--model", default=None)
    arguments = parser.parse_args()
    model = arguments.model or str(shipped_model_path())
    files = arguments.files or sorted((Path(__file__).parent / "audio").glob("*.wav"))
    torch.set_num_threads(1)
    logging.disable_progress_bar()

    print(f"model: {Path(model).name}\n\n== pipeline ==")
    recognise = pipeline("automatic-speech-recognition", model=model, trust_remote_code=True)
    for file in files:
        result = recognise(str(file), return_timestamps="word")
        print(f"\n{file.name}\n  {result['text']}")
        for chunk in result["chunks"]:
            start, end = chunk["timestamp"]
            print(f"    {start:6.2f} - {end:5.2f} s  {chunk['text']}")

    print(f"\n== stream: {files[0].name} ==\n")
    stream(model, files[0])


def stream(model: str, file: Path, chunk_size: int = 8) -> None:
    """Prints the partial result after every chunk of audio that changed it, and the final one."""
    processor = AutoProcessor.from_pretrained(model)
    network = AutoModelForSpeechSeq2Seq.from_pretrained(model).eval()
    rate = processor.feature_extractor.sampling_rate
    samples = load_audio(file, rate)
    block = int(BLOCK_SECONDS * rate)

    front_end, state = None, network.open_stream(1, chunk_size=chunk_size)
    last = ""
    for start in range(0, len(samples), block):
        heard = min(start + block, len(samples))
        is_last = heard == len(samples)
        windows, front_end = processor.stream(
            samples[start:heard], state=front_end, sampling_rate=rate, is_last=is_last, chunk_size=chunk_size
        )
        for number, window in enumerate(windows):
            output = network.stream_step(**window, state=state, is_last=is_last and number == len(windows) - 1)
            state = output.state
            text = processor.batch_decode(output.sequences, skip_special_tokens=True)[0]
            if output.is_final[0] or text != last:
                print(f"  heard {heard / rate:4.1f} s  {'final  ' if output.is_final[0] else 'partial'}  {text}")
            last = text


if __name__ == "__main__":
    main()
