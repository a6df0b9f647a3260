"""Word error rate as an `evaluate` module that loads from this file, without a network.

Example:
    >>> import evaluate
    >>> from hf_speechllm.train.metrics import metric_path
    >>> evaluate.load(metric_path("wer")).compute(predictions=["one too"], references=["one two"])["wer"]
    0.5
"""

import datasets
import evaluate
import jiwer


_DESCRIPTION = "Word error rate: (substitutions + deletions + insertions) / words of the references, over all pairs."

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): recognised texts.
    references (`list[str]`): transcripts. An empty transcript counts no words; what is recognised there is inserted.
    normalize (`bool`): lower-case, remove punctuation except apostrophes inside words, fold white space. Default
        `True`.
Returns:
    `wer` (a fraction), `substitutions`, `deletions`, `insertions`, `words`, `sentences`, `wrong_sentences`.
"""


def normalize_words(text: str) -> str:
    """Lower-case, drop punctuation (an apostrophe between two letters stays), fold white space."""
    kept = []
    for position, char in enumerate(text.lower()):
        inside = 0 < position < len(text) - 1 and text[position - 1].isalnum() and text[position + 1].isalnum()
        kept.append(char if char.isalnum() or (char in "'\u2019" and inside) else " ")
    return " ".join("".join(kept).replace("\u2019", "'").split())


class WordErrorRate(evaluate.Metric):
    """`evaluate` metric over whole corpora."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, normalize=True):
        if normalize:
            predictions, references = map(normalize_words, predictions), map(normalize_words, references)
        pairs = list(zip(predictions, references, strict=True))
        spoken = [(hypothesis, reference) for hypothesis, reference in pairs if reference]
        substitutions = deletions = hits = 0
        # jiwer refuses empty references: everything that is recognised there is an insertion.
        insertions = sum(len(hypothesis.split()) for hypothesis, reference in pairs if not reference)
        if spoken:
            counts = jiwer.process_words(
                [reference for _, reference in spoken], [hypothesis for hypothesis, _ in spoken]
            )
            substitutions, deletions, hits = counts.substitutions, counts.deletions, counts.hits
            insertions += counts.insertions
        words = substitutions + deletions + hits
        errors = substitutions + deletions + insertions
        return {
            "wer": errors / words if words else float(errors > 0),
            "substitutions": substitutions,
            "deletions": deletions,
            "insertions": insertions,
            "words": words,
            "sentences": len(pairs),
            "wrong_sentences": sum(hypothesis.split() != reference.split() for hypothesis, reference in pairs),
        }
