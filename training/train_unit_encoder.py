"""Train a small HuBERT with CTC, whose hidden states `fit_kmeans.py` cuts into speech units.

    python training/train_unit_encoder.py training/recipes/speechgpt_units/digits.yaml --data_dir DATA --output_dir RUN

For a language or a domain that no published HuBERT covers, or where none can be had. The units of a HuBERT that was
trained by masked prediction need no transcripts; these do, and in return carry the content of little data. The run
file has the groups of `train_asr.py`; `model.config` holds fields of transformers' `HubertConfig`, `model.pretrained`
names a `HubertForCTC` to go on from.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path


def main(argv: Sequence[str]) -> None:
    """Run the recipe; see the module's docstring."""
    if not argv or not {"-h", "--help"}.isdisjoint(argv):
        print(__doc__)
        return
    import torch
    from transformers import (
        HubertConfig,
        HubertForCTC,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2Processor,
        set_seed,
    )

    from hf_speechllm.data.sources import read_sources
    from hf_speechllm.data.waveform_dataset import SpeechWaveformDataset, collate_waveforms
    from hf_speechllm.models.feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor
    from hf_speechllm.train.averaging import average_checkpoints, select_checkpoints
    from hf_speechllm.train.ctc_vocabulary import character_tokenizer
    from hf_speechllm.train.metrics import recognition_metrics
    from hf_speechllm.train.run_config import load_run_config
    from hf_speechllm.train.summary import write_summary
    from hf_speechllm.train.trainer import SpeechRecognitionTrainer, SpeechTrainingArguments

    class UnitEncoderTrainer(SpeechRecognitionTrainer):
        """Evaluates by the best path of CTC: repeats and padding become blank (id 0), which `decode` drops."""

        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad():
                output = model(**inputs)
            best = output.logits.argmax(-1)
            lengths = model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(-1))
            silent = torch.arange(best.shape[1], device=best.device) >= lengths[:, None]
            silent[:, 1:] |= best[:, 1:] == best[:, :-1]
            return output.loss, best.masked_fill(silent, 0), inputs["labels"]

    recipe, overrides = (None, argv) if argv[0].startswith("--") else (argv[0], argv[1:])
    run = load_run_config(recipe, overrides, [entry.name for entry in fields(SpeechTrainingArguments)] + ["resume"])
    options = dict(run.training)
    resume = options.pop("resume", False)
    args = SpeechTrainingArguments(**{"remove_unused_columns": False, "report_to": "none"} | options)
    set_seed(args.seed)

    utterances = read_sources(run.data.train, run.data.data_dir)
    validation = read_sources(run.data.validation, run.data.data_dir)
    if run.model.pretrained is not None:
        tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(run.model.pretrained)
    else:
        tokenizer = character_tokenizer([utterance.text for utterance in utterances], Path(args.output_dir))
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    clock = KaldiFbankFeatureExtractor(sampling_rate=extractor.sampling_rate)
    limits = {"min_seconds": run.data.min_seconds, "max_seconds": run.data.max_seconds}
    train_set = SpeechWaveformDataset(
        utterances, clock, tokenizer, run.augmentation, args.seed, run.data.separator, **limits
    )
    eval_set = SpeechWaveformDataset(validation, clock, tokenizer) if validation else None

    if run.model.pretrained is not None:
        model = HubertForCTC.from_pretrained(run.model.pretrained)
    else:
        tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        model = HubertForCTC(HubertConfig(**tokens, ctc_zero_infinity=True, **run.model.config))
    print(json.dumps({"utterances": len(train_set), "parameters": model.num_parameters()}), flush=True)
    trainer = UnitEncoderTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=collate_waveforms,
        compute_metrics=recognition_metrics(tokenizer, run.data.metric),
        processing_class=Wav2Vec2Processor(extractor, tokenizer),
    )
    summary = dict(trainer.train(resume_from_checkpoint=resume).metrics)
    if args.average_checkpoints > 1:
        folders = select_checkpoints(args.output_dir, args.average_checkpoints, args.average_by)
        model.load_state_dict(average_checkpoints(folders))
        summary["averaged"] = [folder.name for folder in folders]
    if eval_set is not None:
        summary |= trainer.evaluate()
    trainer.save_model(args.output_dir)
    if args.should_save:
        write_summary(args.output_dir, summary)


if __name__ == "__main__":
    main(sys.argv[1:])
