"""`Trainer` for recognisers: bucketed batches, WeNet's schedule, joint-loss logs, checkpoints that are never torn."""

import shutil
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import logging

from hf_speechllm.data.bucketing import DurationBucketBatchSampler, EpochDataLoader
from hf_speechllm.train.checkpoints import STAGING_PREFIX, complete_checkpoints, incomplete_checkpoints, publish
from hf_speechllm.train.schedules import wenet_warmup_scheduler


logger = logging.get_logger(__name__)

# Scalars of the model's output that are logged beside the loss, where the model returns them.
LOGGED_OUTPUTS = (
    "loss_ctc",
    "loss_att",
    "loss_rich",
    "loss_length",
    "loss_timestamp_length",
    "loss_hotword",
    "loss_mwer",
    "expected_errors",
    "accuracy",
)
_DECODINGS_WITHOUT_DECODER = ("ctc_greedy", "ctc_prefix_beam_search")


@dataclass
class SpeechTrainingArguments(TrainingArguments):
    """`TrainingArguments` plus what speech batches need.

    Args:
        max_frames_per_batch (`int`): budget of padded feature frames (10 ms each) per process and step.
        max_items_per_batch (`int`): largest number of utterances per process and step.
        bucket_window (`int`): utterances that are sorted by length together.
        schedule (`str`): `"warmuplr"` is WeNet's, with `warmup_steps`; `"transformers"` uses `lr_scheduler_type`.
        eval_decoding (`str`): `decoding` of `model.generate` during evaluation, `"default"` for a model that has only
            one; with ZeRO-3 one of CTC alone.
        average_checkpoints (`int`): how many checkpoints the final model is the mean of; 0 or 1 keeps the last.
        average_by (`str`, *optional*): metric that chooses them, e.g. `"eval_wer"`; `None` takes the last ones.
        log_expert_load (`bool`): log the smallest and the largest share of the frames (decoder: tokens) since the last
            log that an expert of any routed layer received. Each frame counts once per chosen expert, so an even load
            of E experts is 1 / E. Keeps the router logits of a step in memory.
    """

    max_frames_per_batch: int = field(default=12000)
    max_items_per_batch: int = field(default=64)
    bucket_window: int = field(default=512)
    schedule: str = field(default="warmuplr")
    eval_decoding: str = field(default="ctc_greedy")
    average_checkpoints: int = field(default=0)
    average_by: str | None = field(default=None)
    log_expert_load: bool = field(default=False)

    def __post_init__(self):
        super().__post_init__()
        if self.schedule not in ("warmuplr", "transformers"):
            raise ValueError(f"schedule: expected 'warmuplr' or 'transformers', found {self.schedule!r}")


