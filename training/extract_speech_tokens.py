"""Speech tokens and speaker embeddings of every utterance of a data set, as parquet: what CosyVoice is trained on.

    python training/extract_speech_tokens.py COSYVOICE DATA/train.jsonl TOKENS/train.parquet
    python training/extract_speech_tokens.py --speech_tokenizer S3 --speaker_encoder CAMPPLUS DATA/train \\
        TOKENS/train.parquet

COSYVOICE is a complete model, of which the two encoders are used; they can also be given each by itself. Rows, in the
order of the manifest, have the columns of upstream's parquet files: `utt`, `audio`, `text`, `spk`, `speech_token`,
`utt_embedding`, `spk_embedding`. `train_cosyvoice_lm.py` and `train_flow.py` read them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> None:
    """Run the extraction; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="[COSYVOICE] DATA OUTPUT")
    parser.add_argument("--speech_tokenizer", help="folder or Hub id of an `s3_tokenizer`")
    parser.add_argument("--speaker_encoder", help="folder or Hub id of a `campplus`")
    parser.add_argument("--where", nargs="*", default=[], metavar="COLUMN=VALUE[,VALUE]", help="keep these rows")
    parser.add_argument("--batch_seconds", type=float, default=120.0, help="audio of one batch, padding included")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trust_remote_code", action="store_true")
    arguments = parser.parse_args(argv)
    apart = arguments.speech_tokenizer is not None and arguments.speaker_encoder is not None
    if len(arguments.paths) != (2 if apart else 3):
        parser.error("expected COSYVOICE DATA OUTPUT, or DATA OUTPUT with --speech_tokenizer and --speaker_encoder")

    from datasets import Dataset
    from transformers import AutoModel

    import hf_speechllm  # noqa: F401  registers the model families
    from hf_speechllm.data.manifests import parse_filters, read_manifest
    from hf_speechllm.data.speech_token_extraction import extract_speech_tokens

    trust = {"trust_remote_code": arguments.trust_remote_code}
    if apart:
        tokenizer = AutoModel.from_pretrained(arguments.speech_tokenizer, **trust)
        encoder = AutoModel.from_pretrained(arguments.speaker_encoder, **trust)
    else:
        whole = AutoModel.from_pretrained(arguments.paths[0], **trust)
        tokenizer, encoder = whole.speech_tokenizer, whole.speaker_encoder
    data, output = Path(arguments.paths[-2]), Path(arguments.paths[-1])
    utterances = read_manifest(data, where=parse_filters(arguments.where))
    rows = extract_speech_tokens(
        tokenizer.eval().to(arguments.device),
        encoder.eval().to(arguments.device),
        utterances,
        arguments.batch_seconds,
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_parquet(str(output))
    print(f"{len(rows)} utterances, {sum(len(row['speech_token']) for row in rows)} tokens: {output}")


if __name__ == "__main__":
    main(sys.argv[1:])
