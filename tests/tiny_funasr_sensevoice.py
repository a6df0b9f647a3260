"""Tiny SenseVoice models for the tests: random weights that make the output change over time, and a vocabulary."""

import numpy as np
import torch

from hf_speechllm.models.configuration_funasr_sensevoice import FunasrSenseVoiceConfig
from hf_speechllm.models.feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor
from hf_speechllm.models.modeling_funasr_sensevoice import FunasrSenseVoiceForSpeechRecognition
from hf_speechllm.models.processing_funasr_sensevoice import FunasrSenseVoiceProcessor
from hf_speechllm.models.tokenization_funasr_sensevoice import FunasrSenseVoiceTokenizer
from hf_speechllm.upstream.sentencepiece_model import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    SentencePiece,
    SentencePieceModel,
)
from hf_speechllm.upstream.sentencepiece_tokenizer import build_sentencepiece_tokenizer


LANGUAGES = ("zh", "en", "yue", "ja", "ko", "nospeech")
EMOTIONS = ("HAPPY", "SAD", "ANGRY", "NEUTRAL", "EMO_UNKNOWN")
EVENTS = ("Speech", "BGM", "Applause", "Laughter")
TEXT_NORMS = ("withitn", "woitn")
TAGS = (*LANGUAGES, *EMOTIONS, *EVENTS, *TEXT_NORMS)
UNITS = (
    *("▁th", "er", "▁the", "▁a", "re", "th", "▁", "t", "h", "e", "r", "a", "n", "o", "w", "d", "s", "i", ",", "."),
    *("你", "好", "世", "界", "で", "す", "ー", "안", "녕"),
)
PIECES = (
    SentencePiece("<unk>", 0.0, UNKNOWN),
    SentencePiece("<s>", 0.0, CONTROL),
    SentencePiece("</s>", 0.0, CONTROL),
    *(SentencePiece(f"<|{tag}|>", 0.0, USER_DEFINED) for tag in TAGS),
    *(SentencePiece(unit, -float(index), NORMAL) for index, unit in enumerate(UNITS)),
)
ID = {piece.text.removeprefix("<|").removesuffix("|>"): index for index, piece in enumerate(PIECES)}

BASE = {
    "vocab_size": len(PIECES),
    "input_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_timestamp_prediction_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "fsmn_kernel_size": 5,
    "subsampling_rate": 2,
    "language_token_ids": {tag: ID[tag] for tag in LANGUAGES},
    "emotion_token_ids": {tag: ID[tag] for tag in EMOTIONS},
    "event_token_ids": {tag: ID[tag] for tag in EVENTS},
    "textnorm_token_ids": {tag: ID[tag] for tag in TEXT_NORMS},
}


def tiny_tokenizer() -> FunasrSenseVoiceTokenizer:
    model = SentencePieceModel(PIECES, "bpe", b"", add_dummy_prefix=False, remove_extra_whitespaces=True)
    return build_sentencepiece_tokenizer(model)


def tiny_processor() -> FunasrSenseVoiceProcessor:
    """For `tiny_model()`: 8 mel bins, 3 frames stacked every 2 (20 ms a frame of the model)."""
    extractor = KaldiFbankFeatureExtractor(
        feature_size=8,
        window_type="hamming",
        lfr_m=3,
        lfr_n=2,
        cmvn_mean=[11.0] * 24,
        cmvn_inverse_std=[0.4] * 24,
    )
    return FunasrSenseVoiceProcessor(extractor, tiny_tokenizer())


def tiny_model(seed: int = 0, **changes) -> FunasrSenseVoiceForSpeechRecognition:
    """A model in evaluation mode whose output varies over time and whose every parameter matters."""
    torch.manual_seed(seed)
    model = FunasrSenseVoiceForSpeechRecognition(FunasrSenseVoiceConfig(**{**BASE, **changes})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        model.ctc_head.weight.mul_(6.0)
        model.ctc_head.bias.zero_()
        model.ctc_head.bias[model.config.pad_token_id] = 4.0
        # Control units are no answer and no text.
        model.ctc_head.bias[1:3] = -1e3
    return model


def tiny_features(*num_frames: int, size: int = 24, seed: int = 0) -> list[torch.Tensor]:
    """Smooth random features `(frames, size)`, one per length."""
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for frames in num_frames:
        steps = torch.randn(frames // 3 + 2, size, generator=generator).repeat_interleave(3, dim=0)[:frames]
        pieces.append(steps + 0.3 * torch.randn(frames, size, generator=generator))
    return pieces


def pad(pieces: list[torch.Tensor], extra: int = 0) -> dict[str, torch.Tensor]:
    """Model inputs of a batch; `extra` padded frames beyond the longest item, filled with rubbish like all padding."""
    width = max(len(piece) for piece in pieces) + extra
    features = torch.full((len(pieces), width, pieces[0].shape[1]), 50.0)
    mask = torch.zeros(len(pieces), width, dtype=torch.long)
    for row, piece in enumerate(pieces):
        features[row, : len(piece)] = piece
        mask[row, : len(piece)] = 1
    return {"input_features": features, "attention_mask": mask}


def label_row(*text: str, language="zh", emotion="NEUTRAL", event="Speech", textnorm="woitn") -> list[int]:
    """Ids of the four answers and of units."""
    return [ID[name] for name in (language, emotion, event, textnorm, *text)]


def pad_labels(rows: list[list[int]]) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [-100] * (width - len(row)) for row in rows], dtype=torch.long)


def tones(seconds: float, seed: int = 0) -> np.ndarray:
    """Audio at 16 kHz, `(samples,)` float32."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * 16000)) / 16000
    pitch = 300 + 900 * (0.5 + 0.5 * np.sin(2 * np.pi * 1.7 * time + 6 * rng.random()))
    tone = np.sign(np.sin(2 * np.pi * 2.1 * time)) * np.sin(2 * np.pi * np.cumsum(pitch) / 16000)
    return (0.4 * tone + 0.01 * rng.standard_normal(len(time))).astype(np.float32)