class SpeechRecognitionTrainer(Trainer):
    """Trains a model whose forward takes `input_features`, `attention_mask`, `labels` and returns `.loss`.

    The training set is a [`~hf_speechllm.data.dataset.SpeechRecognitionDataset`], or anything with `lengths(epoch)`
    whose items are addressed by (epoch, index). Evaluation reports the loss and hands the ids that `model.generate`
    gives to `compute_metrics`.
    """

    args: SpeechTrainingArguments

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        decoding = self.args.eval_decoding
        if decoding not in _DECODINGS_WITHOUT_DECODER and self.is_deepspeed_enabled:
            if self.accelerator.state.deepspeed_plugin.zero_stage == 3:
                raise ValueError(
                    f"eval_decoding: expected one of {_DECODINGS_WITHOUT_DECODER} with ZeRO-3, found {decoding!r}: "
                    "the processes would wait for each other in decoder steps that some of them do not need"
                )
        # The joint loss is a mean over the utterances of a batch, as upstream, not over an accumulated step's tokens.
        self.model_accepts_loss_kwargs = False
        self._output_sums: dict[str, torch.Tensor | float] = defaultdict(float)
        self._output_counts: dict[str, int] = defaultdict(int)
        self._expert_counts: dict[str, torch.Tensor | int] = defaultdict(int)
        self._staging = False

    # Data

    def get_train_dataloader(self) -> EpochDataLoader:
        """Bucketed batches. The sampler itself shares them out between processes: accelerate does not prepare it."""
        sampler = DurationBucketBatchSampler(
            self.train_dataset.lengths,
            max_frames=self.args.max_frames_per_batch,
            max_items=self.args.max_items_per_batch,
            window=self.args.bucket_window,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )
        return EpochDataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            persistent_workers=self.args.dataloader_persistent_workers,
        )

    # Optimisation

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """WeNet's `warmuplr` or one of transformers' schedules, as `args.schedule` says."""
        if self.args.schedule == "warmuplr" and self.lr_scheduler is None:
            steps = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = wenet_warmup_scheduler(optimizer or self.optimizer, steps)
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """The model's loss; its parts, and the load of the experts, are remembered for the log."""
        count_experts = model.training and self.args.log_expert_load
        if count_experts:
            inputs = {**inputs, "output_router_logits": True}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            for name in LOGGED_OUTPUTS:
                value = outputs.get(name)
                if value is not None:
                    self._output_sums[name] += value.detach()
                    self._output_counts[name] += 1
        if count_experts:
            for name, counts in expert_counts(self.accelerator.unwrap_model(model), outputs, inputs["labels"]).items():
                self._expert_counts[name] += counts
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of the loss parts since the last log and the load of the experts, over all processes."""
        if "loss" in logs:
            for name, count in self._output_counts.items():
                logs[name] = self.accelerator.reduce(self._output_sums[name] / count, reduction="mean").item()
            for name, counts in self._expert_counts.items():
                counts = self.accelerator.reduce(counts, reduction="sum")
                shares = counts / counts.sum(dim=1, keepdim=True)
                logs[f"{name}expert_share_min"] = shares.min().item()
                logs[f"{name}expert_share_max"] = shares.max().item()
            self._output_sums.clear()
            self._output_counts.clear()
            self._expert_counts.clear()
        super().log(logs, start_time)

    # Evaluation

    def prediction_step(self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys=None):
        """Loss and decoded ids of a batch: `(loss, ids (batch, tokens), labels (batch, tokens))`."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs).detach()
            if prediction_loss_only:
                return loss, None, None
            decoding = self.args.eval_decoding
            ids = self.accelerator.unwrap_model(model).generate(
                input_features=inputs["input_features"],
                attention_mask=inputs["attention_mask"],
                **({} if decoding == "default" else {"decoding": decoding}),
            )
        return loss, ids, inputs["labels"]

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        run = Path(super()._get_output_dir(trial))
        return str(run / f"{STAGING_PREFIX}{self.state.global_step}") if self._staging else str(run)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save into a staging folder, then rename it (see `checkpoints.py`)."""
        run = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            for left_over in run.glob(f"{STAGING_PREFIX}*"):
                shutil.rmtree(left_over)
        self.accelerator.wait_for_everyone()

        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()

        best = f"checkpoint-{self.state.best_global_step}" if self.state.best_global_step else None
        if best is not None and (best == name or (run / best).is_dir()):
            self.state.best_model_checkpoint = str(run / best)
        if self.args.should_save:
            staging = run / f"{STAGING_PREFIX}{self.state.global_step}"
            staged = staging / name
            self.state.save_to_json(str(staged / "trainer_state.json"))
            publish(staged, run / name)
            staging.rmdir()
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        self.accelerator.wait_for_everyone()

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any):
        """Train; `resume_from_checkpoint=True` takes the newest *complete* checkpoint, or starts afresh."""
        if resume_from_checkpoint is True:
            run = Path(self.args.output_dir)
            for folder in incomplete_checkpoints(run):
                logger.warning(f"{folder}: incomplete, skipped")
            complete = complete_checkpoints(run)
            resume_from_checkpoint = str(complete[-1]) if complete else None
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)


def expert_counts(model: nn.Module, outputs: Any, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Real frames and tokens per expert in a batch.

    Args:
        model: the recogniser. outputs: of its forward with `output_router_logits=True`. labels (`(b, n)`): of the same
            batch, -100 = padding.

    Returns:
        `(routed layers, experts)` int64, under `""` for the encoder and `"decoder_"` for the decoders (left-to-right
        layers first), as far as these have experts.

    Raises:
        ValueError: a model without experts.
    """
    counts = {}
    if outputs.router_logits:
        real = outputs.encoder_attention_mask.flatten()
        logits = tuple(layer[real] for layer in outputs.router_logits)
        counts[""] = model.tokens_per_expert(logits, model.config.num_experts_per_tok)
    if outputs.decoder_router_logits:
        lengths = (labels != -100).sum(dim=-1)
        # The decoders read the labels after a sentence mark.
        real = (torch.arange(int(lengths.max()) + 1, device=labels.device) <= lengths[:, None]).flatten()
        logits = tuple(layer[real] for layer in outputs.decoder_router_logits)
        counts["decoder_"] = model.tokens_per_expert(logits, model.config.decoder_num_experts_per_tok)
    if not counts:
        raise ValueError("log_expert_load: expected a model with a mixture of experts, found none")
    return counts
