"""FunASR from a checkout that the caller names, as the peer to measure against. Nothing of it is part of this project.

Its `AutoModel` needs torchaudio, librosa, kaldiio, omegaconf, hydra-core and sentencepiece (installed anywhere on the
path). Modules of other models that miss something else are skipped by the package itself.
"""

import contextlib
import importlib
import io
import json
import struct
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import PreTrainedModel

from hf_speechllm.models.pipeline_speech_recognition import SpeechRecognitionPipeline
from hf_speechllm.upstream.nnet_mvn import write_nnet_mvn


RATE = 16000
# Made-up normalisation of the 560 features, about that of the published packs.
_SHIFT, _SCALE = -12.0, 0.2
# Which pieces of the published SenseVoice vocabulary are tags; upstream's code knows their ids.
_TAGS = {
    **{24884: "zh", 24885: "en", 24888: "yue", 24892: "ja", 24896: "ko", 24992: "nospeech"},
    **{25001: "HAPPY", 25002: "SAD", 25003: "ANGRY", 25004: "NEUTRAL", 25009: "EMO_UNKNOWN"},
    **{24993: "Speech", 24995: "BGM", 24997: "Laughter", 24999: "Applause"},
    **{25016: "withitn", 25017: "woitn"},
}
_SENSEVOICE_PIECES = 25055
_PARAFORMER_TOKENS = 8404

_SANM_ENCODER = {
    "output_size": 512,
    "attention_heads": 4,
    "linear_units": 2048,
    "num_blocks": 50,
    "dropout_rate": 0.1,
    "positional_dropout_rate": 0.1,
    "attention_dropout_rate": 0.1,
    "input_layer": "pe",
    "normalize_before": True,
    "kernel_size": 11,
    "sanm_shfit": 0,
    "selfattention_layer_type": "sanm",
}
# Without the noise that upstream adds by default, which no two runs share.
_FRONT_END = {
    "frontend": "WavFrontend",
    "frontend_conf": {
        "fs": RATE,
        "window": "hamming",
        "n_mels": 80,
        "frame_length": 25,
        "frame_shift": 10,
        "lfr_m": 7,
        "lfr_n": 6,
        "dither": 0.0,
    },
    "normalize": None,
}
# The published shapes: `models/paraformer/template.yaml`, and the file that comes with SenseVoice-Small.
SETTINGS: dict[str, dict[str, Any]] = {
    "Paraformer-large": {
        "model": "Paraformer",
        "model_conf": {
            "ctc_weight": 0.0,
            "lsm_weight": 0.1,
            "length_normalized_loss": True,
            "predictor_weight": 1.0,
            "predictor_bias": 1,
            "sampling_ratio": 0.75,
        },
        "encoder": "SANMEncoder",
        "encoder_conf": _SANM_ENCODER,
        "decoder": "ParaformerSANMDecoder",
        "decoder_conf": {
            "attention_heads": 4,
            "linear_units": 2048,
            "num_blocks": 16,
            "att_layer_num": 16,
            "dropout_rate": 0.1,
            "positional_dropout_rate": 0.1,
            "self_attention_dropout_rate": 0.1,
            "src_attention_dropout_rate": 0.1,
            "kernel_size": 11,
            "sanm_shfit": 0,
        },
        "predictor": "CifPredictorV2",
        "predictor_conf": {"idim": 512, "threshold": 1.0, "l_order": 1, "r_order": 1, "tail_threshold": 0.45},
        "tokenizer": "CharTokenizer",
        "tokenizer_conf": {"unk_symbol": "<unk>", "split_with_space": True},
        "ctc_conf": {"dropout_rate": 0.0, "ctc_type": "builtin", "reduce": True, "ignore_nan_grad": True},
        **_FRONT_END,
    },
    "SenseVoice-Small": {
        "model": "SenseVoiceSmall",
        "model_conf": {"length_normalized_loss": True, "sos": 1, "eos": 2, "ignore_id": -1},
        "encoder": "SenseVoiceEncoderSmall",
        "encoder_conf": {**_SANM_ENCODER, "tp_blocks": 20},
        "tokenizer": "SentencepiecesTokenizer",
        "tokenizer_conf": {"bpemodel": None, "unk_symbol": "<unk>", "split_with_space": True},
        **_FRONT_END,
    },
}


@dataclass
class Pair:
    """FunASR's `AutoModel` and our pipeline with the same random weights."""

    peer: Any
    ours: SpeechRecognitionPipeline

    @property
    def model(self) -> PreTrainedModel:
        return self.ours.model


def import_funasr(checkout: Path, module: str = "funasr.auto.auto_model") -> Any:
    """A module of the package in `checkout`. Call it after transformers has been imported."""
    if not (checkout / "funasr" / "auto" / "auto_model.py").is_file():
        raise SystemExit(f"{checkout}: not a checkout of FunASR (no funasr/auto/auto_model.py)")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    # The package prints what it misses for models that are not measured.
    with contextlib.redirect_stdout(io.StringIO()):
        return importlib.import_module(module)


