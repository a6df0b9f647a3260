"""WER and CER during training."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from transformers import EvalPrediction, PreTrainedTokenizerBase


def metric_path(name: str) -> str:
    """File of one of our `evaluate` modules, for `evaluate.load(metric_path("wer"))`; `name` is `"wer"` or `"cer"`."""
    path = Path(__file__).resolve().parent.parent / "eval" / name / f"{name}.py"
    if not path.is_file():
        raise ValueError(f"metric: expected 'wer' or 'cer', found {name!r}")
    return str(path)


def recognition_metrics(tokenizer: PreTrainedTokenizerBase, name: str = "wer") -> Callable[[EvalPrediction], dict]:
    """`compute_metrics` for [`SpeechRecognitionTrainer`].

    Args:
        tokenizer ([`PreTrainedTokenizerBase`]): ids to text.
        name (`str`): `"wer"` or `"cer"`.

    Returns:
        a function of predicted ids and label ids (-100 = padding) that gives `{name: percent}`.
    """
    import evaluate

    metric = evaluate.load(metric_path(name))

    def texts(ids: np.ndarray) -> list[str]:
        ids = np.where(ids < 0, tokenizer.pad_token_id, ids)
        return [tokenizer.decode(row, skip_special_tokens=True, group_tokens=False) for row in ids.tolist()]

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        counts = metric.compute(predictions=texts(prediction.predictions), references=texts(prediction.label_ids))
        return {name: 100.0 * counts[name]}

    return compute
