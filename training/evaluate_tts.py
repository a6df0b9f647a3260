"""Measure a CosyVoice on held-out texts: is it understood, and does it sound like the speaker.

    python training/evaluate_tts.py MODEL --recogniser RECOGNISER --texts held_out.txt digits:50 --output OUT.json
    python training/evaluate_tts.py MODEL --recogniser RECOGNISER --texts digits:50 --prompts DATA/prompts.jsonl \\
        --references DATA/digits/test_seen --limit 200 --save_audio WAVES --output OUT.json

`--texts` takes files with one text a line, and `digits:N` for N random strings of digit words. Every text is spoken
by every voice: those that the model knows (`--speakers`, default all of them), or, with `--prompts`, one recording of
each speaker of a manifest, the longest. `--references` are recordings of real people, with their texts. Figures, for
each of the three groups below as far as they apply to it:

* `synthesis`: the texts; `recordings`: the references; `resynthesis`: each reference from its own tokens, in the voice
  of its speaker (that of the same name; for a speaker without one, prompted by the longest reference);
* `wer` (or `cer`): percent, with its counts, of what the recogniser understands; an answer without speech counts as an
  empty text, all words deleted. That of the recordings is what the recogniser adds by itself;
* `similarity`: cosines of speaker embeddings with the references of the same speaker and of others, and how often the
  nearest speaker is the right one. A recording, or its resynthesis, is not compared with itself. A voice without
  references is compared with its prompt, or with the embedding under which the model knows it;
* `mel_distance`: of resynthesis and recording, nats, after dynamic time warping;
* `seconds_per_word` (with `--metric cer`: `seconds_per_character`): mean and standard deviation over the texts, pauses
  included; with `--instruct`, which has every text spoken as told, this is how a speaking rate is checked;
* `audio_seconds`, and `real_time_factor`, seconds of computation for one of audio.
"""

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from torch import Tensor

    from hf_speechllm.data.manifests import Utterance
    from hf_speechllm.models.processing_cosyvoice import CosyVoiceProcessor


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def read_texts(sources: Sequence[str], low: int, high: int, seed: int) -> list[str]:
    """Lines of files, and `digits:N` strings of `low` to `high` digit words.

    Raises:
        ValueError: a file without a text, or a number that is none.
    """
    from hf_speechllm.data.augmentation import sample_generator

    texts = []
    for number, source in enumerate(sources):
        if source.startswith("digits:"):
            rng = sample_generator(seed, 0, number)
            if not source[7:].isdigit():
                raise ValueError(f"--texts: expected digits:N with a number N, got {source!r}")
            texts += [
                " ".join(DIGITS[draw] for draw in rng.integers(10, size=int(rng.integers(low, high + 1))))
                for _ in range(int(source[7:]))
            ]
            continue
        lines = [line.strip() for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{source}: expected at least one text, found none")
        texts += lines
    return texts


def evenly_spaced(items: Sequence[Any], limit: int | None) -> list[Any]:
    """At most `limit` of the items."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[row * len(items) // limit] for row in range(limit)]


def longest_of_speakers(utterances: Sequence["Utterance"], waveforms: Sequence["Tensor"]) -> dict[str, int]:
    """Index of the longest recording of each speaker.

    Raises:
        ManifestError: a recording without a speaker.
    """
    from hf_speechllm.data.manifests import ManifestError

    longest: dict[str, int] = {}
    for row, item in enumerate(utterances):
        if item.speaker is None:
            raise ManifestError(f"{item.key}: expected a speaker for every recording, found none")
        if item.speaker not in longest or len(waveforms[row]) > len(waveforms[longest[item.speaker]]):
            longest[item.speaker] = row
    return longest


def log_mels(processor: "CosyVoiceProcessor", waveforms: Sequence["Tensor"]) -> list["Tensor"]:
    """Spectrograms `(t, bins)` of waveforms at the model's rate, as its flow makes them."""
    from hf_speechllm.models.mel_spectrogram import log_mel_spectrogram

    extractor = processor.feature_extractor
    settings = {
        "sampling_rate": extractor.sampling_rate,
        "fft_length": extractor.fft_length,
        "hop_length": extractor.hop_length,
        "num_mel_bins": extractor.feature_size,
        "high_freq": extractor.high_freq,
    }
    return [log_mel_spectrogram(waveform[None], **settings)[0] for waveform in waveforms]


def parse_options(items: Sequence[str]) -> dict[str, Any]:
    """`["num_steps=5", "do_sample=false"]` to keyword arguments; values are JSON.

    Raises:
        ValueError: an entry without `=`, or a value that is no JSON.
    """
    options = {}
    for item in items:
        name, equals, value = item.partition("=")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"--options: expected NAME=JSON, got {item!r}") from None
    return options


