"""Conversion of CosyVoice 1, 2 and 3 packs to transformers folders, and back.

    python conversion/convert_cosyvoice.py PACK OUT [--llm llm.rl.pt] [--tokenizer multilingual.tiktoken]
    python conversion/convert_cosyvoice.py PACK OUT --part llm|flow|hift|speech_tokenizer|campplus
    python conversion/convert_cosyvoice.py --reverse MODEL_FOLDER PACK

A complete pack holds `cosyvoice.yaml`, `cosyvoice2.yaml` or `cosyvoice3.yaml`, `llm.pt`, `flow.pt`, `hift.pt`,
`speech_tokenizer_v*.onnx`, `campplus.onnx`, and for versions 2 and 3 the folder `CosyVoice-BlankEN`; `spk2info.pt` may
be there; other files are left alone. A pack with one of the three networks alone, or `--part`, gives a folder of that
part. Version 1 takes its text tokens from Whisper's file `multilingual.tiktoken`, the 25 Hz model from upstream's
`multilingual_zh_ja_yue_char_del.tiktoken`. No published pack holds them: copy the file into the pack, name it, or have
a package installed that brings it (`whisper`, `funasr`; upstream's own, `cosyvoice`, has both).

A pack is untrusted: its yaml and its graphs are read as data, nothing in it is run. The folder that is written
appears complete or not at all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from hf_speechllm.models.configuration_cosyvoice import CosyVoiceConfig
from hf_speechllm.models.feature_extraction_cosyvoice import CosyVoiceFeatureExtractor
from hf_speechllm.models.modeling_cosyvoice import CosyVoiceForTextToWaveform
from hf_speechllm.models.processing_cosyvoice import CosyVoiceProcessor
from hf_speechllm.models.speakers_cosyvoice import SPEAKERS_NAME, CosyVoiceSpeaker, load_speakers
from hf_speechllm.upstream.checkpoint_file import compact, write_state_dict
from hf_speechllm.upstream.checkpoints import read_state_dict
from hf_speechllm.upstream.errors import ConversionError
from hf_speechllm.upstream.hyperpyyaml import read_hyperpyyaml
from hf_speechllm.upstream.json_config import read_json_mapping
from hf_speechllm.upstream.safetensors_file import read_safetensors, write_safetensors
from hf_speechllm.upstream.speaker_info import read_speaker_info
from hf_speechllm.upstream.staging import sha256_of_file, sha256_of_files, staged_directory, write_report


sys.path.insert(0, str(Path(__file__).resolve().parent))

import campplus
import cosyvoice_flow
import cosyvoice_hift
import cosyvoice_lm
import s3_tokenizer
from command_line import converter_parser, print_report
from cosyvoice_pack import QWEN_FOLDER, YAML_NAMES, find_yaml
from cosyvoice_tokenizer import build_tokenizer, find_text_tokens, read_whisper_tokens


NETWORKS = ("llm", "flow", "hift")
SPEAKER_FILE = "spk2info.pt"
MODEL_NAME = "model.safetensors"
# Each network's weights in ours, and where it lies in the configuration.
PREFIXES = {"llm": "lm", "flow": "flow", "hift": "vocoder"}
TRAINING_SCALARS = frozenset({"epoch", "step"})
# What `add_zero_shot_spk` of upstream keeps of a prompt; the lengths beside them say nothing new.
SPEAKER_PARTS = {
    "llm_prompt_speech_token": "speech_ids",
    "flow_prompt_speech_token": "speech_ids",
    "prompt_speech_feat": "mel",
    "prompt_text": "text_ids",
    "llm_embedding": "embedding",
    "flow_embedding": "embedding",
    "embedding": "embedding",
    # Of older files.
    "speech_token": "speech_ids",
    "speech_feat": "mel",
}


# ---------------------------------------------------------------------------------------------------------------------
# CosyVoice -> transformers


def convert_cosyvoice_pack(
    pack: str | Path, out_dir: str | Path, llm: str = "llm.pt", tokenizer: str | Path | None = None
) -> dict[str, object]:
    """Converts the folder `pack` to a folder `out_dir` that `AutoModelForTextToWaveform.from_pretrained` loads.

    Args:
        out_dir: must not exist or be empty; its parent must exist.
        llm: name of the language model's weights; `llm.rl.pt` is version 3's after reinforcement learning.
        tokenizer: tiktoken file of version 1, where it is neither in the pack nor in an installed package.
    Returns:
        The report, which is also written as `conversion_report.json`.
    Raises:
        ConversionError: a file, key, weight or shape that is missing or that the model does not have, named.
        UnsafeArtifactError: a file that is hostile or damaged.
    """
    pack = Path(pack)
    yaml_path = find_yaml(pack)
    version = YAML_NAMES.index(yaml_path.name) + 1
    settings = read_hyperpyyaml(yaml_path)
    graph_path = find_speech_tokenizer(pack, version)
    files = {"llm": pack / llm, "flow": pack / "flow.pt", "hift": pack / "hift.pt"}
    modules = {"llm": cosyvoice_lm, "flow": cosyvoice_flow, "hift": cosyvoice_hift}
    configs = {name: module.read_config(settings, yaml_path, pack) for name, module in modules.items()}
    speech_config, speech_weights = s3_tokenizer.read(graph_path)
    speaker_config, speaker_weights = campplus.read(pack / campplus.GRAPH_NAME)
    try:
        config = CosyVoiceConfig(
            version=version,
            lm_config=configs["llm"],
            flow_config=configs["flow"],
            vocoder_config=configs["hift"],
            speech_tokenizer_config=speech_config,
            speaker_encoder_config=speaker_config,
        )
    except ValueError as error:
        raise ConversionError("parts of the pack do not fit", file=pack, actual=str(error)) from None
    weights: dict[str, Tensor] = {}
    for name, module in modules.items():
        state = read_state_dict(files[name], allowed_scalars=TRAINING_SCALARS)
        part = module.convert_weights(state, configs[name], files[name])
        weights |= {f"{PREFIXES[name]}.{key}": tensor for key, tensor in part.items()}
    weights |= {f"speech_tokenizer.{key}": tensor for key, tensor in speech_weights.items()}
    weights |= {f"speaker_encoder.{key}": tensor for key, tensor in speaker_weights.items()}
    processor = build_processor(pack, settings, yaml_path, config, tokenizer)
    config.architectures = ["CosyVoiceForTextToWaveform"]
    config.dtype = torch.float32
    with torch.device("meta"):
        model = CosyVoiceForTextToWaveform(config)
    check_complete(model, weights, pack)
    inputs = [yaml_path, *files.values(), graph_path, pack / campplus.GRAPH_NAME]
    inputs += sorted((pack / QWEN_FOLDER).glob("*.json")) + [
        path for path in (pack / QWEN_FOLDER / "merges.txt", pack / SPEAKER_FILE) if path.exists()
    ]
    report: dict[str, object] = {
        "converter": "cosyvoice",
        "model_type": config.model_type,
        "version": version,
        "parameters": sum(tensor.numel() for tensor in weights.values()),
        "speakers": sorted(processor.speakers),
        "inputs": {path.relative_to(pack).as_posix(): sha256_of_file(path) for path in inputs},
    }
    with staged_directory(out_dir) as stage:
        # The weights are memory mapped and go from file to file.
        model.save_pretrained(stage, state_dict={})
        write_safetensors(stage / MODEL_NAME, weights)
        processor.save_pretrained(stage)
        write_report(stage, report)
    return report


def convert_part(pack: str | Path, out_dir: str | Path, part: str, llm: str = "llm.pt") -> dict[str, object]:
    """Converts one part of a pack to a folder of its own.

    Raises:
        ConversionError: see [`convert_cosyvoice_pack`].
    """
    pack, out_dir = Path(pack), Path(out_dir)
    if part == "llm":
        return cosyvoice_lm.convert(pack, out_dir, llm)
    if part in NETWORKS:
        return {"flow": cosyvoice_flow, "hift": cosyvoice_hift}[part].convert(pack, out_dir)
    if part == "speech_tokenizer":
        version = YAML_NAMES.index(find_yaml(pack).name) + 1
        return s3_tokenizer.convert(find_speech_tokenizer(pack, version), out_dir)
    return campplus.convert(pack / campplus.GRAPH_NAME, out_dir)


def find_speech_tokenizer(pack: Path, version: int) -> Path:
    """The graph of the speech tokenizer: that of the version, as upstream loads it, or else another one; of version
    3's two files, which hold the same weights, the first.

    Raises:
        ConversionError: none.
    """
    found = [pack / name for name in s3_tokenizer.GRAPH_NAMES if (pack / name).exists()]
    found.sort(key=lambda path: not path.name.startswith(f"speech_tokenizer_v{version}."))
    if not found:
        raise ConversionError(
            "no speech tokenizer", file=pack, expected=f"one of {', '.join(s3_tokenizer.GRAPH_NAMES)}"
        )
    return found[0]


def build_processor(
    pack: Path, settings: dict[str, object], yaml_path: Path, config: CosyVoiceConfig, tokenizer: str | Path | None
) -> CosyVoiceProcessor:
    """Tokenizer, feature extractor and speakers of a pack."""
    mel = cosyvoice_hift.read_extractor(settings, config.vocoder_config, yaml_path)
    extractor = CosyVoiceFeatureExtractor(
        feature_size=mel.feature_size,
        sampling_rate=mel.sampling_rate,
        fft_length=mel.fft_length,
        hop_length=mel.hop_length,
        high_freq=mel.high_freq,
        tokenizer_mel_bins=config.speech_tokenizer_config.num_mel_bins,
        speaker_mel_bins=config.speaker_encoder_config.num_mel_bins,
    )
    text = build_tokenizer(pack, settings, yaml_path, config, tokenizer)
    processor = CosyVoiceProcessor(extractor, text, version=config.version)
    if (pack / SPEAKER_FILE).exists():
        bins = config.flow_config.num_mel_bins
        for name, parts in read_speaker_info(pack / SPEAKER_FILE).items():
            processor.speakers[name] = convert_speaker(parts, bins, pack / SPEAKER_FILE, name)
    return processor


def needs_text_tokens(pack: str | Path) -> bool:
    """Whether a pack of version 1 has a file of text tokens nowhere, so that it must be given.

    Raises:
        ConversionError: see [`convert_cosyvoice_pack`].
    """
    pack = Path(pack)
    yaml_path = find_yaml(pack)
    if yaml_path.name != YAML_NAMES[0]:
        return False
    settings = read_hyperpyyaml(yaml_path)
    rate = cosyvoice_flow.read_config(settings, yaml_path, pack).input_frame_rate
    return find_text_tokens(pack, read_whisper_tokens(settings, yaml_path, rate).file_name) is None


def convert_speaker(parts: dict[str, Tensor], num_mel_bins: int, path: Path, name: str) -> CosyVoiceSpeaker:
    """One entry of `spk2info.pt`.

    Raises:
        ConversionError: an unknown part, parts that contradict each other, or no embedding.
    """
    found: dict[str, Tensor] = {}
    for key, value in parts.items():
        if key.removesuffix("_len") in SPEAKER_PARTS and key.endswith("_len"):
            continue
        if key not in SPEAKER_PARTS:
            raise ConversionError("unknown part of a speaker", file=path, key=f"{name}.{key}")
        if value.dim() < 1 or value.shape[0] != 1:
            raise ConversionError(
                "shape", file=path, key=f"{name}.{key}", expected="(1, …)", actual=tuple(value.shape)
            )
        part = SPEAKER_PARTS[key]
        value = value[0].float() if part in ("mel", "embedding") else value[0].long()
        if part in found and not torch.equal(found[part], value):
            raise ConversionError("parts of a speaker differ", file=path, key=f"{name}.{key}")
        found[part] = value
    if "embedding" not in found:
        raise ConversionError("speaker without an embedding", file=path, key=name)
    mel = found.setdefault("mel", torch.zeros(0, num_mel_bins))
    if mel.dim() != 2 or mel.shape[1] != num_mel_bins or any(v.dim() != 1 for k, v in found.items() if k != "mel"):
        shapes = {key: tuple(value.shape) for key, value in found.items()}
        raise ConversionError("shapes of a speaker", file=path, key=name, actual=shapes)
    return CosyVoiceSpeaker(**found)


def check_complete(model: CosyVoiceForTextToWaveform, weights: dict[str, Tensor], pack: Path) -> None:
    """Every weight of the whole is there, and nothing else; the parts have compared their shapes."""
    expected = model.state_dict().keys()
    for name in sorted(expected ^ weights.keys()):
        problem = "weight is missing" if name in expected else "unknown weight"
        raise ConversionError(problem, file=pack, key=name)


# ---------------------------------------------------------------------------------------------------------------------
# transformers -> CosyVoice


def export_cosyvoice_pack(model_dir: str | Path, pack_dir: str | Path) -> dict[str, object]:
    """Writes the networks of the model folder `model_dir`, whole or a part, as upstream loads them.

    Of a complete model: `llm.pt`, `flow.pt`, `hift.pt`, `spk2info.pt` and, for versions 2 and 3, the Qwen2 in
    `CosyVoice-BlankEN` without its tokenizer. The graphs of the speech tokenizer and the speaker encoder, which
    fine-tuning leaves alone, and the yaml are those of the pack that the model came from.

    Raises:
        ConversionError: the folder is none of such a model, or `pack_dir` is in the way.
    """
    model_dir, pack_dir = Path(model_dir), Path(pack_dir)
    kind = read_json_mapping(model_dir / "config.json").get("model_type")
    for module, kinds in (
        (cosyvoice_lm, ("cosyvoice_lm", "cosyvoice_transformer_lm")),
        (cosyvoice_flow, ("cosyvoice_flow", "cosyvoice2_flow", "cosyvoice3_flow")),
        (cosyvoice_hift, ("cosyvoice_hift", "cosyvoice3_hift")),
    ):
        if kind in kinds:
            return module.restore(model_dir, pack_dir)
    if kind != "cosyvoice":
        raise ConversionError("another model", file=model_dir, key="model_type", expected="cosyvoice…", actual=kind)
    try:
        config = CosyVoiceConfig.from_pretrained(model_dir, local_files_only=True)
    except ValueError as error:
        raise ConversionError("contradictory configuration", file=model_dir, actual=str(error)) from None
    weights = dict(read_weights(model_dir))
    modules = {"llm": (cosyvoice_lm, config.lm_config), "flow": (cosyvoice_flow, config.flow_config)}
    modules["hift"] = (cosyvoice_hift, config.vocoder_config)
    with staged_directory(pack_dir) as stage:
        for name, (module, part_config) in modules.items():
            prefix = f"{PREFIXES[name]}."
            part = {key.removeprefix(prefix): tensor for key, tensor in weights.items() if key.startswith(prefix)}
            state = module.restore_weights(part, part_config)
            write_state_dict(stage / f"{name}.pt", compact(state))
            if name == "llm" and config.version != 1:
                cosyvoice_lm.write_qwen_folder(stage / QWEN_FOLDER, state, part_config)
        if (model_dir / SPEAKERS_NAME).exists():
            speakers = load_speakers(model_dir / SPEAKERS_NAME)
            torch.save({name: upstream_speaker(speaker) for name, speaker in speakers.items()}, stage / SPEAKER_FILE)
        outputs = sha256_of_files(stage)
    return {"converter": "cosyvoice", "direction": "reverse", "outputs": outputs}


def read_weights(model_dir: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights of a folder, of one file or of several.

    Raises:
        ConversionError: no file of weights.
    """
    paths = sorted(model_dir.glob("model*.safetensors"))
    if not paths:
        raise ConversionError("no weights", file=model_dir, expected=MODEL_NAME)
    for path in paths:
        yield from read_safetensors(path).items()


