"""DPO (https://arxiv.org/abs/2305.18290) for a language model of speech, by TRL."""

from datasets import Dataset
from trl import DPOTrainer


class SpeechDpoTrainer(DPOTrainer):
    """TRL's trainer for rows that are ids already: `prompt_ids`, `chosen_ids`, `rejected_ids`.

    TRL multiplies the head itself; `CosyVoiceLmForCausalLM.get_output_embeddings` gives it one over the whole
    vocabulary. The log-probability of an answer is the sum over its tokens, the end included. Upstream's own DPO
    averages over the positions that are *not* the answer (its mask is inverted, issue 1449); that is not reproduced
    here, see `preference_log_probs.py`.
    """

    def _prepare_dataset(self, dataset: Dataset, *args, **kwargs) -> Dataset:
        return dataset
