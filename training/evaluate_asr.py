"""Decode test sets with several decodings and chunk sizes; write error rates and counts as JSON.

    python training/evaluate_asr.py MODEL DATA/digits --where split=test_unseen --output wer.json
    python training/evaluate_asr.py MODEL DATA.jsonl --decoding ctc_greedy --chunk_size -1 16 8 4 --metric cer
    python training/evaluate_asr.py PARAFORMER DATA/digits/test_unseen --decoding default --chunk_size -1

A chunk size is in encoder frames (40 ms at 4x subsampling); -1 is full context. Chunked results are those of
streaming: the masked pass computes what feeding chunk by chunk computes. `--decoding default` leaves the choice to the
model and is what one without decodings and chunks (Paraformer) takes. `--strings N` decodes, instead of the clips,
N utterances of several clips (`--string_length`) of one speaker with pauses between them, drawn from `--seed`.
`--language` counts how often a model that says what language it heard (SenseVoice) says this one.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path


DECODINGS = ("ctc_greedy", "ctc_prefix_beam_search", "attention", "attention_rescoring")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a recogniser")
    parser.add_argument("data", help="audiofolder, .jsonl file or Kaldi folder")
    parser.add_argument("--where", nargs="*", default=[], metavar="COLUMN=VALUE[,VALUE]", help="keep these rows")
    parser.add_argument("--decoding", nargs="+", choices=(*DECODINGS, "default"), default=list(DECODINGS))
    parser.add_argument("--chunk_size", nargs="+", type=int, default=[-1, 16, 8, 4])
    parser.add_argument("--num_beams", type=int, default=10)
    parser.add_argument("--ctc_weight", type=float, default=None)
    parser.add_argument("--reverse_weight", type=float, default=None)
    parser.add_argument("--metric", choices=("wer", "cer"), default="wer")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--strings", type=int, default=0)
    parser.add_argument("--string_length", nargs=2, type=int, default=[3, 6], metavar=("LOW", "HIGH"))
    parser.add_argument("--language", help="the language that is spoken, as the model would name it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trust_remote_code", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON file; default: standard output only")
    return parser.parse_args(argv)


def joined_strings(dataset, count: int, low: int, high: int, seed: int) -> list[tuple]:
    """`count` utterances of low to high clips of one speaker with pauses of 0.05 to 0.3 s: (waveform, text)."""
    from hf_speechllm.data.augmentation import join_clips, sample_generator

    speakers: dict[str | None, list[int]] = {}
    for index, utterance in enumerate(dataset.utterances):
        speakers.setdefault(utterance.speaker, []).append(index)
    names = sorted(speakers, key=str)
    rate = dataset.feature_extractor.sampling_rate
    strings = []
    for number in range(count):
        rng = sample_generator(seed, 0, number)
        members = speakers[names[number % len(names)]]
        clips = [members[int(draw)] for draw in rng.integers(len(members), size=int(rng.integers(low, high + 1)))]
        gaps = [int(seconds * rate) for seconds in rng.uniform(0.05, 0.3, len(clips) + 1)]
        waveform = join_clips([dataset.waveform(clip) for clip in clips], gaps, [-80.0] * len(gaps), rng)
        strings.append((waveform, " ".join(dataset.texts[clip] for clip in clips)))
    return strings


def main(argv: Sequence[str]) -> None:
    """Decode and report; see the module's docstring."""
    arguments = parse_arguments(argv)
    import evaluate
    import torch
    from tqdm import tqdm
    from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

    import hf_speechllm  # noqa: F401  registers the model families
    from hf_speechllm.data.dataset import SpeechRecognitionDataset
    from hf_speechllm.data.manifests import parse_filters, read_manifest
    from hf_speechllm.train.metrics import metric_path

    where = parse_filters(arguments.where)
    trust = {"trust_remote_code": arguments.trust_remote_code}
    model = AutoModelForSpeechSeq2Seq.from_pretrained(arguments.model, **trust).to(arguments.device).eval()
    processor = AutoProcessor.from_pretrained(arguments.model, **trust)
    utterances = read_manifest(arguments.data, where)
    dataset = SpeechRecognitionDataset(utterances, processor.feature_extractor, processor.tokenizer, min_tokens=0)
    if arguments.strings:
        items = joined_strings(dataset, arguments.strings, *arguments.string_length, arguments.seed)
    else:
        items = [(dataset.waveform(index), dataset.texts[index]) for index in range(len(dataset))]
    order = sorted(range(len(items)), key=lambda index: -len(items[index][0]))
    rate = processor.feature_extractor.sampling_rate
    seconds = sum(len(waveform) for waveform, _ in items) / rate
    metric = evaluate.load(metric_path(arguments.metric))

    options = {"ctc_weight": arguments.ctc_weight, "reverse_weight": arguments.reverse_weight}
    options = {name: value for name, value in options.items() if value is not None}
    results = []
    runs = [(decoding, chunk) for decoding in arguments.decoding for chunk in arguments.chunk_size]
    with tqdm(total=len(runs) * len(items), desc="utterances", disable=None) as progress:
        for decoding, chunk in runs:
            texts: list[str] = [""] * len(items)
            right_languages = 0
            started = time.perf_counter()
            for start in range(0, len(order), arguments.batch_size):
                chosen = order[start : start + arguments.batch_size]
                inputs = processor(
                    audio=[items[index][0] for index in chosen], sampling_rate=rate, return_tensors="pt"
                )
                choice = {} if decoding == "default" else {"decoding": decoding, "num_beams": arguments.num_beams}
                output = model.generate(
                    **inputs.to(arguments.device),
                    return_dict_in_generate=True,
                    **choice,
                    # Models without chunks do not know the option.
                    **({} if chunk == -1 else {"decoding_chunk_size": chunk}),
                    **options,
                )
                if arguments.language is not None:
                    heard = processor.tokenizer.convert_ids_to_tokens(output.prompt_answers[:, 0].tolist())
                    right_languages += heard.count(f"<|{arguments.language}|>")
                decoded = processor.batch_decode(output.sequences, skip_special_tokens=True)
                for index, text in zip(chosen, decoded, strict=True):
                    texts[index] = text
                progress.update(len(chosen))
            counts = metric.compute(predictions=texts, references=[text for _, text in items])
            percent = round(100 * counts.pop(arguments.metric), 3)
            elapsed = time.perf_counter() - started
            results.append(
                {"decoding": decoding, "chunk_size": chunk, arguments.metric: percent, **counts}
                | {"real_time_factor": round(elapsed / seconds, 4)}
            )
            if arguments.language is not None:
                results[-1]["language_accuracy"] = round(100 * right_languages / len(items), 2)
            print(json.dumps(results[-1]), flush=True)
    report = {
        "model": arguments.model,
        "data": arguments.data,
        "where": where,
        "utterances": len(items),
        "strings_of": arguments.string_length if arguments.strings else None,
        "audio_seconds": round(seconds, 1),
        "num_beams": arguments.num_beams,
        "threads": torch.get_num_threads(),
        "results": results,
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