def speaking_rate(
    waveforms: Sequence["Tensor"], texts: Sequence[str], sampling_rate: int, characters: bool
) -> dict[str, float]:
    """Seconds that a word of each text takes, or with `characters` one of its characters without the spaces.

    Returns:
        `mean` and `standard_deviation` over the texts that have a word (0 for one text).
    """
    import torch

    counts = [len("".join(text.split()) if characters else text.split()) for text in texts]
    pairs = zip(waveforms, counts, strict=True)
    rates = torch.tensor([len(waveform) / sampling_rate / count for waveform, count in pairs if count])
    spread = rates.std(correction=min(1, len(rates) - 1)) if len(rates) else torch.tensor(float("nan"))
    return {"mean": round(rates.mean().item(), 4), "standard_deviation": round(spread.item(), 4)}


def save_audio(
    folder: Path, waveforms: Sequence["Tensor"], sampling_rate: int, rows: Sequence[dict[str, str]]
) -> None:
    """Writes wave files and `metadata.csv`, an audiofolder that `read_manifest` reads."""
    import soundfile

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, ["file_name", *rows[0]])
        table.writeheader()
        for number, (waveform, row) in enumerate(zip(waveforms, rows, strict=True)):
            name = f"{number:05d}.wav"
            soundfile.write(folder / name, waveform.numpy(), sampling_rate)
            table.writerow({"file_name": name, **row})


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a CosyVoice")
    parser.add_argument("--recogniser", required=True, help="folder or Hub id of the recogniser that listens")
    parser.add_argument("--texts", nargs="+", required=True, metavar="FILE|digits:N")
    parser.add_argument("--string_length", nargs=2, type=int, default=[3, 6], metavar=("LOW", "HIGH"))
    parser.add_argument("--speakers", nargs="+", metavar="NAME", help="known voices; default: all")
    parser.add_argument("--prompts", help="manifest with audio and speaker, in place of known voices")
    parser.add_argument("--prompts_where", nargs="*", default=[], metavar="COLUMN=VALUE[,VALUE]")
    parser.add_argument("--references", help="manifest with audio, text and speaker")
    parser.add_argument("--where", nargs="*", default=[], metavar="COLUMN=VALUE[,VALUE]", help="of the references")
    parser.add_argument("--limit", type=int, help="references at most, evenly spaced; default: all")
    parser.add_argument("--mode", help="of the synthesis; default: what the voice has a prompt for")
    parser.add_argument("--instruct", metavar="TEXT", help="how every text is to be spoken; default: plainly")
    parser.add_argument("--speaker_encoder", help="folder or Hub id of a `campplus`; default: the model's own")
    parser.add_argument("--options", nargs="*", default=[], metavar="NAME=JSON", help="of the model's `generate`")
    parser.add_argument("--metric", choices=("wer", "cer"), default="wer")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trust_remote_code", action="store_true")
    parser.add_argument("--save_audio", type=Path, metavar="DIR", help="folder for the waveforms")
    parser.add_argument("--output", type=Path, help="JSON file; default: standard output only")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Synthesise and report; see the module's docstring."""
    arguments = parse_arguments(argv)
    import evaluate
    import torch
    from transformers import AutoModel, AutoModelForSpeechSeq2Seq, AutoModelForTextToWaveform, AutoProcessor

    import hf_speechllm  # noqa: F401  registers the model families
    from hf_speechllm.audio import load_audio
    from hf_speechllm.data.manifests import parse_filters, read_manifest
    from hf_speechllm.eval.listening import listen
    from hf_speechllm.eval.mel_distance import mel_distance
    from hf_speechllm.eval.report import write_report
    from hf_speechllm.eval.speaker_embeddings import embed_speakers
    from hf_speechllm.eval.speaker_verification import speaker_similarity
    from hf_speechllm.eval.speech_synthesis import Synthesis, Voice, synthesize
    from hf_speechllm.train.metrics import metric_path

    trust = {"trust_remote_code": arguments.trust_remote_code}
    model = AutoModelForTextToWaveform.from_pretrained(arguments.model, **trust).to(arguments.device).eval()
    processor = AutoProcessor.from_pretrained(arguments.model, **trust)
    recogniser = AutoModelForSpeechSeq2Seq.from_pretrained(arguments.recogniser, **trust).to(arguments.device).eval()
    recogniser_processor = AutoProcessor.from_pretrained(arguments.recogniser, **trust)
    encoder = model.speaker_encoder
    if arguments.speaker_encoder is not None:
        encoder = AutoModel.from_pretrained(arguments.speaker_encoder, **trust).to(arguments.device).eval()
    rate = model.config.sampling_rate
    options = parse_options(arguments.options)
    metric = evaluate.load(metric_path(arguments.metric))

    def recordings_of(path: str, where: Sequence[str], limit: int | None = None) -> tuple[list, list[torch.Tensor]]:
        utterances = evenly_spaced(read_manifest(path, where=parse_filters(where)), limit)
        return utterances, [torch.from_numpy(load_audio(item.audio, rate)) for item in utterances]

    def prompted(item: "Utterance", waveform: torch.Tensor) -> Voice:
        audio = {"array": waveform, "sampling_rate": rate}
        return Voice(item.speaker, {"prompt_audio": audio, "prompt_text": item.text or None})

    def embed(waveforms: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[int]]:
        return embed_speakers(encoder, waveforms, rate, arguments.batch_size)

    def understood(waveforms: Sequence[torch.Tensor], texts: Sequence[str], name: str) -> tuple[dict, list[str]]:
        heard = listen(recogniser, recogniser_processor, waveforms, rate, progress=f"listening: {name}")
        return error_rate(heard, texts), heard

    def error_rate(heard: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
        counts = metric.compute(predictions=list(heard), references=list(texts))
        return {arguments.metric: round(100 * counts.pop(arguments.metric), 3), **counts}

    unit = "word" if arguments.metric == "wer" else "character"

    def rate_of(waveforms: Sequence[torch.Tensor], said: Sequence[str]) -> dict[str, dict[str, float]]:
        return {f"seconds_per_{unit}": speaking_rate(waveforms, said, rate, unit == "character")}

    def timing(synthesis: Synthesis) -> dict[str, float | None]:
        seconds = sum(len(waveform) for waveform in synthesis.waveforms) / rate
        factor = round(synthesis.seconds / seconds, 4) if seconds else None
        return {"audio_seconds": round(seconds, 2), "real_time_factor": factor}

    # Voices and references.
    texts = read_texts(arguments.texts, *arguments.string_length, arguments.seed)
    references, originals = [], []
    if arguments.references is not None:
        references, originals = recordings_of(arguments.references, arguments.where, arguments.limit)
    longest = longest_of_speakers(references, originals)
    prompts: dict[str, torch.Tensor] = {}
    if arguments.prompts is not None:
        items, waveforms = recordings_of(arguments.prompts, arguments.prompts_where)
        chosen = longest_of_speakers(items, waveforms)
        voices = [prompted(items[row], waveforms[row]) for row in chosen.values()]
        prompts = {speaker: waveforms[row] for speaker, row in chosen.items()}
    else:
        names = arguments.speakers or sorted(processor.speakers)
        if not names:
            raise ValueError(f"{arguments.model}: expected known speakers, or --prompts, found neither")
        voices = [Voice(name, {"speaker": name}) for name in names]

    embedded, rows = embed(originals)
    own_row: dict[int, int] = {row: place for place, row in enumerate(rows)}
    reference_speakers = [references[row].speaker for row in rows]
    for voice in voices:
        if voice.name in reference_speakers:
            continue
        if voice.name in prompts:
            found, _ = embed([prompts[voice.name]])
        elif arguments.speaker_encoder is None:
            found = processor.speakers[voice.name].embedding[None]
        else:
            raise ValueError(f"--speaker_encoder: expected references of the voice {voice.name!r}, found none")
        embedded = torch.cat([embedded, found])
        reference_speakers += [voice.name] * len(found)

    def similarity(waveforms: Sequence[torch.Tensor], speakers: Sequence[str], own: bool = False) -> dict[str, Any]:
        found, rows = embed(waveforms)
        not_with = [own_row.get(row) for row in rows] if own else None
        figures = speaker_similarity(found, [speakers[row] for row in rows], embedded, reference_speakers, not_with)
        return {name: round(value, 4) for name, value in figures.items()}

    # Texts to speech.
    report: dict[str, Any] = {
        "model": arguments.model,
        "recogniser": arguments.recogniser,
        "speaker_encoder": arguments.speaker_encoder,
        "texts": len(texts),
        "voices": [voice.name for voice in voices],
        "mode": arguments.mode,
        "instruct": arguments.instruct,
        "options": options,
        "references": arguments.references,
        "seed": arguments.seed,
        "batch_size": arguments.batch_size,
        "threads": torch.get_num_threads(),
    }
    spoken = [(voice, text) for voice in voices for text in texts]
    manner = {"mode": arguments.mode, "instruct": arguments.instruct}
    manner = {name: value for name, value in manner.items() if value}
    requests = [{**voice.arguments, "text": text, **manner} for voice, text in spoken]
    work = {"seed": arguments.seed, "batch_size": arguments.batch_size}
    synthesis = synthesize(model, processor, requests, **work, progress="synthesis", **options)
    said, speakers = [text for _, text in spoken], [voice.name for voice, _ in spoken]
    errors, heard = understood(synthesis.waveforms, said, "synthesis")
    by_voice = {}
    for voice in voices:
        members = [row for row, name in enumerate(speakers) if name == voice.name]
        by_voice[voice.name] = {
            **error_rate([heard[row] for row in members], [said[row] for row in members]),
            "similarity": similarity([synthesis.waveforms[row] for row in members], [voice.name] * len(members)),
        }
    report["synthesis"] = {
        **errors,
        **timing(synthesis),
        **rate_of(synthesis.waveforms, said),
        "similarity": similarity(synthesis.waveforms, speakers),
        "by_voice": by_voice,
    }
    metadata = [
        {"transcription": text, "speaker": name, "heard": found}
        for text, name, found in zip(said, speakers, heard, strict=True)
    ]
    if arguments.save_audio is not None:
        save_audio(arguments.save_audio / "synthesis", synthesis.waveforms, rate, metadata)

    # Recordings, and recordings from their tokens.
    if references:
        said, speakers = [item.text for item in references], [item.speaker for item in references]
        errors, _ = understood(originals, said, "recordings")
        seconds = sum(len(waveform) for waveform in originals) / rate
        report["recordings"] = {
            **errors,
            "audio_seconds": round(seconds, 2),
            **rate_of(originals, said),
            "similarity": similarity(originals, speakers, own=True),
        }
        by_name = {speaker: prompted(references[row], originals[row]) for speaker, row in longest.items()}
        for voice in voices:
            known = voice.arguments.get("speaker")
            # A known speaker may have no recording, and then converts nothing.
            if known is None or len(processor.speakers[known].speech_ids):
                by_name[voice.name] = voice
        requests = [
            {
                **{key: value for key, value in by_name[item.speaker].arguments.items() if key != "prompt_text"},
                "mode": "voice_conversion",
                "source_audio": {"array": waveform, "sampling_rate": rate},
            }
            for item, waveform in zip(references, originals, strict=True)
        ]
        flow_options = {name: value for name, value in options.items() if name in ("num_steps", "streaming")}
        again = synthesize(model, processor, requests, **work, progress="resynthesis", **flow_options)
        errors, heard = understood(again.waveforms, said, "resynthesis")
        distances = [
            mel_distance(*mels)
            for mels in zip(log_mels(processor, again.waveforms), log_mels(processor, originals), strict=True)
            if all(len(mel) for mel in mels)
        ]
        report["resynthesis"] = {
            **errors,
            **timing(again),
            **rate_of(again.waveforms, said),
            "mel_distance": round(sum(distances) / len(distances), 4) if distances else None,
            "similarity": similarity(again.waveforms, speakers, own=True),
        }
        if arguments.save_audio is not None:
            metadata = [
                {"transcription": text, "speaker": name, "heard": found, "source": item.key}
                for text, name, found, item in zip(said, speakers, heard, references, strict=True)
            ]
            save_audio(arguments.save_audio / "resynthesis", again.waveforms, rate, metadata)
    write_report(report, arguments.output)


if __name__ == "__main__":
    main(sys.argv[1:])
