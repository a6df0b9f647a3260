"""Train or fine-tune CosyVoice's HiFT vocoder: mel spectrograms of recordings back to waveforms.

    python training/train_vocoder.py training/recipes/cosyvoice_hift/kerstin.yaml --data_dir DATA --output_dir RUN
    python training/train_vocoder.py training/recipes/cosyvoice_hift/finetune.yaml --pretrained VOCODER \\
        --data_dir DATA --output_dir RUN --resume true

One YAML file describes one run; `--key value` overrides it. Groups: `model` (its `config` holds fields of
`CosyVoiceHiftConfig` or `CosyVoice3HiftConfig`, or `pretrained` names a vocoder or a complete CosyVoice to start
from), `data` (sources as in `train_asr.py`; their text is not used; `feature_extractor` holds arguments of
`CosyVoiceMelFeatureExtractor`), `vocoder` (`VocoderArguments` below), `training` (`GanTrainingArguments`).
Spectrograms and pitch are computed from the recordings while training. `--resume true` goes on from the newest
complete checkpoint, discriminators included. The folder `output_dir` receives checkpoints, `log.jsonl` and, at its
top level, the model that is done and its extractor.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_speechllm.train.run_config import DataArguments, ModelArguments, load_run_config


if TYPE_CHECKING:
    from hf_speechllm.models.feature_extraction_cosyvoice_mel import CosyVoiceMelFeatureExtractor
    from hf_speechllm.models.modeling_cosyvoice_hift import CosyVoiceHiftModel


@dataclass
class VocoderArguments:
    """Crops, discriminators and evaluation.

    Args:
        crop_frames (`int`): mel frames of a training item; upstream has 96 (version 1), 51 and 52.
        gain_db (`list`): range of the random gain of an item, in dB.
        discriminators (`list[str]`), discriminator_shrink (`int`): see `build_discriminators`; none trains without.
        lowest_f0, highest_f0 (`float`): Hz, between which the pitch of a recording is searched.
        eval_utterances (`int`): recordings of `data.validation` that are evaluated.
        eval_seconds (`float`): how much of each.
        fold_weight_norm (`bool`): make plain weights of the model that is done. A run that starts from it
            normalises them again.
    """

    crop_frames: int = 51
    gain_db: list[float] = field(default_factory=lambda: [0.0, 0.0])
    discriminators: list[str] = field(default_factory=lambda: ["mpd", "mrsd"])
    discriminator_shrink: int = 1
    lowest_f0: float = 65.0
    highest_f0: float = 800.0
    eval_utterances: int = 50
    eval_seconds: float = 10.0
    fold_weight_norm: bool = True


@dataclass
class VocoderRun:
    """The groups of a run file; `training` holds the fields of `GanTrainingArguments`, and `resume`."""

    model: ModelArguments = field(default_factory=lambda: ModelArguments(model_type="cosyvoice_hift"))
    data: DataArguments = field(default_factory=DataArguments)
    vocoder: VocoderArguments = field(default_factory=VocoderArguments)
    training: dict[str, Any] = field(default_factory=dict)


def build_vocoder(model: ModelArguments) -> "CosyVoiceHiftModel":
    """A pretrained vocoder whose weights are normalised again, or a new one.

    Raises:
        ValueError: a `model_type` that is no vocoder of this kind.
    """
    from hf_speechllm.models.configuration_cosyvoice3_hift import CosyVoice3HiftConfig
    from hf_speechllm.models.configuration_cosyvoice_hift import CosyVoiceHiftConfig
    from hf_speechllm.models.modeling_cosyvoice3_hift import CosyVoice3HiftModel
    from hf_speechllm.models.modeling_cosyvoice_hift import CosyVoiceHiftModel

    kinds = {
        "cosyvoice_hift": (CosyVoiceHiftConfig, CosyVoiceHiftModel),
        "cosyvoice3_hift": (CosyVoice3HiftConfig, CosyVoice3HiftModel),
    }
    if model.pretrained is not None:
        from transformers import AutoModel

        from hf_speechllm.train.cosyvoice_parts import is_complete_cosyvoice, load_cosyvoice_part

        trust = {"trust_remote_code": model.trust_remote_code}
        if is_complete_cosyvoice(model.pretrained, **trust):
            vocoder = load_cosyvoice_part(model.pretrained, "vocoder", {}, **trust)
        else:
            vocoder = AutoModel.from_pretrained(model.pretrained, **trust)
        if vocoder.config.model_type not in kinds:
            expected = sorted([*kinds, "cosyvoice"])
            found = vocoder.config.model_type
            raise ValueError(f"{model.pretrained}: model_type: expected one of {expected}, found {found!r}")
        vocoder.apply_weight_norm()
        return vocoder
    # The default of `ModelArguments` is a recogniser's.
    model_type = "cosyvoice_hift" if model.model_type == ModelArguments().model_type else model.model_type
    if model_type not in kinds:
        raise ValueError(f"model_type: expected one of {sorted(kinds)}, found {model_type!r}")
    config_class, model_class = kinds[model_type]
    return model_class(config_class(**model.config))


def build_extractor(
    model: "CosyVoiceHiftModel", arguments: ModelArguments, fields: dict[str, Any]
) -> "CosyVoiceMelFeatureExtractor":
    """The extractor of a pretrained vocoder or a complete CosyVoice, or one of these fields that fits the model.

    Raises:
        ValueError: an extractor whose spectrograms are not the model's.
    """
    from hf_speechllm.models.feature_extraction_cosyvoice_mel import CosyVoiceMelFeatureExtractor
    from hf_speechllm.train.cosyvoice_parts import cosyvoice_mel_fields, is_complete_cosyvoice

    config = model.config
    if is_complete_cosyvoice(arguments.pretrained, arguments.trust_remote_code):
        own = cosyvoice_mel_fields(arguments.pretrained, arguments.trust_remote_code)
        extractor = CosyVoiceMelFeatureExtractor(**own | fields)
    elif arguments.pretrained is not None and not fields:
        extractor = CosyVoiceMelFeatureExtractor.from_pretrained(arguments.pretrained)
    else:
        hop = config.hop_length
        defaults = {"feature_size": config.num_mel_bins, "sampling_rate": config.sampling_rate, "hop_length": hop}
        high = None if config.is_causal else min(8000.0, config.sampling_rate / 2)
        extractor = CosyVoiceMelFeatureExtractor(**{**defaults, "fft_length": 4 * hop, "high_freq": high} | fields)
    for name, expected in (
        ("feature_size", config.num_mel_bins),
        ("sampling_rate", config.sampling_rate),
        ("hop_length", config.hop_length),
    ):
        if getattr(extractor, name) != expected:
            raise ValueError(
                f"feature_extractor.{name}: expected the vocoder's {expected}, found {getattr(extractor, name)}"
            )
    return extractor


def main(argv: Sequence[str]) -> None:
    """Run the recipe; see the module's docstring."""
    if not argv or not {"-h", "--help"}.isdisjoint(argv):
        print(__doc__)
        return
    import torch
    from transformers import set_seed

    import hf_speechllm  # noqa: F401  registers the model families
    from hf_speechllm.data.sources import read_sources
    from hf_speechllm.data.waveform_crops import WaveformCropDataset, collate_crops
    from hf_speechllm.train.discriminators import build_discriminators
    from hf_speechllm.train.gan_trainer import GanTrainer, GanTrainingArguments
    from hf_speechllm.train.summary import write_summary
    from hf_speechllm.train.vocoder_step import LOSS_WEIGHTS, VocoderStep, resynthesis_metrics

    recipe, overrides = (None, argv) if argv[0].startswith("--") else (argv[0], argv[1:])
    keys = [entry.name for entry in dataclasses.fields(GanTrainingArguments)] + ["resume"]
    run = load_run_config(recipe, overrides, keys, VocoderRun)
    options, resume = run.vocoder, run.training.pop("resume", False)
    args = GanTrainingArguments(**run.training)
    args.loss_weights = LOSS_WEIGHTS | args.loss_weights
    set_seed(args.seed)

    model = build_vocoder(run.model)
    config = model.config
    extractor = build_extractor(model, run.model, run.data.feature_extractor)
    step = VocoderStep(extractor, options.lowest_f0, options.highest_f0)
    train_set = WaveformCropDataset(
        read_sources(run.data.train, run.data.data_dir),
        options.crop_frames * config.hop_length,
        config.sampling_rate,
        args.seed,
        tuple(options.gain_db),
    )
    evaluate = None
    if run.data.validation:
        validation = read_sources(run.data.validation, run.data.data_dir)
        validation = validation[:: max(1, len(validation) // options.eval_utterances)][: options.eval_utterances]
        held_out = WaveformCropDataset(validation, 1, config.sampling_rate)
        samples = int(options.eval_seconds * config.sampling_rate)
        waveforms = [torch.from_numpy(held_out.waveform(index)[:samples]) for index in range(len(held_out))]
        evaluate = resynthesis_metrics(waveforms, step)

    judges = build_discriminators(options.discriminators, options.discriminator_shrink)
    sizes = {
        "recordings": len(train_set),
        "parameters": model.num_parameters(),
        "discriminator_parameters": sum(parameter.numel() for parameter in judges.parameters()),
    }
    print(json.dumps(sizes), flush=True)
    trainer = GanTrainer(
        model,
        step,
        args,
        train_set,
        collate_crops,
        discriminators=judges if options.discriminators else None,
        evaluate=evaluate,
        processing_class=extractor,
    )
    metrics = trainer.train(resume=resume)
    done = trainer.accelerator.unwrap_model(trainer.generator)
    if trainer.accelerator.is_main_process:
        if options.fold_weight_norm:
            done.fold_weight_norm()
            done.save_pretrained(args.output_dir)
        summary = {**sizes, **metrics, "seed": args.seed, "steps": trainer.step_number}
        write_summary(args.output_dir, summary)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])
