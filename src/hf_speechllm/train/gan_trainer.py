"""Adversarial training of anything that makes waveforms: a codec, or a vocoder.

The generator is a `PreTrainedModel`; how a batch becomes a waveform, and which losses it has besides those of the
discriminators, is said by one callable:

    def step(generator, batch) -> GeneratorStep:
        output = generator(batch["unit_ids"])
        return GeneratorStep(real=batch["waveform"], fake=output.waveform, losses={"mel": mel_loss(...)})

    trainer = GanTrainer(
        generator, step, arguments, train_dataset, collate,
        discriminators=build_discriminators(["mpd", "msd"]), evaluate=evaluate, processing_class=extractor,
    )
    trainer.train(resume=True)

One training step: one pass of the generator, one update of the discriminators on its detached result, one update of
the generator on `sum(weight * loss)` with the discriminators held. A checkpoint holds everything that the next step
depends on (both networks, both optimisers, random states, the place in the data), so that a resumed run gives the
weights of one that was never stopped; its folder is also a model that `from_pretrained` loads.

Runs under `accelerate launch` on one or more processes (data parallel). ZeRO and FSDP are not for these small models.
"""

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedModel, set_seed
from transformers.utils import logging

from hf_speechllm.data.fixed_batches import FixedBatchSampler
from hf_speechllm.train.adversarial_losses import (
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
    relativistic_loss,
)
from hf_speechllm.train.checkpoints import STAGING_PREFIX, complete_checkpoints, incomplete_checkpoints, publish
from hf_speechllm.train.discriminators import DiscriminatorEnsemble


logger = logging.get_logger(__name__)

LOG_NAME = "log.jsonl"
_DISCRIMINATORS, _OPTIMIZERS, _STATE = "discriminators.safetensors", "optimizers.pt", "trainer_state.json"
_ADVERSARIAL = ("adversarial", "feature_matching")


@dataclass
class GeneratorStep:
    """What one pass of the generator gives.

    Args:
        real: the recorded waveform, float32 `(b, 1, samples)` or `(b, samples)`.
        fake: the generated one, of the same shape, with gradient.
        losses: the scalars that the generator lowers besides the adversarial ones, before weighting.
        metrics: scalars that are only logged.
    """

    real: Tensor
    fake: Tensor
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)


class StepFunction(Protocol):
    """Must call `generator(...)` itself, once, not one of its methods: that is what data parallelism wraps."""

    def __call__(self, generator: nn.Module, batch: dict[str, Any]) -> GeneratorStep: ...


