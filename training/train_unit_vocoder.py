"""Train a vocoder of speech units: unit HiFi-GAN with a duration predictor.

    python training/train_unit_vocoder.py training/recipes/speechgpt_unit_vocoder/digits.yaml \\
        --data_dir DATA/digits --units_model UNITS --output_dir RUN
    python training/train_unit_vocoder.py RECIPE.yaml --max_steps 100000 --resume true

One YAML file describes one run; `--key value` overrides it. Groups: `model` (its `config` holds fields of
`SpeechGptUnitVocoderConfig`, or `pretrained` names a vocoder to start from), `data` (sources as in `train_asr.py`;
their text is not used), `vocoder` (`UnitVocoderArguments` below), `training` (`GanTrainingArguments`). Units come from
`units_model`, a `speechgpt_units` model; they are computed once, and kept in `units_cache` if that is named.
With `use_f0` in the `config`, the vocoder also reads the pitch of the recordings, in Hz within `f0_range` (65 to 800
if that is not named), and with `vocoder.styles` the style, from the column `style` of the manifests.
`--resume true` goes on from the newest complete checkpoint. The folder `output_dir` receives checkpoints, `log.jsonl`
and, at its top level, the model that is done.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_speechllm.train.run_config import DataArguments, ModelArguments, load_run_config


if TYPE_CHECKING:
    from torch import Tensor

    from hf_speechllm.data.manifests import Utterance
    from hf_speechllm.data.unit_crops import UnitUtterance
    from hf_speechllm.models.modeling_speechgpt_unit_vocoder import SpeechGptUnitVocoderModel
    from hf_speechllm.models.pitch_scale import PitchScale


# Hz; what `track_pitch` searches if it is not told.
_F0_RANGE = [65.0, 800.0]


@dataclass
class UnitVocoderArguments:
    """Units, crops and losses.

    Args:
        units_model (`str`): folder or Hub id of the `speechgpt_units` model.
        units_cache (`str`, *optional*): .safetensors file that keeps the units; used if it fits the data and model.
        batch_seconds (`float`): audio of one batch while units are computed.
        speakers (`bool`): whether the voice is an input: one row per name in the column `speaker` of the manifests.
        styles (`bool`): whether the style is an input: one row per name in the column `style` of the manifests.
        crop_frames (`int`): frames of a training item.
        gain_db (`list`): range of the random gain of an item, in dB.
        discriminators (`list[str]`), discriminator_shrink (`int`): see `build_discriminators`.
        mel_weights (`list[float]`): weights of the mel spectrograms of 1024, 512, ... samples (`MultiScaleMelLoss`).
        eval_utterances (`int`): recordings of `data.validation` that are evaluated.
    """

    units_model: str = ""
    units_cache: str | None = None
    batch_seconds: float = 60.0
    speakers: bool = False
    styles: bool = False
    crop_frames: int = 28
    gain_db: list[float] = field(default_factory=lambda: [0.0, 0.0])
    discriminators: list[str] = field(default_factory=lambda: ["mpd", "msd"])
    discriminator_shrink: int = 1
    mel_weights: list[float] = field(default_factory=lambda: [45.0])
    eval_utterances: int = 100


@dataclass
class UnitVocoderRun:
    """The groups of a run file; `training` holds the fields of `GanTrainingArguments`, and `resume`."""

    model: ModelArguments = field(default_factory=ModelArguments)
    data: DataArguments = field(default_factory=DataArguments)
    vocoder: UnitVocoderArguments = field(default_factory=UnitVocoderArguments)
    training: dict[str, Any] = field(default_factory=dict)


def frame_units(
    utterances: "Sequence[Utterance]", model: Any, batch_seconds: float = 60.0, cache: str | None = None
) -> "list[Tensor]":
    """Units of the frames of each utterance, `(t,)` int64; from the file `cache` where it has them.

    Args:
        model: a `speechgpt_units` model in evaluation mode, on any device.
        cache: .safetensors file. It is used if its utterances and the codebook that it was made with are the same,
            and else written.
    """
    import hashlib

    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    from hf_speechllm.data.unit_extraction import extract_units

    keys = json.dumps([f"{item.key} {item.audio if isinstance(item.audio, Path) else ''}" for item in utterances])
    codebook = model.codebook.float().cpu().contiguous().numpy().tobytes()
    made_of = hashlib.sha256(keys.encode() + codebook).hexdigest()
    if cache is not None and Path(cache).is_file():
        with safe_open(cache, "pt") as file:
            if (file.metadata() or {}).get("made_of") == made_of:
                return list(file.get_tensor("unit_ids").split(file.get_tensor("lengths").tolist()))
    # A source may be repeated in an epoch: the same objects again.
    different = list({id(item): item for item in utterances}.values())
    units = {
        id(item): torch.repeat_interleave(torch.tensor(row["units"]).long(), torch.tensor(row["durations"]).long())
        for item, row in zip(different, extract_units(model, different, batch_seconds), strict=True)
    }
    rows = [units[id(item)] for item in utterances]
    if cache is not None:
        Path(cache).parent.mkdir(parents=True, exist_ok=True)
        lengths = torch.tensor([len(row) for row in rows])
        save_file({"unit_ids": torch.cat(rows), "lengths": lengths}, cache, metadata={"made_of": made_of})
    return rows


def style_of(utterance: "Utterance") -> str | None:
    """What the column `style` of the manifest says."""
    return utterance.columns.get("style") or None


def unit_utterances(
    utterances: "Sequence[Utterance]",
    units: "Sequence[Tensor]",
    speakers: "Sequence[str] | None",
    styles: "Sequence[str] | None" = None,
) -> "list[UnitUtterance]":
    """Utterances with their units and the numbers of their speaker and style.

    Raises:
        ValueError: an utterance whose speaker is missing or not among `speakers`, or its style not among `styles`.
    """
    from hf_speechllm.data.unit_crops import UnitUtterance

    rows = []
    for item, ids in zip(utterances, units, strict=True):
        if speakers is not None and item.speaker not in speakers:
            raise ValueError(f"{item.key}: speaker: expected one of {list(speakers)}, found {item.speaker!r}")
        style = style_of(item)
        if styles is not None and style not in styles:
            raise ValueError(f"{item.key}: style: expected one of {list(styles)}, found {style!r}")
        speaker_id = 0 if speakers is None else speakers.index(item.speaker)
        rows.append(UnitUtterance(item, ids, speaker_id, 0 if styles is None else styles.index(style)))
    return rows


def new_model(
    fields: dict[str, Any],
    num_units: int,
    sampling_rate: int,
    speakers: "Sequence[str] | None",
    styles: "Sequence[str] | None" = None,
) -> "SpeechGptUnitVocoderModel":
    """A new vocoder of these configuration fields, with its generator's weights as direction and length."""
    from hf_speechllm.models.configuration_speechgpt_unit_vocoder import SpeechGptUnitVocoderConfig
    from hf_speechllm.models.modeling_speechgpt_unit_vocoder import SpeechGptUnitVocoderModel

    fields = {"num_units": num_units, "sampling_rate": sampling_rate, "weight_norm": True} | fields
    if speakers is not None:
        fields |= {"num_speakers": len(speakers), "speakers": list(speakers)}
    if styles is not None:
        fields |= {"num_styles": len(styles), "styles": list(styles)}
    if fields.get("use_f0"):
        fields = {"f0_range": _F0_RANGE} | fields
    if "hifigan_config" in fields:
        # The width of what enters is the sum of the embeddings, which a recipe need not work out.
        inputs = {name: value for name, value in fields.items() if name != "hifigan_config"}
        fields["hifigan_config"] = {
            "model_in_dim": SpeechGptUnitVocoderConfig(**inputs).input_size,
            "normalize_before": False,
            "sampling_rate": sampling_rate,
            **fields["hifigan_config"],
        }
    return SpeechGptUnitVocoderModel(SpeechGptUnitVocoderConfig(**fields))


