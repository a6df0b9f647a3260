"""Fit a codebook of speech units to a layer of a HuBERT.

    python training/fit_kmeans.py HUBERT OUT --data DATA/digits/train --layer 2 --num_units 100
    python training/fit_kmeans.py facebook/hubert-base-ls960 OUT --data A.jsonl KALDI_DIR --layer 9 --num_units 500

HUBERT is a folder or Hub id of a `HubertModel` (or of a model with one inside, as `HubertForCTC`), or of a
`speechgpt_units` model, whose codebook is fitted anew. Data: audiofolders, .jsonl files or Kaldi folders. OUT becomes
a `speechgpt_units` model with its feature extractor. The same seed gives the same codebook.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from torch import Tensor
    from transformers import HubertModel

    from hf_speechllm.data.manifests import Utterance
    from hf_speechllm.models.modeling_speechgpt_units import SpeechGptUnitsModel

# Nothing of these happens while units are computed.
_TRAINING_ONLY = (
    *("activation_dropout", "attention_dropout", "feat_proj_dropout", "final_dropout", "hidden_dropout", "layerdrop"),
    *("mask_feature_prob", "mask_time_prob"),
)


def units_model(
    hubert: "HubertModel", layer: int, num_units: int, normalize: bool, keep_all_layers: bool = False
) -> "SpeechGptUnitsModel":
    """A units model over a HuBERT, with a codebook that means nothing yet.

    Args:
        hubert: its weights are shared, not copied.
        layer: from 1. num_units: rows of the codebook.
        normalize: whether the network was trained on waveforms of mean 0 and variance 1.
        keep_all_layers: keep those after `layer`, which the units do not need.
    """
    from hf_speechllm.models.configuration_speechgpt_units import SpeechGptUnitsConfig
    from hf_speechllm.models.modeling_speechgpt_units import SpeechGptUnitsModel

    fields = hubert.config.to_dict() | dict.fromkeys(_TRAINING_ONLY, 0.0)
    for name in ("_name_or_path", "architectures", "dtype", "id2label", "label2id", "transformers_version"):
        fields.pop(name, None)
    if not keep_all_layers:
        fields["num_hidden_layers"] = layer
    config = SpeechGptUnitsConfig(
        hubert_config=fields, layer=layer, num_units=num_units, normalize=normalize, normalize_eps=1e-7
    )
    model = SpeechGptUnitsModel(config)
    wanted = model.hubert.state_dict().keys()
    weights = {name: tensor for name, tensor in hubert.state_dict().items() if name in wanted}
    model.hubert.load_state_dict(weights, assign=True)
    return model.eval()


def load_units_model(arguments: argparse.Namespace) -> "SpeechGptUnitsModel":
    """The model that the arguments name, ready for a codebook of `num_units` rows.

    Raises:
        SystemExit: neither a HuBERT nor a units model, or no word on how waveforms enter it.
    """
    from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, HubertModel

    trust = {"trust_remote_code": arguments.trust_remote_code}
    config = AutoConfig.from_pretrained(arguments.model, **trust)
    if config.model_type == "speechgpt_units":
        known = AutoModel.from_pretrained(arguments.model, **trust)
        layer = known.config.layer if arguments.layer is None else arguments.layer
        normalize = known.config.normalize if arguments.normalize is None else arguments.normalize == "true"
        model = units_model(known.hubert, layer, arguments.num_units, normalize, arguments.keep_all_layers)
        model.config.normalize_eps = known.config.normalize_eps
        return model
    if config.model_type != "hubert":
        raise SystemExit(f"{arguments.model}: expected a hubert or speechgpt_units model, found {config.model_type}")
    if arguments.layer is None:
        raise SystemExit("--layer: expected the number of a layer, from 1")
    if arguments.normalize is not None:
        normalize = arguments.normalize == "true"
    else:
        try:
            normalize = AutoFeatureExtractor.from_pretrained(arguments.model).do_normalize
        except OSError:
            raise SystemExit(
                f"{arguments.model}: expected a feature extractor that says whether waveforms are normalised, found "
                "none; say it by --normalize true or false"
            ) from None
    hubert = HubertModel.from_pretrained(arguments.model)
    return units_model(hubert, arguments.layer, arguments.num_units, normalize, arguments.keep_all_layers)


def collect_frames(
    model: "SpeechGptUnitsModel",
    utterances: "Sequence[Utterance]",
    max_frames: int,
    batch_seconds: float = 60.0,
    seed: int = 0,
) -> "Tensor":
    """Frames of the model's layer, `(n, d)` float32 on the CPU: all of them, or `max_frames` drawn uniformly."""
    import torch
    from tqdm import tqdm

    from hf_speechllm.data.waveform_batches import waveform_batches

    generator = torch.Generator().manual_seed(seed)
    frames, lots, held = [], [], 0
    with torch.no_grad(), tqdm(total=len(utterances), unit="utterance") as bar:
        for batch in waveform_batches(utterances, model.config.sampling_rate, batch_seconds):
            inputs = (batch.input_values.to(model.device), batch.attention_mask.to(model.device))
            features = model.extract_features(*inputs)
            found = features.last_hidden_state[features.attention_mask].float().cpu()
            frames.append(found)
            lots.append(torch.rand(len(found), generator=generator))
            held += len(found)
            if held > 2 * max_frames:  # those with the lowest lots so far are a uniform sample of what has come
                frames, lots, held = _lowest(frames, lots, max_frames)
            bar.update(len(batch.indices))
    if held > max_frames:
        frames, lots, held = _lowest(frames, lots, max_frames)
    return torch.cat(frames)


