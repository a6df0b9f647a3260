"""Measure a SpeechTokenizer on recordings: how near it comes to them, and whether it is still understood.

    python training/evaluate_codec.py CODEC DATA/digits/test_unseen --recogniser pretrained/u2pp_moe_digits

DATA is an audiofolder, a .jsonl file or a Kaldi folder with transcripts. Every recording is encoded once and decoded
from the first level alone, the first two, and so on (`--levels`, by default each number). Figures for each of them:

* `wer` (or `cer`): percent of what the recogniser understands; that of the recordings themselves stands beside it;
* `mel`: mean absolute difference of log-mel spectrograms, nats, over all recordings of at least 1,024 samples;
* `loudness`: root mean square of all decoded samples over that of the recordings;
* `codebook_use`: share of the last of these codebooks that occurs;
* `bits_per_second`: of the codes.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str]) -> None:
    """Encode, decode, listen and report; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codec", help="folder or Hub id of a `speechtokenizer`")
    parser.add_argument("data", type=Path, help="audiofolder, .jsonl file or Kaldi folder")
    parser.add_argument("--recogniser", required=True, help="folder or Hub id of the recogniser that listens")
    parser.add_argument("--levels", nargs="+", type=int, help="numbers of levels to decode from; default: each")
    parser.add_argument("--where", nargs="*", default=[], metavar="COLUMN=VALUE[,VALUE]", help="keep these rows")
    parser.add_argument("--limit", type=int, help="the first so many recordings; default: all")
    parser.add_argument("--metric", choices=("wer", "cer"), default="wer")
    parser.add_argument("--batch_seconds", type=float, default=20.0, help="audio of one batch, padding included")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trust_remote_code", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON file; default: standard output only")
    arguments = parser.parse_args(argv)

    import evaluate
    import torch
    from tqdm import tqdm
    from transformers import AutoModel, AutoModelForSpeechSeq2Seq, AutoProcessor

    import hf_speechllm  # noqa: F401  registers the model families
    from hf_speechllm.data.manifests import parse_filters, read_manifest
    from hf_speechllm.data.waveform_batches import waveform_batches
    from hf_speechllm.eval.listening import listen
    from hf_speechllm.eval.report import write_report
    from hf_speechllm.train.mel_loss import MultiScaleMelLoss
    from hf_speechllm.train.metrics import metric_path

    trust = {"trust_remote_code": arguments.trust_remote_code}
    codec = AutoModel.from_pretrained(arguments.codec, **trust).eval().to(arguments.device)
    config = codec.config
    levels = arguments.levels or list(range(1, config.num_quantizers + 1))
    if not all(1 <= number <= config.num_quantizers for number in levels):
        parser.error(f"--levels: expected 1..{config.num_quantizers} of {arguments.codec}, got {levels}")
    recogniser = AutoModelForSpeechSeq2Seq.from_pretrained(arguments.recogniser, **trust).eval().to(arguments.device)
    processor = AutoProcessor.from_pretrained(arguments.recogniser, **trust)
    metric = evaluate.load(metric_path(arguments.metric))
    mel_loss = MultiScaleMelLoss(config.sampling_rate).to(arguments.device)
    shortest = mel_loss.spectrograms[0].n_fft

    utterances = read_manifest(arguments.data, where=parse_filters(arguments.where))[: arguments.limit]
    texts = [item.text for item in utterances]
    recorded = [torch.empty(0)] * len(utterances)
    decoded = {number: [torch.empty(0)] * len(utterances) for number in levels}
    codes = {number: [] for number in levels}
    with torch.no_grad(), tqdm(total=len(utterances), unit="utterance", desc="codec") as bar:
        for batch in waveform_batches(utterances, config.sampling_rate, arguments.batch_seconds):
            samples = batch.attention_mask.sum(dim=1)
            found = codec.encode(batch.input_values.to(codec.device), batch.attention_mask.to(codec.device))
            for number in levels:
                audio = codec.decode(found.audio_codes[:, :number], num_samples=samples).audio_values[:, 0].cpu()
                for row, index in enumerate(batch.indices):
                    decoded[number][index] = audio[row, : samples[row]]
                last = found.audio_codes[:, number - 1]
                codes[number].append(last[last >= 0])
            for row, index in enumerate(batch.indices):
                recorded[index] = batch.input_values[row, : samples[row]]
            bar.update(len(batch.indices))

    def heard(waveforms: Sequence[torch.Tensor], name: str) -> float:
        found = listen(recogniser, processor, waveforms, config.sampling_rate, progress=name)
        return round(100.0 * metric.compute(predictions=found, references=texts)[arguments.metric], 2)

    def mel(waveforms: Sequence[torch.Tensor]) -> float | None:
        pairs = [pair for pair in zip(recorded, waveforms, strict=True) if len(pair[0]) >= shortest]
        distances = [mel_loss.scales(*(wave.to(arguments.device)[None, None] for wave in pair))[0] for pair in pairs]
        return round(float(torch.stack(distances).mean()), 4) if distances else None

    energy = float(torch.cat(recorded).square().mean())
    result: dict[str, Any] = {"codec": Path(arguments.codec).name, "recordings": len(utterances)}
    result["audio_seconds"] = round(sum(map(len, recorded)) / config.sampling_rate, 1)
    result[f"{arguments.metric}_of_recordings"] = heard(recorded, "recordings")
    frames_per_second = config.sampling_rate / config.hop_length
    for number in levels:
        used = len(torch.cat(codes[number]).unique()) / config.codebook_size
        result[f"levels_{number}"] = {
            arguments.metric: heard(decoded[number], f"levels {number}"),
            "mel": mel(decoded[number]),
            "loudness": round(math.sqrt(float(torch.cat(decoded[number]).square().mean()) / energy), 3),
            "codebook_use": round(used, 3),
            "bits_per_second": round(frames_per_second * number * math.log2(config.codebook_size)),
        }
    write_report(result, arguments.output)


if __name__ == "__main__":
    main(sys.argv[1:])
