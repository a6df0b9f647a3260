"""Character error rate with the usual Chinese normalisation, as an `evaluate` module that loads from this file.

Example:
    >>> import evaluate
    >>> from hf_speechllm.train.metrics import metric_path
    >>> metric = evaluate.load(metric_path("cer"))
    >>> metric.compute(predictions=["\u4eca\u5929 \u5929\u6c14\u3002"], references=["\u4eca\u5929\u5929\u6c14"])["cer"]
    0.0
"""

import unicodedata

import datasets
import evaluate
import jiwer


_DESCRIPTION = "Character error rate: (substitutions + deletions + insertions) / characters of the references."

_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): recognised texts.
    references (`list[str]`): transcripts.
    normalize (`bool`): fold full-width forms (NFKC), lower-case, remove punctuation, symbols and all white space.
        Default `True`.
Returns:
    `cer` (a fraction), `substitutions`, `deletions`, `insertions`, `characters`, `sentences`, `wrong_sentences`.
"""


def normalize_characters(text: str) -> str:
    """NFKC, lower case, and only letters, marks and numbers kept: white space, punctuation and symbols go."""
    return "".join(
        char for char in unicodedata.normalize("NFKC", text).lower() if unicodedata.category(char)[0] in "LMN"
    )


class CharacterErrorRate(evaluate.Metric):
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
            predictions = map(normalize_characters, predictions)
            references = map(normalize_characters, references)
        pairs = list(zip(predictions, references, strict=True))
        spoken = [(hypothesis, reference) for hypothesis, reference in pairs if reference]
        substitutions = deletions = hits = 0
        insertions = sum(len(hypothesis) for hypothesis, reference in pairs if not reference)
        if spoken:
            counts = jiwer.process_characters(
                [reference for _, reference in spoken], [hypothesis for hypothesis, _ in spoken]
            )
            substitutions, deletions, hits = counts.substitutions, counts.deletions, counts.hits
            insertions += counts.insertions
        characters = substitutions + deletions + hits
        errors = substitutions + deletions + insertions
        return {
            "cer": errors / characters if characters else float(errors > 0),
            "substitutions": substitutions,
            "deletions": deletions,
            "insertions": insertions,
            "characters": characters,
            "sentences": len(pairs),
            "wrong_sentences": sum(hypothesis != reference for hypothesis, reference in pairs),
        }
