"""SpeechInstruct out of units with transcripts: the instructions of stages 2 and 3, as parquet with a card.

    python training/build_speech_instruct.py cross-modal OUT --units SPEECH.parquet VOICE.parquet --speak_speaker anna
    python training/build_speech_instruct.py chain OUT --questions Q.parquet --answers A.parquet --style paper
    python training/build_speech_instruct.py chain OUT --questions Q.parquet --text_to_unit MODEL
    python training/build_speech_instruct.py chain OUT --questions Q.parquet --synthesiser COSYVOICE --speaker jackson

Parquet files are those of `training/extract_units.py`. `cross-modal` makes each utterance a request to write it down
or to read it out; `--tokenizer` and `--max_tokens` pack several turns into a dialogue. `chain` joins questions (column
`answer_text`) with spoken answers of the same `key`, or has a text-to-unit model speak them, or a CosyVoice in one of
its voices, whose speech tokens are the units unless `--units_model` extracts units of the sound.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> None:
    """Build a split; see the module's docstring."""
    from hf_speechllm.data.speech_instruct import FORMATS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    pairs = kinds.add_parser("cross-modal", help="stage 2")
    pairs.add_argument("--units", nargs="+", type=Path, required=True, help="parquet files with text and units")
    pairs.add_argument("--recognition_probability", type=float, default=0.5)
    pairs.add_argument(
        "--speak_speaker", nargs="*", default=[], help="only these speakers are imitated (default: all)"
    )
    pairs.add_argument("--tokenizer", help="folder of the language model's tokenizer, to count tokens")
    pairs.add_argument("--max_tokens", type=int, help="pack turns into dialogues of at most this many tokens")
    chains = kinds.add_parser("chain", help="stage 3")
    chains.add_argument("--questions", nargs="+", type=Path, required=True, help="parquet files with answer_text")
    spoken_by = chains.add_mutually_exclusive_group(required=True)
    spoken_by.add_argument("--answers", nargs="*", type=Path, default=[], help="parquet files with the spoken answers")
    spoken_by.add_argument("--text_to_unit", help="folder of a text-to-unit model that speaks the answers")
    spoken_by.add_argument("--synthesiser", help="folder of a CosyVoice that speaks the answers")
    chains.add_argument("--speaker", help="of --synthesiser: whose voice")
    chains.add_argument(
        "--units_model", help="folder of a speechgpt_units model: units of the sound that --synthesiser makes"
    )
    chains.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    chains.add_argument("--style", choices=("released", "paper"), default="released")
    chains.add_argument("--max_answer_words", type=int, default=35, help="longer answers are left out, as upstream")
    for parts in (pairs, chains):
        parts.add_argument("output", type=Path)
        parts.add_argument("--split", default="train")
        parts.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    if arguments.kind == "chain":
        if arguments.synthesiser is not None and arguments.speaker is None:
            chains.error("--synthesiser: expected --speaker as well")
        for option in ("speaker", "units_model"):
            if arguments.synthesiser is None and vars(arguments)[option] is not None:
                chains.error(f"--{option}: expected --synthesiser as well")

    from datasets import Dataset
    from transformers import AutoModel, AutoTokenizer

    from hf_speechllm.data.speech_instruct import (
        SpokenText,
        chain_rows,
        cross_modal_rows,
        shuffled,
        write_data_set,
    )

    def read(paths: Sequence[Path]) -> list[dict]:
        return [row for path in paths for row in Dataset.from_parquet(str(path))]

    if arguments.kind == "cross-modal":
        items = shuffled([SpokenText.from_row(row) for row in read(arguments.units)], arguments.seed)
        count = None
        if arguments.max_tokens is not None:
            if arguments.tokenizer is None:
                parser.error("--max_tokens: expected --tokenizer as well")
            tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
            count = lambda text: len(tokenizer(text).input_ids)  # noqa: E731
        voices = set(arguments.speak_speaker)
        rows = cross_modal_rows(
            items,
            seed=arguments.seed,
            recognition_probability=arguments.recognition_probability,
            speakable=lambda item: not voices or item.speaker in voices,
            count_tokens=count,
            max_tokens=arguments.max_tokens,
        )
        sources = [path.name for path in arguments.units]
    else:
        questions = read(arguments.questions)
        texts = {str(row["key"]): str(row["answer_text"]) for row in questions}
        short = {key: text for key, text in texts.items() if len(text.split()) < arguments.max_answer_words}
        if arguments.text_to_unit is not None:
            from hf_speechllm.data.text_to_unit import speak_texts

            units = dict(zip(texts, speak_texts(arguments.text_to_unit, list(texts.values())), strict=True))
            answers = {key: SpokenText(key, text, tuple(units[key])) for key, text in texts.items()}
        elif arguments.synthesiser is not None:
            from hf_speechllm.cosyvoice_units import CosyVoiceUnits
            from hf_speechllm.data.synthesised_units import synthesised_units
            from hf_speechllm.models.modeling_speechgpt_units import SpeechGptUnitsModel

            voice = CosyVoiceUnits.from_pretrained(arguments.synthesiser)
            known = sorted(voice.processor.speakers)
            if arguments.speaker not in known:
                chains.error(f"--speaker: expected one of {known}, got {arguments.speaker!r}")
            units_model = None
            if arguments.units_model is not None:
                units_model = AutoModel.from_pretrained(arguments.units_model).eval()
                if not isinstance(units_model, SpeechGptUnitsModel):
                    found = units_model.config.model_type
                    chains.error(f"--units_model: expected a speechgpt_units model, got one of the type {found!r}")
            units = synthesised_units(voice, arguments.speaker, list(short.values()), units_model, arguments.seed)
            # A text without words has no units, and no answer.
            answers = {
                key: SpokenText(key, text, tuple(units[text]), arguments.speaker)
                for key, text in short.items()
                if units[text]
            }
        else:
            answers = {str(row["key"]): SpokenText.from_row(row) for row in read(arguments.answers)}
        pairs_of = [
            (SpokenText.from_row(row), answers[str(row["key"])])
            for row in questions
            if str(row["key"]) in answers and str(row["key"]) in short
        ]
        if not pairs_of:
            limit = f"of fewer than {arguments.max_answer_words} words"
            parser.error(f"answers: expected one {limit} with the key of a question, found none")
        rows = chain_rows(shuffled(pairs_of, arguments.seed), arguments.seed, arguments.formats, arguments.style)
        sources = [path.name for path in (*arguments.questions, *arguments.answers)]
    facts = {key: value for key, value in vars(arguments).items() if value not in (None, []) and key != "output"}
    facts = {key: value for key, value in facts.items() if key not in ("units", "questions", "answers")}
    path = write_data_set(rows, arguments.output, arguments.split, {"sources": sources, **facts})
    print(f"{len(rows)} rows: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