def _lowest(frames: "list[Tensor]", lots: "list[Tensor]", count: int) -> "tuple[list[Tensor], list[Tensor], int]":
    import torch

    all_lots = torch.cat(lots)
    kept = all_lots.topk(count, largest=False, sorted=False).indices.sort().values
    return [torch.cat(frames)[kept]], [all_lots[kept]], count


def main(argv: Sequence[str]) -> None:
    """Fit and save; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a HuBERT or of a units model")
    parser.add_argument("output", type=Path, help="folder of the units model")
    parser.add_argument("--data", nargs="+", required=True, help="audiofolders, .jsonl files or Kaldi folders")
    parser.add_argument("--where", nargs="*", default=[], metavar="COLUMN=VALUE[,VALUE]", help="keep these rows")
    parser.add_argument("--layer", type=int, help="layer that is quantised, from 1; default: that of a units model")
    parser.add_argument("--num_units", type=int, required=True, help="rows of the codebook")
    parser.add_argument("--normalize", choices=("true", "false"), help="waveforms to mean 0 and variance 1")
    parser.add_argument("--keep_all_layers", action="store_true", help="also those after the one that is quantised")
    parser.add_argument("--max_frames", type=int, default=2_000_000, help="frames that are clustered at most")
    parser.add_argument("--batch_seconds", type=float, default=60.0, help="audio of one batch, padding included")
    parser.add_argument("--batch_size", type=int, default=10_000, help="frames of a mini-batch")
    parser.add_argument("--max_epochs", type=int, default=100)
    parser.add_argument("--patience", type=int, default=100, help="mini-batches without progress before it ends")
    parser.add_argument("--starts", type=int, default=3, help="k-means++ starts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trust_remote_code", action="store_true")
    arguments = parser.parse_args(argv)

    import torch
    from transformers import Wav2Vec2FeatureExtractor

    import hf_speechllm  # noqa: F401  registers the model families
    from hf_speechllm.data.manifests import parse_filters, read_manifest
    from hf_speechllm.train.kmeans import fit_kmeans

    where = parse_filters(arguments.where)
    utterances = [item for source in arguments.data for item in read_manifest(source, where=where)]
    model = load_units_model(arguments).to(arguments.device)
    frames = collect_frames(model, utterances, arguments.max_frames, arguments.batch_seconds, arguments.seed)
    result = fit_kmeans(
        frames.to(arguments.device),
        arguments.num_units,
        batch_size=arguments.batch_size,
        max_epochs=arguments.max_epochs,
        patience=arguments.patience,
        starts=arguments.starts,
        seed=arguments.seed,
        report=lambda epoch, inertia: print(json.dumps({"epoch": epoch, "inertia": inertia}), flush=True),
    )
    with torch.no_grad():
        model.codebook.copy_(result.centres)
    model.cpu().save_pretrained(arguments.output)
    rate = model.config.sampling_rate
    Wav2Vec2FeatureExtractor(sampling_rate=rate, do_normalize=False, return_attention_mask=True).save_pretrained(
        arguments.output
    )
    summary = {
        "utterances": len(utterances),
        "frames": len(frames),
        "layer": model.config.layer,
        "num_units": arguments.num_units,
        "inertia": result.inertia,
        "variance": float(frames.var(dim=0, correction=0).sum()),
        "used_units": int((result.counts > 0).sum()),
        "perplexity": result.perplexity,
        "batches": result.batches,
        "seed": arguments.seed,
    }
    (arguments.output / "kmeans.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
