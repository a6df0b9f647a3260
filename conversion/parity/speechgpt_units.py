"""Speech units against fairseq's HuBERT and SpeechGPT's `speech2unit.py`: every layer, pieces, ids, runs, strings."""

from pathlib import Path

import torch
from convert_speechgpt_units import convert_units_pack
from transformers import AutoFeatureExtractor, AutoModel

import hf_speechllm  # noqa: F401  registers the Auto classes
from hf_speechllm.models.unit_string import unit_string

from .case import Case


def check_units(case: Case, work: Path) -> None:
    """Convert the pack of `case` into `work` and check every expected value."""
    facts, tensors = case.facts, case.tensors
    case.rtol, tolerance = 0.0, float(facts["tolerance"]["features"])
    convert_units_pack(case.directory, work / "model", layer=facts["layer"])
    model = AutoModel.from_pretrained(work / "model").eval()
    extractor = AutoFeatureExtractor.from_pretrained(work / "model")
    case.compare("km_centers", model.codebook)

    waveform = tensors["wav"]
    case.use("wav")
    inputs = extractor(waveform[0].numpy(), sampling_rate=model.config.sampling_rate, return_tensors="pt")
    with torch.no_grad():
        for layer in range(1, len(model.hubert.encoder.layers) + 1):
            if f"layer_{layer}" in tensors:
                features = model(**inputs, layer=layer).last_hidden_state
                case.compare(f"layer_{layer}", features[0], atol=tolerance)
        if "final_no_layer" in tensors:
            samples = model._waveforms(inputs["input_values"], inputs["attention_mask"].sum(dim=1))
            last = model.hubert(samples).last_hidden_state
            case.compare("final_no_layer", last[0], atol=tolerance)
        # Upstream's way with a long recording: every piece as a recording of its own.
        pieces = {"max_chunk_samples": facts["max_chunk_of_features_chunked"], "seamless_chunks": False}
        features = model.extract_features(**inputs, **pieces)
        case.compare("features_chunked", features.last_hidden_state[0], atol=tolerance)
        case.compare("ids_chunked", model.encode(**inputs, **pieces).unit_ids[0])
        units = model.encode(**inputs)
    case.compare("ids", units.unit_ids[0])
    case.compare("dedup_ids", units.reduced_ids[0])
    case.compare("dedup_durations", units.durations[0])
    case.compare_value("merged_string", unit_string(units.reduced_ids[0]), facts["merged_string"])
    case.compare_value("unmerged_string", unit_string(units.unit_ids[0]), facts["unmerged_string"])
