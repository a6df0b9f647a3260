"""Instructions to speak quickly or slowly, from how long recordings are: rows for the fine-tuning of a CosyVoice.

    python training/label_speaking_rate.py LABELLED TOKENS/train.parquet TOKENS/validation.parquet

The files are those of `extract_speech_tokens.py`; they are written under their names into LABELLED, with the column
`instruct`. The length of a recording is compared with the one that its words have on average, which is fitted in the
first file (least squares, a length for every word and one for the edges; for small vocabularies). The third of the
rows of the first file with the shortest speech for its words is told to be quick, the third with the longest to be
slow, the third between is told nothing; the same limits hold for the other files. Nothing is stretched: what is
learnt is what people did.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import numpy as np


def count_words(texts: Sequence[str], vocabulary: Sequence[str]) -> "np.ndarray":
    """How often each word is in each text, and a column of ones for the edges: `(texts, words + 1)` float64.

    Raises:
        ValueError: a word that is not in the vocabulary.
    """
    import numpy as np

    columns = {word: number for number, word in enumerate(vocabulary)}
    counts = np.zeros((len(texts), len(vocabulary) + 1))
    counts[:, -1] = 1
    for row, text in enumerate(texts):
        for word in text.split():
            if word not in columns:
                raise ValueError(f"text: expected the words of the first file, found {word!r}")
            counts[row, columns[word]] += 1
    return counts


def word_lengths(texts: Sequence[str], lengths: Sequence[int]) -> tuple[list[str], "np.ndarray"]:
    """The vocabulary, and the length that each word has on average, the last one that of the edges.

    Raises:
        ValueError: fewer texts than there are lengths to find.
    """
    import numpy as np

    vocabulary = sorted({word for text in texts for word in text.split()})
    if len(texts) <= len(vocabulary):
        raise ValueError(f"text: expected more rows than words, found {len(texts)} and {len(vocabulary)}")
    return vocabulary, np.linalg.lstsq(count_words(texts, vocabulary), np.asarray(lengths), rcond=None)[0]


def main(argv: Sequence[str]) -> None:
    """Label the files; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder for the files with instructions")
    parser.add_argument("files", nargs="+", type=Path, help="parquet; limits are those of the first")
    parser.add_argument("--quick", default="Speak quickly.", metavar="TEXT")
    parser.add_argument("--slow", default="Speak slowly.", metavar="TEXT")
    parser.add_argument("--token_rate", type=float, default=25.0, help="speech tokens a second, for the report")
    arguments = parser.parse_args(argv)
    import numpy as np
    from datasets import Dataset

    from hf_speechllm.models.processing_cosyvoice import END_OF_PROMPT

    instructions = (arguments.quick + END_OF_PROMPT, "", arguments.slow + END_OF_PROMPT)
    vocabulary, averages, limits = [], np.zeros(0), np.zeros(0)
    for number, path in enumerate(arguments.files):
        rows = Dataset.from_parquet(str(path))
        texts, lengths = list(rows["text"]), np.array([len(tokens) for tokens in rows["speech_token"]])
        if number == 0:
            vocabulary, averages = word_lengths(texts, lengths)
        relative = lengths / (count_words(texts, vocabulary) @ averages)
        if number == 0:
            limits = np.quantile(relative, [1 / 3, 2 / 3])
        thirds = np.searchsorted(limits, relative)
        arguments.output.mkdir(parents=True, exist_ok=True)
        labels = [instructions[third] for third in thirds]
        rows.add_column("instruct", labels).to_parquet(str(arguments.output / path.name))
        words = np.array([len(text.split()) for text in texts])
        report = {"file": path.name}
        for third, name in enumerate(("quick", "neutral", "slow")):
            chosen = thirds == third
            seconds = (lengths / arguments.token_rate / words)[chosen]
            mean = round(float(seconds.mean()), 3) if chosen.any() else None
            report[name] = {"rows": int(chosen.sum()), "seconds_per_word": mean}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
