"""Train a speaker encoder (CAM++) as a classifier of speakers, with an additive angular margin.

    python training/train_speaker_encoder.py training/recipes/campplus/digits.yaml --data_dir DATA --output_dir RUN
    python training/train_speaker_encoder.py RECIPE.yaml --pretrained CAMPPLUS --data.train '[my_data.jsonl]'

Every source must name the speakers of its clips; their texts play no part. One YAML file describes one run, with the
groups of `train_asr.py`: `model.config` holds fields of `CampplusConfig`, `model.pretrained` names an encoder to go
on from, `training` also has the fields of `SpeakerArguments` below. The folder `output_dir` receives checkpoints and,
at its top level, the encoder alone, which `AutoModel.from_pretrained` loads, with its feature extractor.

What is reported of whole recordings of the validation set, in percent: `eer`, the equal error rate over all pairs of
recordings by the cosine of their embeddings; `eer_unseen`, the same for those speakers who are not trained on; and
`accuracy`, of the classification of those who are. Where there are no such speakers, or no pairs, a figure is left
out.

`CampplusModel` has biases where upstream, in training, has a norm behind every convolution. For a few hundred thousand
parameters the norms that are left (before every dense layer and every transition, and behind the embedding) are
enough, if the convolutions start from weights that keep the scale of the signal (`initialize_convolutions`).
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class SpeakerArguments:
    """What a run has besides the fields of `SpeechTrainingArguments`.

    Args:
        crop_seconds (`float`): length of a training item.
        scale (`float`), margin (`float`, radians): of the softmax, see `angular_margin_logits`.
        speeds_are_speakers (`bool`): each of `augmentation.speeds` makes other speakers of all, as in 3D-Speaker.
        resume (`bool` or `str`): go on from the newest complete checkpoint, or from the one named.
    """

    crop_seconds: float = 2.0
    scale: float = 30.0
    margin: float = 0.2
    speeds_are_speakers: bool = False
    resume: bool | str = False


def verification_metrics(embeddings: "Tensor", labels: "Tensor", best: "Tensor", num_known: int) -> dict[str, float]:
    """Figures of a validation set, in percent.

    Args:
        embeddings (`(n, d)`), labels (`(n,)`): of the recordings; labels from `num_known` on are of unknown speakers.
        best (`(n,)`): the known speaker that each recording was taken for.
    """
    from hf_speechllm.eval.speaker_verification import all_pairs, equal_error_rate

    figures = {}
    known = labels < num_known
    for name, rows in (("eer", labels >= 0), ("eer_unseen", ~known)):
        scores, is_same = all_pairs(embeddings[rows], labels[rows].tolist())
        if is_same.any() and not is_same.all():
            figures[name] = 100.0 * equal_error_rate(scores, is_same)[0]
    if known.any():
        figures["accuracy"] = 100.0 * float((best == labels)[known].double().mean())
    return figures


def main(argv: Sequence[str]) -> None:
    """Run the recipe; see the module's docstring."""
    if not argv or not {"-h", "--help"}.isdisjoint(argv):
        print(__doc__)
        return
    import torch
    from transformers import set_seed

    from hf_speechllm.data.speaker_crops import SpeakerCropDataset, SpeakerRecordings, read_speaker_sources
    from hf_speechllm.models.configuration_campplus import CampplusConfig
    from hf_speechllm.models.feature_extraction_campplus import CampplusFeatureExtractor
    from hf_speechllm.models.feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor
    from hf_speechllm.models.modeling_campplus import CampplusModel
    from hf_speechllm.train.averaging import average_checkpoints, select_checkpoints
    from hf_speechllm.train.run_config import load_run_config
    from hf_speechllm.train.speaker_classifier import SpeakerClassifier, initialize_convolutions
    from hf_speechllm.train.summary import write_summary
    from hf_speechllm.train.trainer import SpeechRecognitionTrainer, SpeechTrainingArguments

    recipe, overrides = (None, argv) if argv[0].startswith("--") else (argv[0], argv[1:])
    own = [entry.name for entry in dataclasses.fields(SpeakerArguments)]
    known = [entry.name for entry in dataclasses.fields(SpeechTrainingArguments)]
    run = load_run_config(recipe, overrides, known + own)
    options = SpeakerArguments(**{name: run.training.pop(name) for name in own if name in run.training})
    args = SpeechTrainingArguments(**{"remove_unused_columns": False, "report_to": "none"} | run.training)
    set_seed(args.seed)

    utterances = read_speaker_sources(run.data.train, run.data.data_dir)
    validation = read_speaker_sources(run.data.validation, run.data.data_dir)
    speakers = sorted({item.speaker for item in utterances})
    if run.model.pretrained is not None:
        encoder = CampplusModel.from_pretrained(run.model.pretrained, **run.model.config)
    else:
        encoder = CampplusModel(CampplusConfig(**run.model.config))
        initialize_convolutions(encoder)
    extractor = CampplusFeatureExtractor(feature_size=encoder.config.num_mel_bins)
    rate = extractor.sampling_rate
    train_set = SpeakerCropDataset(
        utterances,
        speakers,
        KaldiFbankFeatureExtractor(sampling_rate=rate),
        int(options.crop_seconds * rate),
        run.augmentation,
        args.seed,
        options.speeds_are_speakers,
        run.data.min_seconds,
        run.data.max_seconds,
    )
    eval_set = SpeakerRecordings(validation, speakers, rate) if validation else None
    model = SpeakerClassifier(encoder, len(speakers) * train_set.variants, options.scale, options.margin)

    def collate(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        features = extractor([item["waveform"] for item in items], sampling_rate=rate)
        return dict(features) | {"labels": torch.stack([item["label"] for item in items])}

    class SpeakerTrainer(SpeechRecognitionTrainer):
        """Evaluates by embeddings; the margin and the classes of other speeds are of the training alone."""

        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad():
                heard = model(inputs["input_features"], inputs["attention_mask"])
            best = heard.logits.argmax(-1) // train_set.variants
            return None, (heard.embeddings.float(), best), inputs["labels"]

    def metrics(prediction) -> dict[str, float]:
        embeddings, best = map(torch.from_numpy, prediction.predictions)
        return verification_metrics(embeddings, torch.from_numpy(prediction.label_ids), best, len(speakers))

    sizes = {
        "utterances": len(train_set),
        "speakers": len(speakers),
        "classes": len(model.centres),
        "parameters": encoder.num_parameters(),
    }
    print(json.dumps(sizes), flush=True)
    trainer = SpeakerTrainer(
        model=model,
        args=args,
        train_dataset=train_set,
        eval_dataset=eval_set,
        data_collator=collate,
        compute_metrics=metrics,
    )
    summary = sizes | dict(trainer.train(resume_from_checkpoint=options.resume).metrics)
    if args.average_checkpoints > 1:
        folders = select_checkpoints(args.output_dir, args.average_checkpoints, args.average_by)
        model.load_state_dict(average_checkpoints(folders))
        summary["averaged"] = [folder.name for folder in folders]
    if eval_set is not None:
        summary |= trainer.evaluate()
    if args.should_save:
        output = Path(args.output_dir)
        encoder.save_pretrained(output)
        extractor.save_pretrained(output)
        write_summary(output, summary)


if __name__ == "__main__":
    main(sys.argv[1:])