def build_pair(checkout: Path, name: str) -> Pair:
    """The same random weights as a FunASR model and as ours, through our converter.

    Args:
        name: key of `SETTINGS`.
    """
    from convert_funasr import convert_funasr_pack

    from hf_speechllm.auto import AutoModelForSpeechSeq2Seq, AutoProcessor

    auto_model = import_funasr(checkout).AutoModel
    with tempfile.TemporaryDirectory(prefix="benchmark-") as work:
        pack = Path(work) / "pack"
        pack.mkdir()
        write_pack(pack, name)
        # The folder has no weights yet, so upstream keeps its random ones.
        peer = auto_model(
            model=str(pack), device="cpu", ncpu=1, disable_update=True, disable_pbar=True, log_level="ERROR", seed=0
        )
        make_talkative(peer.model)
        torch.save(peer.model.state_dict(), pack / "model.pt")
        convert_funasr_pack(pack, Path(work) / "model")
        model = AutoModelForSpeechSeq2Seq.from_pretrained(Path(work) / "model").eval()
        processor = AutoProcessor.from_pretrained(Path(work) / "model")
    ours = SpeechRecognitionPipeline(
        model=model,
        processor=processor,
        feature_extractor=processor.feature_extractor,
        tokenizer=processor.tokenizer,
        device="cpu",
    )
    return Pair(peer, ours)


def write_pack(pack: Path, name: str) -> None:
    """Everything of a FunASR folder but the weights."""
    (pack / "config.yaml").write_text(yaml.safe_dump(SETTINGS[name]), encoding="utf-8")
    size = 560
    mvn = write_nnet_mvn(torch.full((size,), _SHIFT), torch.full((size,), _SCALE))
    (pack / "am.mvn").write_text(mvn, encoding="utf-8")
    if SETTINGS[name]["tokenizer"] == "CharTokenizer":
        characters = [chr(0x4E00 + index) for index in range(_PARAFORMER_TOKENS - 4)]
        tokens = ["<blank>", "<s>", "</s>", *characters, "<unk>"]
        (pack / "tokens.json").write_text(json.dumps(tokens, ensure_ascii=False), encoding="utf-8")
        vocabulary = {"token_list": "tokens.json"}
    else:
        (pack / "bpe.model").write_bytes(sentencepiece_file(_SENSEVOICE_PIECES))
        vocabulary = {"bpemodel": "bpe.model"}
    files = {
        "init_param": "model.pt",
        "config": "config.yaml",
        "frontend_conf": {"cmvn_file": "am.mvn"},
        "tokenizer_conf": vocabulary,
    }
    (pack / "configuration.json").write_text(json.dumps({"file_path_metas": files}), encoding="utf-8")


def sentencepiece_file(size: int) -> bytes:
    """A bpe model of `size` pieces: marks, single characters, and the tags at their published ids."""

    def message(field: int, content: bytes) -> bytes:
        return varint(field << 3 | 2) + varint(len(content)) + content

    def varint(value: int) -> bytes:
        low, rest = value & 0x7F, value >> 7
        return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])

    def piece(text: str, score: float, kind: int) -> bytes:
        number = varint(2 << 3 | 5) + struct.pack("<f", score)
        return message(1, message(1, text.encode()) + number + varint(3 << 3) + varint(kind))

    normal, unknown, control, user_defined = 1, 2, 3, 4
    pieces = [piece("<unk>", 0.0, unknown), piece("<s>", 0.0, control), piece("</s>", 0.0, control)]
    for index in range(len(pieces), size):
        if index in _TAGS:
            pieces.append(piece(f"<|{_TAGS[index]}|>", 0.0, user_defined))
        else:
            # Ideographs, then syllables of Hangul.
            code = 0x4E00 + index if index < 20000 else 0xAC00 + index - 20000
            pieces.append(piece(chr(code), -float(index), normal))
    trainer = message(2, varint(3 << 3) + varint(2))
    normalizer = message(3, message(1, b"identity"))
    return b"".join(pieces) + trainer + normalizer


@torch.no_grad()
def make_talkative(model: torch.nn.Module) -> None:
    """Change the random weights so that they say about as much as a trained model: some four tokens a second."""
    if hasattr(model, "predictor"):
        model.predictor.cif_output.bias.fill_(-1.1)
    else:
        # The blank wins in most frames.
        model.ctc.ctc_lo.bias[0] = 1.4


def voices(seconds: list[float]) -> list[np.ndarray]:
    """Audio `(samples,)` float32 at 16 kHz: syllables of noise and of harmonics, four a second."""
    generator = np.random.default_rng(0)
    waveforms = []
    for length in seconds:
        parts = []
        while sum(map(len, parts)) < length * RATE:
            time = np.arange(RATE // 4) / RATE
            pitch, color = generator.uniform(80, 400), generator.uniform(0.3, 0.98)
            tone = sum(color**k * np.sin(2 * np.pi * pitch * k * time) for k in range(1, 20))
            noise = generator.standard_normal(len(time))
            mix = generator.uniform() * tone + generator.uniform() * noise
            parts.append(0.05 * np.sin(np.pi * time / time[-1]) * mix)
        waveforms.append(np.concatenate(parts)[: int(length * RATE)].astype(np.float32))
    return waveforms
