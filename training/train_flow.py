"""Train or fine-tune a flow of CosyVoice: speech tokens to a mel spectrogram.

    python training/train_flow.py training/recipes/cosyvoice_flow/digits.yaml --data_dir TOKENS --output_dir RUN
    python training/train_flow.py RECIPE.yaml --model.pretrained FLOW --max_steps 20000 --resume true

One YAML file describes one run (groups: model, data, lora, training); `--key value` overrides it. The rows are those
of `train_cosyvoice_lm.py` with the audio beside them: `speech_token`, `utt_embedding` or `spk_embedding`, and
`audio_data`, `wav` or `audio`. `output_dir` receives the checkpoints and, at its top level, the model that is done
with its feature extractor. `--resume true` goes on from the newest complete checkpoint and gives the same weights as a
run that was never stopped.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_speechllm.train.run_config import LoraArguments, load_run_config


if TYPE_CHECKING:
    from hf_speechllm.models.feature_extraction_cosyvoice_mel import CosyVoiceMelFeatureExtractor
    from hf_speechllm.models.token_to_mel import TokenToMelModel

# What the mel of each version is; `data.feature_extractor` overrides it.
MELS = {
    "cosyvoice_flow": {"sampling_rate": 22050, "fft_length": 1024, "hop_length": 256, "high_freq": 8000.0},
    "cosyvoice2_flow": {"sampling_rate": 24000, "fft_length": 1920, "hop_length": 480, "high_freq": 8000.0},
    "cosyvoice3_flow": {"sampling_rate": 24000, "fft_length": 1920, "hop_length": 480, "high_freq": None},
}


@dataclass
class FlowModelArguments:
    """The flow.

    Args:
        pretrained (`str`, *optional*): folder or Hub id to start from, of a flow or of a complete CosyVoice; without
            it a new model of `config` is made.
        model_type (`str`): of a new model: `"cosyvoice_flow"`, `"cosyvoice2_flow"` or `"cosyvoice3_flow"`.
        config (`dict`): fields of the configuration. With `pretrained` they override its own.
        freeze (`list[str]`): regular expressions of parameters that are not trained.
        trust_remote_code (`bool`): allow `pretrained` to bring code for a model type that is not installed.
    """

    pretrained: str | None = None
    model_type: str = "cosyvoice2_flow"
    config: dict[str, Any] = field(default_factory=dict)
    freeze: list[str] = field(default_factory=list)
    trust_remote_code: bool = False


@dataclass
class FlowDataArguments:
    """The data.

    Args:
        data_dir (`str`, *optional*): folder that relative paths start from, those of the audio as well.
        train, validation (`list[str]`): parquet or jsonl files.
        speaker_column (`str`): `"utt_embedding"`, or `"spk_embedding"` for fine-tuning on known speakers.
        feature_extractor (`dict`): arguments of `CosyVoiceMelFeatureExtractor`, over those of the version.
        min_frames, max_frames (`int`): recordings outside are left out.
        keep_mels (`bool`): keep the spectrograms in memory.
        eval_spectrograms (`int`): recordings of `validation` that are made from noise at every evaluation.
    """

    data_dir: str | None = None
    train: list[str] = field(default_factory=list)
    validation: list[str] = field(default_factory=list)
    speaker_column: str = "utt_embedding"
    feature_extractor: dict[str, Any] = field(default_factory=dict)
    min_frames: int = 1
    max_frames: int = 3000
    keep_mels: bool = True
    eval_spectrograms: int = 8


@dataclass
class FlowRunConfig:
    """The groups of a run file. `training` holds the fields of `SpeechTrainingArguments`, and `resume`."""

    model: FlowModelArguments = field(default_factory=FlowModelArguments)
    data: FlowDataArguments = field(default_factory=FlowDataArguments)
    lora: LoraArguments = field(default_factory=LoraArguments)
    training: dict[str, Any] = field(default_factory=dict)


def build_model(arguments: FlowModelArguments) -> "TokenToMelModel":
    """A pretrained flow, or a new one.

    Raises:
        ValueError: a model that is no flow.
    """
    from transformers import AutoConfig, AutoModel

    from hf_speechllm.train.cosyvoice_parts import is_complete_cosyvoice, load_cosyvoice_part

    if arguments.pretrained is None:
        if arguments.model_type not in MELS:
            raise ValueError(f"model_type: expected one of {sorted(MELS)}, found {arguments.model_type!r}")
        return AutoModel.from_config(AutoConfig.for_model(arguments.model_type, **arguments.config))
    trust = {"trust_remote_code": arguments.trust_remote_code}
    if is_complete_cosyvoice(arguments.pretrained, arguments.trust_remote_code):
        return load_cosyvoice_part(arguments.pretrained, "flow", arguments.config, **trust)
    config = AutoConfig.from_pretrained(arguments.pretrained, **trust, **arguments.config)
    if config.model_type not in MELS:
        expected = sorted([*MELS, "cosyvoice"])
        raise ValueError(f"model.pretrained: expected one of {expected}, found {config.model_type!r}")
    return AutoModel.from_pretrained(arguments.pretrained, config=config, **trust)


def build_extractor(
    model: "TokenToMelModel", arguments: FlowModelArguments, fields: dict[str, Any]
) -> "CosyVoiceMelFeatureExtractor":
    """The mel of the complete CosyVoice that the model is from, or that of the model's version; with these fields in
    place of its own."""
    from hf_speechllm.models.feature_extraction_cosyvoice_mel import CosyVoiceMelFeatureExtractor
    from hf_speechllm.train.cosyvoice_parts import cosyvoice_mel_fields, is_complete_cosyvoice

    own = {"feature_size": model.config.num_mel_bins, **MELS[model.config.model_type]}
    if is_complete_cosyvoice(arguments.pretrained, arguments.trust_remote_code):
        own = cosyvoice_mel_fields(arguments.pretrained, arguments.trust_remote_code)
    return CosyVoiceMelFeatureExtractor(**own | fields)


def main(argv: Sequence[str]) -> None:
    """Run the recipe; see the module's docstring."""
    if not argv or not {"-h", "--help"}.isdisjoint(argv):
        print(__doc__)
        return
    from transformers import set_seed

    import hf_speechllm  # noqa: F401  registers the model families
    from hf_speechllm.data.cosyvoice_flow_examples import TokenMelDataset, collate_token_mels, tokenized_recordings
    from hf_speechllm.train.averaging import average_checkpoints, select_checkpoints
    from hf_speechllm.train.flow_trainer import FlowTrainer
    from hf_speechllm.train.lora import freeze, lora_config
    from hf_speechllm.train.summary import write_summary
    from hf_speechllm.train.trainer import SpeechTrainingArguments
    from hf_speechllm.train.unit_lm_run import read_rows

    recipe, overrides = (None, argv) if argv[0].startswith("--") else (argv[0], argv[1:])
    keys = [entry.name for entry in fields(SpeechTrainingArguments)] + ["resume"]
    run = load_run_config(recipe, overrides, keys, FlowRunConfig)
    options = dict(run.training)
    resume = options.pop("resume", False)
    args = SpeechTrainingArguments(**{"remove_unused_columns": False, "report_to": "none"} | options)
    set_seed(args.seed)

    model = build_model(run.model)
    extractor = build_extractor(model, run.model, run.data.feature_extractor)
    version_1 = model.config.model_type == "cosyvoice_flow"
    ratio = None if version_1 else model.config.token_mel_ratio

    def dataset(paths: Sequence[str], **limits: int) -> TokenMelDataset:
        rows = tokenized_recordings(read_rows(paths, run.data.data_dir), run.data.data_dir, run.data.speaker_column)
        rate = model.config.input_frame_rate
        return TokenMelDataset(rows, extractor, ratio, rate, keep_mels=run.data.keep_mels, **limits)

    train_set = dataset(run.data.train, min_frames=run.data.min_frames, max_frames=run.data.max_frames)
    eval_set = dataset(run.data.validation) if run.data.validation else None
    freeze(model, run.model.freeze)
    if run.lora.rank > 0:
        from peft import get_peft_model

        targets, saved = run.lora.target_modules, run.lora.modules_to_save
        adapter = lora_config(run.lora.rank, run.lora.alpha, run.lora.dropout, targets, saved)
        model = get_peft_model(model, adapter)
    sizes = {
        "recordings": len(train_set),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }
    print(json.dumps(sizes), flush=True)

    trainer = FlowTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=collate_token_mels,
        processing_class=extractor,
        eval_spectrograms=run.data.eval_spectrograms,
    )
    summary = {**trainer.train(resume_from_checkpoint=resume).metrics, **sizes, "seed": args.seed}
    tuned = trainer.accelerator.unwrap_model(trainer.model)
    if args.average_checkpoints > 1:
        folders = select_checkpoints(args.output_dir, args.average_checkpoints, args.average_by)
        tuned.load_state_dict(average_checkpoints(folders), strict=run.lora.rank == 0)
        summary["averaged"] = [folder.name for folder in folders]
    if eval_set is not None:
        summary |= trainer.evaluate()
    trainer.save_model(args.output_dir)
    if args.should_save:
        if run.lora.rank > 0 and run.lora.merge:
            tuned.merge_and_unload().save_pretrained(Path(args.output_dir) / "merged")
            extractor.save_pretrained(Path(args.output_dir) / "merged")
        trainer.state.save_to_json(str(Path(args.output_dir) / "trainer_state.json"))
        write_summary(args.output_dir, summary)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1:])