@dataclass
class GanTrainingArguments:
    """How a run goes.

    Args:
        output_dir: receives `checkpoint-N`, `log.jsonl` and, at its top level, the final model.
        max_steps: updates of the generator in all.
        batch_size: items per process.
        learning_rate: peak for the generator. discriminator_learning_rate: default the same.
        adam_beta1, adam_beta2, weight_decay: of both AdamW optimisers.
        schedule: `"cosine"` to zero at `max_steps`, `"exponential"` (times `lr_decay` every `lr_decay_steps`), or
            `"constant"`; each after `warmup_steps` of linear rise. A function of the step alone.
        max_grad_norm: gradients of either network are clipped to it; 0 leaves them.
        loss_weights: a weight for every loss of the step function, and for `adversarial` and `feature_matching`
            (1 where absent).
        adversarial_start_step: updates of the generator before the discriminators join.
        relativistic_weight, relativistic_margin: of the relativistic loss, for both networks; 0 is without.
        logging_steps, eval_steps, save_steps: every so many updates; 0 is never. The last step is saved in any case.
        save_total_limit: newest checkpoints that are kept; 0 keeps all.
        mixed_precision: `"no"` or `"bf16"`.
        use_cpu: do not use an accelerator that is there.
        seed: of the weights, the order of the data and everything drawn while training.
        dataloader_num_workers: processes that read data.
        progress_bar: show one.
    """

    output_dir: str
    max_steps: int = 100_000
    batch_size: int = 16
    learning_rate: float = 1e-4
    discriminator_learning_rate: float | None = None
    adam_beta1: float = 0.9
    adam_beta2: float = 0.99
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup_steps: int = 0
    lr_decay: float = 0.999
    lr_decay_steps: int = 1000
    max_grad_norm: float = 0.0
    loss_weights: dict[str, float] = field(default_factory=dict)
    adversarial_start_step: int = 0
    relativistic_weight: float = 0.0
    relativistic_margin: float = 0.04
    logging_steps: int = 50
    eval_steps: int = 0
    save_steps: int = 1000
    save_total_limit: int = 3
    mixed_precision: str = "no"
    use_cpu: bool = False
    seed: int = 42
    dataloader_num_workers: int = 0
    progress_bar: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (
            ("schedule", ("cosine", "exponential", "constant")),
            ("mixed_precision", ("no", "bf16")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {allowed}, got {getattr(self, name)!r}")
        for name in ("max_steps", "batch_size", "logging_steps", "lr_decay_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    def learning_rate_factor(self, step: int) -> float:
        """Share of the peak learning rate at `step` (0 is the first)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        after = step - self.warmup_steps
        if self.schedule == "exponential":
            return self.lr_decay ** (after // self.lr_decay_steps)
        return 0.5 * (1 + math.cos(math.pi * after / max(self.max_steps - self.warmup_steps, 1)))


class GanTrainer:
    """Trains a generator against discriminators; see the module's docstring.

    Args:
        generator: the model that is trained and saved.
        step: see [`GeneratorStep`].
        arguments: how the run goes.
        train_dataset: items are addressed by `(epoch, index)` and must depend on nothing else.
        collate: list of items → batch, a dictionary whose tensors are moved to the device.
        discriminators: `None` trains on the other losses alone.
        evaluate: generator (in evaluation mode, without gradients) → metrics, logged with the prefix `eval_`.
        processing_class: saved beside every checkpoint, e.g. a feature extractor.

    Attributes:
        step_number: updates that have been made.
    """

    def __init__(
        self,
        generator: PreTrainedModel,
        step: StepFunction,
        arguments: GanTrainingArguments,
        train_dataset: Dataset,
        collate: Callable[[Sequence[Any]], dict[str, Any]],
        discriminators: DiscriminatorEnsemble | None = None,
        evaluate: Callable[[PreTrainedModel], Mapping[str, float]] | None = None,
        processing_class: Any = None,
    ) -> None:
        self.arguments, self.step, self.evaluate_model = arguments, step, evaluate
        self.processing_class = processing_class
        self.accelerator = Accelerator(mixed_precision=arguments.mixed_precision, cpu=arguments.use_cpu)
        self.run = Path(arguments.output_dir)
        # Every process draws its own numbers, from the same weights.
        set_seed(arguments.seed + self.accelerator.process_index)
        self.generator, self.optimizer_g = self._prepare(generator, arguments.learning_rate)
        self.discriminators = self.optimizer_d = None
        if discriminators is not None:
            rate = arguments.discriminator_learning_rate or arguments.learning_rate
            self.discriminators, self.optimizer_d = self._prepare(discriminators, rate)
        self.sampler = FixedBatchSampler(
            len(train_dataset),
            arguments.batch_size,
            arguments.seed,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        self.loader = DataLoader(
            train_dataset,
            batch_sampler=self.sampler,
            collate_fn=collate,
            num_workers=arguments.dataloader_num_workers,
            pin_memory=self.accelerator.device.type == "cuda",
            # Its own: the loader would draw from the generator that the training draws from, at every start.
            generator=torch.Generator(),
        )
        self.step_number = self.epoch = self.batches_done = 0
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def _prepare(self, module: nn.Module, learning_rate: float) -> tuple[nn.Module, Any]:
        arguments = self.arguments
        optimizer = torch.optim.AdamW(
            [parameter for parameter in module.parameters() if parameter.requires_grad],
            lr=learning_rate,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            weight_decay=arguments.weight_decay,
        )
        for group in optimizer.param_groups:
            group["initial_lr"] = learning_rate
        return self.accelerator.prepare(module, optimizer)

    # -- the loop ----------------------------------------------------------------------------------------------------
    def train(self, resume: bool | str = False) -> dict[str, float]:
        """Train to `max_steps`, save the last checkpoint and the model at the top of the run's folder.

        Args:
            resume: `True` goes on from the newest complete checkpoint, if there is one; a path names one.
        Returns:
            the last evaluation's metrics, empty without one.
        """
        if self.accelerator.is_main_process:
            self.run.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        checkpoint = self._checkpoint_to_resume(resume)
        if checkpoint is not None:
            self.load_checkpoint(checkpoint)
        self._trim_log()
        arguments, metrics = self.arguments, {}
        bar = tqdm(
            total=arguments.max_steps,
            initial=self.step_number,
            disable=not (arguments.progress_bar and self.accelerator.is_main_process),
        )
        self.generator.train()
        batches = self._batches()
        while self.step_number < arguments.max_steps:
            self._training_step(next(batches))
            bar.update()
            last = self.step_number == arguments.max_steps
            if last or self.step_number % arguments.logging_steps == 0:
                values = self._means()
                bar.set_postfix({name: f"{value:.3g}" for name, value in values.items() if "/" not in name})
                self._log(values)
            if arguments.eval_steps and (last or self.step_number % arguments.eval_steps == 0):
                metrics = self.evaluate()
            if last or (arguments.save_steps and self.step_number % arguments.save_steps == 0):
                self.save_checkpoint()
        bar.close()
        self.save_model(self.run)
        self.accelerator.wait_for_everyone()
        return metrics

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Batches from the current place in the data on, epoch after epoch."""
        device = self.accelerator.device
        while True:
            self.sampler.set_position(self.epoch, self.batches_done)
            for batch in self.loader:
                self.batches_done += 1
                yield {
                    name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                    for name, value in batch.items()
                }
            self.epoch, self.batches_done = self.epoch + 1, 0

    def _training_step(self, batch: dict[str, Any]) -> None:
        arguments, accelerator = self.arguments, self.accelerator
        factor = arguments.learning_rate_factor(self.step_number)
        with accelerator.autocast():
            output = self.step(self.generator, batch)
        losses = dict(output.losses)
        adversarial = self.discriminators is not None and self.step_number >= arguments.adversarial_start_step
        if adversarial:
            with accelerator.autocast():
                real, fake = self.discriminators(output.real, output.fake.detach())
            loss = discriminator_loss(real.scores, fake.scores)
            if arguments.relativistic_weight:
                relativistic = relativistic_loss(real.scores, fake.scores, arguments.relativistic_margin)
                loss = loss + arguments.relativistic_weight * relativistic
            self._update(self.discriminators, self.optimizer_d, loss, factor)
            self._count("discriminator", loss)
            losses |= self._adversarial_losses(output)
        total = self._weighted_sum(losses)
        self._update(self.generator, self.optimizer_g, total, factor)
        for name, value in ({"loss": total} | losses | output.metrics).items():
            self._count(name, value)
        self._count("learning_rate", torch.tensor(arguments.learning_rate * factor))
        self.step_number += 1

    def _adversarial_losses(self, output: GeneratorStep) -> dict[str, Tensor]:
        """The generator's losses from the discriminators just updated, which get no gradient from them."""
        # Not through the data-parallel wrapper, which would wait for gradients of the discriminators.
        judges = self.accelerator.unwrap_model(self.discriminators)
        judges.requires_grad_(False)
        with self.accelerator.autocast():
            with torch.no_grad():
                real = judges.judge(output.real)
            fake = judges.judge(output.fake)
        judges.requires_grad_(True)
        losses = {
            "adversarial": adversarial_loss(fake.scores),
            "feature_matching": feature_matching_loss(real.features, fake.features),
        }
        if self.arguments.relativistic_weight:
            losses["relativistic"] = relativistic_loss(fake.scores, real.scores, self.arguments.relativistic_margin)
        return losses

    def _weighted_sum(self, losses: dict[str, Tensor]) -> Tensor:
        weights = dict.fromkeys(_ADVERSARIAL, 1.0) | {"relativistic": self.arguments.relativistic_weight}
        weights |= self.arguments.loss_weights
        if missing := losses.keys() - weights.keys():
            raise ValueError(f"loss_weights: expected a weight for {sorted(missing)}, got {sorted(weights)}")
        return torch.stack([weights[name] * value for name, value in losses.items()]).sum()

    def _update(self, module: nn.Module, optimizer: Any, loss: Tensor, factor: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        self.accelerator.backward(loss)
        if self.arguments.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(module.parameters(), self.arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # -- evaluation and the log --------------------------------------------------------------------------------------
    def evaluate(self) -> dict[str, float]:
        """What the `evaluate` function says of the generator now, with `eval_` before every name; logged."""
        if self.evaluate_model is None:
            raise ValueError("evaluate: expected a function that evaluates the generator, got None")
        model = self.accelerator.unwrap_model(self.generator)
        model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            metrics = {f"eval_{name}": float(value) for name, value in self.evaluate_model(model).items()}
        self.generator.train()
        self._log(metrics)
        return metrics

    def _count(self, name: str, value: Tensor) -> None:
        value = value.detach().double()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def _means(self) -> dict[str, float]:
        """Means since the last log over all processes.

        Raises:
            FloatingPointError: one of them is not finite.
        """
        means = {}
        for name, total in self._sums.items():
            mean = total.to(self.accelerator.device) / self._counts[name]
            means[name] = self.accelerator.reduce(mean, reduction="mean").item()
            if not math.isfinite(means[name]):
                raise FloatingPointError(f"{name}: expected a finite value at step {self.step_number}, got {means}")
        self._sums, self._counts = {}, {}
        return means

    def _log(self, values: Mapping[str, float]) -> None:
        if self.accelerator.is_main_process:
            with (self.run / LOG_NAME).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step_number, "epoch": self.epoch, **values}) + "\n")

    def _trim_log(self) -> None:
        """Remove what was logged after the step that the run starts from."""
        path = self.run / LOG_NAME
        if self.accelerator.is_main_process and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if json.loads(line)["step"] <= self.step_number]
            path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    # -- checkpoints -------------------------------------------------------------------------------------------------
    def save_model(self, folder: str | Path) -> None:
        """The generator, and the processing class, as a folder that `from_pretrained` loads."""
        if self.accelerator.is_main_process:
            self.accelerator.unwrap_model(self.generator).save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def save_checkpoint(self) -> Path:
        """Write `checkpoint-N`, complete or not at all (see `checkpoints.py`), and remove the oldest ones."""
        staged, final = (self.run / f"{name}{self.step_number}" for name in (STAGING_PREFIX, "checkpoint-"))
        if self.accelerator.is_main_process:
            for left_over in self.run.glob(f"{STAGING_PREFIX}*"):
                shutil.rmtree(left_over)
            staged.mkdir()
        self.accelerator.wait_for_everyone()
        torch.save(_random_states(), staged / f"random_state_{self.accelerator.process_index}.pt")
        self.save_model(staged)
        if self.accelerator.is_main_process:
            optimizers = {"generator": self.optimizer_g.state_dict()}
            if self.discriminators is not None:
                state = self.accelerator.unwrap_model(self.discriminators).state_dict()
                save_file({name: tensor.contiguous() for name, tensor in state.items()}, staged / _DISCRIMINATORS)
                optimizers["discriminators"] = self.optimizer_d.state_dict()
            torch.save(optimizers, staged / _OPTIMIZERS)
            state = {
                "step": self.step_number,
                "epoch": self.epoch,
                "batches_done": self.batches_done,
                "sums": {name: value.item() for name, value in self._sums.items()},
                "counts": self._counts,
                "arguments": asdict(self.arguments),
            }
            (staged / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            publish(staged, final)
            limit = self.arguments.save_total_limit
            for old in complete_checkpoints(self.run)[:-limit] if limit else ():
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        return final

    def load_checkpoint(self, folder: str | Path) -> None:
        """Restore both networks, both optimisers, the random states and the place in the data.

        Raises:
            FileNotFoundError: the checkpoint lacks discriminators that this run trains, or has another number of
                processes.
        """
        folder = Path(folder)
        model = self.accelerator.unwrap_model(self.generator)
        restored = type(model).from_pretrained(folder, dtype=model.dtype, local_files_only=True)
        model.load_state_dict(restored.state_dict())
        optimizers = torch.load(folder / _OPTIMIZERS, map_location="cpu", weights_only=True)
        self.optimizer_g.load_state_dict(optimizers["generator"])
        if self.discriminators is not None:
            if not (folder / _DISCRIMINATORS).is_file():
                raise FileNotFoundError(f"{folder}: expected {_DISCRIMINATORS}, found none")
            judges = self.accelerator.unwrap_model(self.discriminators)
            judges.load_state_dict(load_file(folder / _DISCRIMINATORS))
            self.optimizer_d.load_state_dict(optimizers["discriminators"])
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        self.step_number, self.epoch, self.batches_done = state["step"], state["epoch"], state["batches_done"]
        self._sums = {
            name: torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
            for name, value in state["sums"].items()
        }
        self._counts = state["counts"]
        name = f"random_state_{self.accelerator.process_index}.pt"
        _restore_random_states(torch.load(folder / name, weights_only=True))

    def _checkpoint_to_resume(self, resume: bool | str) -> Path | None:
        if not isinstance(resume, bool):
            return Path(resume)
        if not resume:
            return None
        for folder in incomplete_checkpoints(self.run):
            logger.warning(f"{folder}: incomplete, skipped")
        complete = complete_checkpoints(self.run)
        return complete[-1] if complete else None


def _random_states() -> dict[str, Any]:
    """States of the global generators, as tensors and plain numbers that load without running a pickle's code."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
