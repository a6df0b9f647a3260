"""Train a supervised speech tokenizer (S3): a CTC recogniser whose only way to the text leads through a quantiser.

    python training/train_s3_tokenizer.py training/recipes/s3_tokenizer/digits.yaml --data_dir DATA --output_dir RUN

The papers of CosyVoice put the quantiser into SenseVoice's encoder and train on its recognition loss; upstream never
released that training. Here the recogniser is `S3TokenizerForCTC`. The run file has the groups of `train_asr.py`;
`model.config` holds fields of `S3TokenizerConfig`, `model.pretrained` names a recogniser (`RUN/recogniser`) to go on
from. The folder `output_dir` receives checkpoints and `recogniser/`; at its top level lies the tokenizer alone, which
`AutoModel.from_pretrained` loads.

What is reported of the codebook on the validation set: `code_use`, the share of tokens that occur at all, and
`code_perplexity`, the number of equally frequent tokens with the same entropy. A recogniser that starts from nothing
behind a quantiser uses a handful of tokens and stays there: for `training.unquantized_steps` first steps the quantiser
lets everything through, then its coordinates are brought to unit variance and rounding begins.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from torch import Tensor


# Beside those of `SpeechTrainingArguments`.
_OWN_OPTIONS = ["resume", "unquantized_steps"]


def code_use(counts: "Tensor") -> dict[str, float]:
    """Share of used tokens, and perplexity, of how often each occurred `(codebook_size,)`."""
    frequencies = counts.double() / counts.sum().clamp_min(1)
    entropy = -(frequencies * frequencies.clamp_min(1e-12).log()).sum()
    return {"code_use": float((counts > 0).double().mean()), "code_perplexity": float(entropy.exp())}


def main(argv: Sequence[str]) -> None:
    """Run the recipe; see the module's docstring."""
    if not argv or not {"-h", "--help"}.isdisjoint(argv):
        print(__doc__)
        return
    import torch
    from transformers import AutoFeatureExtractor, TrainerCallback, Wav2Vec2CTCTokenizer, set_seed

    from hf_speechllm.data.sources import read_sources
    from hf_speechllm.data.waveform_dataset import SpeechWaveformDataset
    from hf_speechllm.models.configuration_s3_tokenizer import S3TokenizerConfig
    from hf_speechllm.models.feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor
    from hf_speechllm.models.feature_extraction_s3_tokenizer import S3FeatureExtractor
    from hf_speechllm.models.modeling_s3_tokenizer import S3TokenizerForCTC
    from hf_speechllm.train.averaging import average_checkpoints, select_checkpoints
    from hf_speechllm.train.ctc_vocabulary import character_tokenizer
    from hf_speechllm.train.metrics import recognition_metrics
    from hf_speechllm.train.run_config import load_run_config
    from hf_speechllm.train.summary import write_summary
    from hf_speechllm.train.trainer import SpeechRecognitionTrainer, SpeechTrainingArguments

    recipe, overrides = (None, argv) if argv[0].startswith("--") else (argv[0], argv[1:])
    run = load_run_config(recipe, overrides, [entry.name for entry in fields(SpeechTrainingArguments)] + _OWN_OPTIONS)
    options = dict(run.training)
    resume, unquantized_steps = options.pop("resume", False), options.pop("unquantized_steps", 0)
    args = SpeechTrainingArguments(**{"remove_unused_columns": False, "report_to": "none"} | options)
    set_seed(args.seed)
    output = Path(args.output_dir)

    utterances = read_sources(run.data.train, run.data.data_dir)
    validation = read_sources(run.data.validation, run.data.data_dir)
    if run.model.pretrained is not None:
        tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(run.model.pretrained)
        extractor = AutoFeatureExtractor.from_pretrained(run.model.pretrained)
        model = S3TokenizerForCTC.from_pretrained(run.model.pretrained)
    else:
        tokenizer = character_tokenizer([utterance.text for utterance in utterances], output)
        tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        model = S3TokenizerForCTC(S3TokenizerConfig(**tokens, **run.model.config))
        extractor = S3FeatureExtractor(feature_size=model.config.num_mel_bins)
    # It settles the sampling rate, and counts the frames of 10 ms that batches are made of.
    clock = KaldiFbankFeatureExtractor(sampling_rate=extractor.sampling_rate)
    limits = {"min_seconds": run.data.min_seconds, "max_seconds": run.data.max_seconds}
    train_set = SpeechWaveformDataset(
        utterances, clock, tokenizer, run.augmentation, args.seed, run.data.separator, normalize=False, **limits
    )
    eval_set = SpeechWaveformDataset(validation, clock, tokenizer, normalize=False) if validation else None

    def collate(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        features = extractor([item["input_values"] for item in items], sampling_rate=extractor.sampling_rate)
        labels = [item["labels"] for item in items]
        return dict(features) | {
            "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
        }

    class S3Trainer(SpeechRecognitionTrainer):
        """Evaluates by the best path of CTC, and counts the tokens on the way."""

        counts = torch.zeros(model.config.codebook_size, dtype=torch.long)

        def compute_loss(self, model, inputs, *positional, **named):
            if model.training and self.state.global_step < unquantized_steps:
                inputs = {**inputs, "quantize": False}
            return super().compute_loss(model, inputs, *positional, **named)

        def begin_to_quantize(self) -> None:
            first = collate([train_set[index] for index in range(min(64, len(train_set)))])
            first = {name: value.to(self.args.device) for name, value in first.items()}
            self.model.standardize_quantizer(first["input_features"], first["attention_mask"])

        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad():
                heard = model(**inputs)
            used = heard.token_ids[heard.token_mask].cpu()
            self.counts += torch.bincount(used, minlength=len(self.counts))
            best = heard.logits.argmax(-1)
            silent = torch.zeros_like(best, dtype=torch.bool)
            silent[:, 1:] = best[:, 1:] == best[:, :-1]
            return heard.loss, best.masked_fill(silent, tokenizer.pad_token_id), inputs["labels"]

        def evaluate(self, *positional, **named):
            self.counts.zero_()
            metrics = super().evaluate(*positional, **named)
            codes = {f"eval_{name}": value for name, value in code_use(self.counts).items()}
            self.log(codes)
            return metrics | codes

    print(json.dumps({"utterances": len(train_set), "parameters": model.num_parameters()}), flush=True)
    trainer = S3Trainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=collate,
        compute_metrics=recognition_metrics(tokenizer, run.data.metric),
    )

    class BeginToQuantize(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if unquantized_steps and state.global_step == unquantized_steps:
                trainer.begin_to_quantize()

    trainer.add_callback(BeginToQuantize())
    summary = dict(trainer.train(resume_from_checkpoint=resume).metrics)
    if args.average_checkpoints > 1:
        folders = select_checkpoints(args.output_dir, args.average_checkpoints, args.average_by)
        model.load_state_dict(average_checkpoints(folders))
        summary["averaged"] = [folder.name for folder in folders]
    if eval_set is not None:
        summary |= trainer.evaluate()
    if args.should_save:
        for folder, part in ((output / "recogniser", model), (output, model.tokenizer)):
            part.save_pretrained(folder)
            extractor.save_pretrained(folder)
        tokenizer.save_pretrained(output / "recogniser")
        summary["tokenizer_parameters"] = model.tokenizer.num_parameters()
        write_summary(output, summary)


if __name__ == "__main__":
    main(sys.argv[1:])