def evaluation(
    utterances: "Sequence[UnitUtterance]",
    mel: Any,
    sampling_rate: int,
    hop_length: int,
    pitch_scale: "PitchScale | None" = None,
) -> "Callable[[SpeechGptUnitVocoderModel], dict[str, float]]":
    """Mean over recordings: distance of the mel spectrogram with true durations, and error of the durations."""
    import torch

    from hf_speechllm.data.unit_crops import UnitCropDataset

    held_out = UnitCropDataset(utterances, 1, hop_length, sampling_rate, pitch_scale=pitch_scale)

    def evaluate(model: "SpeechGptUnitVocoderModel") -> dict[str, float]:
        distances, squares, count = [], 0.0, 0
        for index in range(len(held_out)):
            waveform, units = (torch.from_numpy(part)[None].to(model.device) for part in held_out.recording(index))
            if waveform.shape[1] < mel.spectrograms[0].n_fft:
                continue
            item = held_out.utterances[index]
            inputs = {"speaker_id": item.speaker_id} if model.config.num_speakers else {}
            inputs |= {"style_id": item.style_id} if model.config.num_styles else {}
            if pitch_scale is not None:
                inputs["f0"] = torch.from_numpy(held_out.pitch(index))[None].to(model.device)
            output = model(units, predict_durations=False, return_dict=True, **inputs)
            distances.append(float(mel.scales(waveform, output.waveform)[0]))
            if model.config.duration_hidden_size:
                runs, durations = torch.unique_consecutive(units[0], return_counts=True)
                said = model.predict_log_durations(runs[None], torch.ones_like(runs, dtype=torch.bool)[None])[0]
                squares += float((said - (durations + 1).float().log()).square().sum())
                count += len(runs)
        metrics = {"mel_l1": sum(distances) / max(1, len(distances))}
        return metrics | ({"duration_mse": squares / count} if count else {})

    return evaluate


