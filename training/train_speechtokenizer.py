"""Train or fine-tune SpeechTokenizer: reconstruction, a semantic teacher, and discriminators.

    python training/train_speechtokenizer.py training/recipes/speechtokenizer/digits.yaml \\
        --data_dir DATA --teacher HUBERT --output_dir RUN
    python training/train_speechtokenizer.py RECIPE.yaml --pretrained CODEC --max_steps 100000 --resume true

One YAML file describes one run; `--key value` overrides it. `model.config` holds fields of `SpeechTokenizerConfig`,
`data` the sources as in `train_asr.py` (their text is not used), `training` the fields of `GanTrainingArguments` and
of `CodecArguments` below. The teacher is a HuBERT folder or Hub id; without one the codec has no semantic level.
`--resume true` goes on from the newest complete checkpoint, discriminators included. The folder `output_dir` receives
checkpoints, `log.jsonl` and, at its top level, the model that is done.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from hf_speechllm.models.modeling_speechtokenizer import SpeechTokenizerModel
    from hf_speechllm.train.run_config import RunConfig
    from hf_speechllm.train.semantic_teacher import SemanticTeacher


@dataclass
class CodecArguments:
    """What a run has besides the fields of `GanTrainingArguments`.

    Args:
        teacher (`str`, *optional*): folder or Hub id of the `HubertModel` that the first level imitates.
        teacher_layer (`int` or `str`): number of its layer, or `"mean"` of all.
        teacher_trust_remote_code (`bool`): allow it to bring code.
        distillation (`str`): `"d_axis"` or `"t_axis"`, see `train/distillation.py`.
        distillation_cosine_weight (`float`): of the cosine in `"t_axis"`.
        crop_seconds (`float`): length of a training item; rounded down to whole frames.
        gain_db (`list`): range of the random gain of an item, in dB.
        discriminators (`list[str]`), discriminator_shrink (`int`): see `build_discriminators`; none trains without.
        mel_weights (`list[float]`): weights of the mel spectrograms of 1024, 512, ... samples.
        eval_utterances (`int`): recordings of `data.validation` that are evaluated.
        resume (`bool` or `str`): go on from the newest complete checkpoint, or from the one named.
    """

    teacher: str | None = None
    teacher_layer: int | str = "mean"
    teacher_trust_remote_code: bool = False
    distillation: str = "d_axis"
    distillation_cosine_weight: float = 1.0
    crop_seconds: float = 3.0
    gain_db: list[float] = field(default_factory=lambda: [0.0, 0.0])
    discriminators: list[str] = field(default_factory=lambda: ["mpd", "msd", "msstftd"])
    discriminator_shrink: int = 1
    mel_weights: list[float] = field(default_factory=lambda: [45.0, 1.0, 1.0, 1.0])
    eval_utterances: int = 100
    resume: bool | str = False


def build_codec(run: "RunConfig", teacher_size: int | None) -> "SpeechTokenizerModel":
    """A pretrained codec, or a new one whose first level is projected to the size of the teacher.

    Raises:
        ValueError: a pretrained codec without weight norm, or one of another teacher's size.
    """
    from hf_speechllm.models.configuration_speechtokenizer import SpeechTokenizerConfig
    from hf_speechllm.models.modeling_speechtokenizer import SpeechTokenizerModel

    if run.model.pretrained is None:
        size = {} if teacher_size is None else {"semantic_hidden_size": teacher_size}
        return SpeechTokenizerModel(SpeechTokenizerConfig(**size | run.model.config))
    model = SpeechTokenizerModel.from_pretrained(run.model.pretrained, **run.model.config)
    if not model.config.use_weight_norm:
        raise ValueError(f"{run.model.pretrained}: use_weight_norm: expected true for training, found false")
    if teacher_size not in (None, model.config.semantic_hidden_size):
        raise ValueError(
            f"{run.model.pretrained}: semantic_hidden_size: expected the teacher's {teacher_size}, "
            f"found {model.config.semantic_hidden_size}"
        )
    return model


def load_teacher(options: CodecArguments, hop_length: int) -> "SemanticTeacher | None":
    """The teacher, or `None` if there is none."""
    from transformers import AutoModel

    from hf_speechllm.train.semantic_teacher import SemanticTeacher

    if options.teacher is None:
        return None
    model = AutoModel.from_pretrained(options.teacher, trust_remote_code=options.teacher_trust_remote_code)
    return SemanticTeacher(model, options.teacher_layer, hop_length)


def main(argv: Sequence[str]) -> None:
    """Run the recipe; see the module's docstring."""
    if not argv or not {"-h", "--help"}.isdisjoint(argv):
        print(__doc__)
        return
    import torch
    from transformers import AutoConfig, EncodecFeatureExtractor, set_seed

    import hf_speechllm  # noqa: F401  registers the model families
    from hf_speechllm.data.sources import read_sources
    from hf_speechllm.data.waveform_crops import WaveformCropDataset, collate_crops
    from hf_speechllm.train.discriminators import build_discriminators
    from hf_speechllm.train.gan_trainer import GanTrainer, GanTrainingArguments
    from hf_speechllm.train.mel_loss import MultiScaleMelLoss
    from hf_speechllm.train.run_config import load_run_config
    from hf_speechllm.train.speechtokenizer_step import LOSS_WEIGHTS, SpeechTokenizerStep, reconstruction_metrics
    from hf_speechllm.train.summary import write_summary

    recipe, overrides = (None, argv) if argv[0].startswith("--") else (argv[0], argv[1:])
    own = [entry.name for entry in dataclasses.fields(CodecArguments)]
    run = load_run_config(recipe, overrides, [entry.name for entry in dataclasses.fields(GanTrainingArguments)] + own)
    options = CodecArguments(**{name: run.training.pop(name) for name in own if name in run.training})
    args = GanTrainingArguments(**run.training)
    args.loss_weights = LOSS_WEIGHTS | args.loss_weights
    set_seed(args.seed)

    teacher_size = None
    if options.teacher is not None:
        trust = {"trust_remote_code": options.teacher_trust_remote_code}
        teacher_size = AutoConfig.from_pretrained(options.teacher, **trust).hidden_size
    model = build_codec(run, teacher_size)
    config = model.config
    frames = int(options.crop_seconds * config.sampling_rate) // config.hop_length
    train_set = WaveformCropDataset(
        read_sources(run.data.train, run.data.data_dir),
        frames * config.hop_length,
        config.sampling_rate,
        args.seed,
        tuple(options.gain_db),
    )
    mel_loss = MultiScaleMelLoss(config.sampling_rate, options.mel_weights)
    evaluate = None
    if run.data.validation:
        validation = read_sources(run.data.validation, run.data.data_dir)[: options.eval_utterances]
        held_out = WaveformCropDataset(validation, 1, config.sampling_rate)
        waveforms = [torch.from_numpy(held_out.waveform(index)) for index in range(len(held_out))]
        evaluate = reconstruction_metrics(waveforms, mel_loss)

    judges = build_discriminators(options.discriminators, options.discriminator_shrink)
    sizes = {
        "recordings": len(train_set),
        "parameters": model.num_parameters(),
        "discriminator_parameters": sum(parameter.numel() for parameter in judges.parameters()),
    }
    print(json.dumps(sizes), flush=True)
    trainer = GanTrainer(
        model,
        SpeechTokenizerStep(
            mel_loss,
            config.hop_length,
            load_teacher(options, config.hop_length),
            options.distillation,
            options.distillation_cosine_weight,
        ),
        args,
        train_set,
        collate_crops,
        discriminators=judges if options.discriminators else None,
        evaluate=evaluate,
        processing_class=EncodecFeatureExtractor(feature_size=1, sampling_rate=config.sampling_rate),
    )
    metrics = trainer.train(resume=options.resume)
    if trainer.accelerator.is_main_process:
        summary = {**sizes, **metrics, "seed": args.seed, "steps": trainer.step_number}
        write_summary(args.output_dir, summary)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])