def upstream_speaker(speaker: CosyVoiceSpeaker) -> dict[str, Tensor]:
    """An entry of `spk2info.pt`: the embedding alone, or all that a zero-shot prompt is."""
    embedding = speaker.embedding[None].clone()
    if not len(speaker.speech_ids):
        return {"embedding": embedding}
    entry: dict[str, Tensor] = {"llm_embedding": embedding, "flow_embedding": embedding}
    parts = {
        "prompt_text": speaker.text_ids[None].int(),
        "llm_prompt_speech_token": speaker.speech_ids[None].int(),
        "flow_prompt_speech_token": speaker.speech_ids[None].int(),
        "prompt_speech_feat": speaker.mel[None].clone(),
    }
    for name, value in parts.items():
        entry |= {name: value, f"{name}_len": torch.tensor([value.shape[1]], dtype=torch.int32)}
    return entry


def main(arguments: list[str] | None = None) -> int:
    """Command line, see `print_report`."""
    parser = converter_parser(__doc__, "write upstream's files from a model folder")
    parser.add_argument("--part", choices=(*NETWORKS, "speech_tokenizer", "campplus"), help="convert this part alone")
    parser.add_argument("--llm", default="llm.pt", help="weights of the language model: llm.pt or llm.rl.pt")
    parser.add_argument("--tokenizer", type=Path, help="tiktoken file of version 1; searched if it is not given")
    options = parser.parse_args(arguments)
    source, destination = options.source, options.destination
    if options.reverse:
        return print_report(lambda: export_cosyvoice_pack(source, destination))
    part = options.part or only_network(source)
    if part is not None:
        return print_report(lambda: convert_part(source, destination, part, options.llm))
    return print_report(lambda: convert_cosyvoice_pack(source, destination, options.llm, options.tokenizer))


def only_network(pack: Path) -> str | None:
    """The network of a pack that holds one alone."""
    found = [name for name in NETWORKS if (pack / f"{name}.pt").exists()]
    return found[0] if len(found) == 1 else None


if __name__ == "__main__":
    sys.exit(main())