def main(argv: Sequence[str]) -> None:
    """Run the recipe; see the module's docstring."""
    if not argv or not {"-h", "--help"}.isdisjoint(argv):
        print(__doc__)
        return
    from transformers import AutoModel, set_seed

    import hf_speechllm  # noqa: F401  registers the model families
    from hf_speechllm.data.sources import read_sources
    from hf_speechllm.data.unit_crops import UnitCropDataset, collate_unit_crops
    from hf_speechllm.models.modeling_speechgpt_unit_vocoder import SpeechGptUnitVocoderModel
    from hf_speechllm.train.discriminators import build_discriminators
    from hf_speechllm.train.gan_trainer import GanTrainer, GanTrainingArguments, GeneratorStep
    from hf_speechllm.train.mel_loss import MultiScaleMelLoss
    from hf_speechllm.train.summary import write_summary

    recipe, overrides = (None, argv) if argv[0].startswith("--") else (argv[0], argv[1:])
    keys = [entry.name for entry in dataclasses.fields(GanTrainingArguments)] + ["resume"]
    run = load_run_config(recipe, overrides, keys, UnitVocoderRun)
    options, resume = run.vocoder, run.training.pop("resume", False)
    args = GanTrainingArguments(**run.training)
    set_seed(args.seed)

    trust = {"trust_remote_code": run.model.trust_remote_code}
    units_model = AutoModel.from_pretrained(options.units_model, **trust).eval()
    utterances = read_sources(run.data.train, run.data.data_dir)
    validation = read_sources(run.data.validation, run.data.data_dir)
    speakers = sorted({item.speaker or "" for item in utterances}) if options.speakers else None
    styles = sorted({style_of(item) or "" for item in utterances}) if options.styles else None
    if run.model.pretrained is not None:
        model = SpeechGptUnitVocoderModel.from_pretrained(run.model.pretrained)
        if not model.config.weight_norm:
            model.apply_weight_norm()
    else:
        rate = units_model.config.sampling_rate
        model = new_model(run.model.config, units_model.config.num_units, rate, speakers, styles)
    config = model.config
    speakers, styles = config.speakers, config.styles
    pitch_scale = model.pitch_scale if config.use_f0 else None

    validation = [item for item in validation if speakers is None or item.speaker in speakers]
    validation = [item for item in validation if styles is None or style_of(item) in styles]
    validation = validation[:: max(1, len(validation) // options.eval_utterances)][: options.eval_utterances]
    both = [*utterances, *validation]
    units = frame_units(both, units_model, options.batch_seconds, options.units_cache)
    rows = unit_utterances(both, units, speakers, styles)
    train_rows, eval_rows = rows[: len(utterances)], rows[len(utterances) :]
    del units_model
    train_set = UnitCropDataset(
        train_rows,
        options.crop_frames,
        config.hop_length,
        config.sampling_rate,
        args.seed,
        tuple(options.gain_db),
        pitch_scale,
    )

    mel = MultiScaleMelLoss(config.sampling_rate, options.mel_weights, hop_length=256, mel_scale="slaney")

    def step(generator: Any, batch: "dict[str, Tensor]") -> GeneratorStep:
        names = ["unit_ids"]
        names += ["speaker_id"] if config.num_speakers else []
        names += ["style_id"] if config.num_styles else []
        names += ["f0"] if config.use_f0 else []
        names += ["duration_unit_ids", "duration_labels"] if config.duration_hidden_size else []
        inputs = {name: batch[name] for name in names}
        output = generator(**inputs, predict_durations=False, return_dict=True)
        fake = output.waveform[:, : batch["waveform"].shape[1]]
        losses = {"mel": mel.to(fake.device)(batch["waveform"], fake)}
        if config.duration_hidden_size:
            losses["duration"] = output.loss
        return GeneratorStep(batch["waveform"], fake, losses)

    args.loss_weights = {"mel": 1.0, "duration": 1.0} | args.loss_weights
    judges = build_discriminators(options.discriminators, options.discriminator_shrink)
    sizes = {
        "recordings": len(train_set),
        "parameters": model.num_parameters(),
        "discriminator_parameters": sum(parameter.numel() for parameter in judges.parameters()),
    }
    print(json.dumps(sizes), flush=True)
    evaluate = None
    if eval_rows:
        evaluate = evaluation(eval_rows, mel, config.sampling_rate, config.hop_length, pitch_scale)
    trainer = GanTrainer(
        model,
        step,
        args,
        train_set,
        collate_unit_crops,
        discriminators=judges if options.discriminators else None,
        evaluate=evaluate,
    )
    metrics = trainer.train(resume=resume)
    done = trainer.accelerator.unwrap_model(trainer.generator)
    done.fold_weight_norm()
    if trainer.accelerator.is_main_process:
        done.save_pretrained(args.output_dir)
        summary = {**sizes, **metrics, "seed": args.seed, "steps": trainer.step_number}
        write_summary(args.output_dir, summary)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])
