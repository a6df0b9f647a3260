"""`Trainer` for CosyVoice's flows: bucketed batches, evaluation with draws that are the same every time."""

from typing import Any

import torch
from torch import nn

from hf_speechllm.data.cosyvoice_flow_examples import TokenMelDataset
from hf_speechllm.models.token_to_mel import TokenToMelModel
from hf_speechllm.train.trainer import SpeechRecognitionTrainer


class FlowTrainer(SpeechRecognitionTrainer):
    """Trains a flow on a [`TokenMelDataset`].

    Times, noise, prompts and guidance of a training step come from torch's global generator, whose state is part of a
    checkpoint. Evaluation draws them from a generator of its own, and also makes spectrograms from noise:
    `eval_mel_l1` is their mean distance from those of the recordings, without any prompt.

    Args:
        eval_spectrograms (`int`): recordings of the evaluation set that are made from noise.
    """

    def __init__(self, *args: Any, eval_spectrograms: int = 8, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.eval_spectrograms = eval_spectrograms

    def prediction_step(self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys=None):
        """Loss of a batch with seeded draws."""
        inputs = self._prepare_inputs(inputs)
        generator = torch.Generator().manual_seed(self.args.seed)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**inputs, generator=generator).loss.detach()
        return loss, None, None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss and `eval_mel_l1`."""
        metrics = super().evaluate(*args, **kwargs)
        if self.eval_spectrograms:
            model = self.accelerator.unwrap_model(self.model)
            was_training = model.training
            model.eval()
            metrics["eval_mel_l1"] = mel_distance(model, self.eval_dataset, self.eval_spectrograms)
            model.train(was_training)
            self.log({"eval_mel_l1": metrics["eval_mel_l1"]})
        return metrics


def mel_distance(model: TokenToMelModel, dataset: TokenMelDataset, count: int) -> float:
    """Mean absolute difference of log-mels made from noise and those of `count` recordings, spread over the set."""
    total = number = 0.0
    for index in range(0, len(dataset), max(1, len(dataset) // count))[:count]:
        item = dataset[index]
        output = model.generate_mel(
            item["speech_token_ids"][None].to(model.device),
            speaker_embedding=item["speaker_embedding"][None].to(model.device),
            generator=torch.Generator().manual_seed(index),
        )
        # Version 1 makes as many frames as its tokens say, which may be some more or less than the recording has.
        frames = min(output.mel.shape[1], len(item["mel"]))
        total += float((output.mel[0, :frames].cpu() - item["mel"][:frames]).abs().sum())
        number += frames * item["mel"].shape[1]
    return total / max(1.0, number)
