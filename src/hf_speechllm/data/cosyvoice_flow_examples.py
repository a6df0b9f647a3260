"""Training examples of CosyVoice's flows: speech tokens, the mel spectrogram of the same recording, its speaker.

Rows have the columns of upstream's parquet files: `speech_token`, `utt_embedding` or `spk_embedding`, and the audio as
`audio_data` (the content of a file) or as a path in `wav` or `audio`. They are those that the language models are
trained on.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from hf_speechllm.audio import load_audio
from hf_speechllm.data.manifests import ManifestError
from hf_speechllm.models.feature_extraction_cosyvoice_mel import CosyVoiceMelFeatureExtractor


_PATH_COLUMNS = ("wav", "audio")


@dataclass(frozen=True)
class TokenizedRecording:
    """One recording with what is known of it.

    Args:
        audio: a file, or the content of one. speech_ids: its speech tokens. speaker_embedding: its speaker vector.
    """

    audio: Path | bytes
    speech_ids: tuple[int, ...]
    speaker_embedding: tuple[float, ...]


def tokenized_recordings(
    rows: Iterable[dict[str, Any]], data_dir: str | None, speaker_column: str = "utt_embedding"
) -> list[TokenizedRecording]:
    """Rows as recordings.

    Args:
        data_dir: folder that relative paths start from.
        speaker_column: `"utt_embedding"`, or `"spk_embedding"` for fine-tuning on known speakers.

    Raises:
        ManifestError: a row without tokens, audio or speaker.
    """
    recordings = []
    for number, row in enumerate(rows):
        audio = row.get("audio_data")
        if audio is None:
            name = next((row[column] for column in _PATH_COLUMNS if row.get(column)), None)
            audio = None if name is None else Path(data_dir or ".") / name
        tokens, speaker = row.get("speech_token"), row.get(speaker_column)
        if audio is None or not tokens or not speaker:
            raise ManifestError(
                f"row {number}: expected speech_token, {speaker_column} and one of audio_data, wav, audio, found "
                f"{', '.join(sorted(key for key, value in row.items() if value))}"
            )
        recordings.append(TokenizedRecording(audio, tuple(tokens), tuple(speaker)))
    return recordings


class TokenMelDataset(Dataset):
    """Tokens, mel and speaker of each recording.

    With a `token_mel_ratio` (versions 2 and 3) the audio is padded with silence to whole tokens, and both are cut so
    that every token has its frames. Without one (version 1) they keep their lengths.

    Args:
        recordings ([`TokenizedRecording`]s), feature_extractor ([`CosyVoiceMelFeatureExtractor`]).
        token_mel_ratio (`int`, *optional*): mel frames of a token.
        input_frame_rate (`int`): tokens per second.
        min_frames, max_frames (`int`): recordings outside are left out, as far as their tokens tell.
        keep_mels (`bool`): keep every spectrogram in memory once it was computed: 16 kB a second at 50 Hz.

    Raises:
        ValueError: no recording is left, or the extractor's frames are not those that the ratio says.
    """

    def __init__(
        self,
        recordings: Sequence[TokenizedRecording],
        feature_extractor: CosyVoiceMelFeatureExtractor,
        token_mel_ratio: int | None,
        input_frame_rate: int,
        min_frames: int = 1,
        max_frames: int = 3000,
        keep_mels: bool = True,
    ) -> None:
        frame_rate = feature_extractor.sampling_rate / feature_extractor.hop_length
        if token_mel_ratio is not None and frame_rate != token_mel_ratio * input_frame_rate:
            raise ValueError(
                f"feature_extractor: expected {token_mel_ratio * input_frame_rate} frames per second, "
                f"{token_mel_ratio} for each token, got {frame_rate:g}"
            )
        self.feature_extractor = feature_extractor
        self.token_mel_ratio = token_mel_ratio
        frames = [round(len(item.speech_ids) / input_frame_rate * frame_rate) for item in recordings]
        kept = [index for index, count in enumerate(frames) if min_frames <= count <= max_frames]
        if not kept:
            raise ValueError(
                f"expected at least one of {len(recordings)} recordings of {min_frames} to {max_frames} frames, "
                "got none"
            )
        self.recordings = [recordings[index] for index in kept]
        self._lengths = [frames[index] for index in kept]
        self._mels: dict[int, Tensor] | None = {} if keep_mels else None

    def __len__(self) -> int:
        return len(self.recordings)

    def lengths(self, epoch: int) -> list[int]:
        """Mel frames of every item as its tokens tell; the same in every epoch."""
        return self._lengths

    def mel(self, index: int) -> Tensor:
        """Spectrogram of a recording, `(t, m)` float32."""
        if self._mels is not None and index in self._mels:
            return self._mels[index]
        extractor = self.feature_extractor
        waveform = load_audio(self.recordings[index].audio, extractor.sampling_rate)
        if self.token_mel_ratio is not None:
            waveform = np.pad(waveform, (0, -len(waveform) % (self.token_mel_ratio * extractor.hop_length)))
        mel = extractor(waveform, sampling_rate=extractor.sampling_rate).input_features[0]
        if self._mels is not None:
            self._mels[index] = mel
        return mel

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Tensor]:
        """An item, or (epoch, item), of which the epoch changes nothing: what is random is drawn by the model.

        Returns:
            `speech_token_ids` int64 `(n,)`, `mel` float32 `(t, m)`, `speaker_embedding` float32 `(s,)`.
        """
        index = index[1] if isinstance(index, tuple) else index
        recording, mel = self.recordings[index], self.mel(index)
        ids = torch.tensor(recording.speech_ids)
        if self.token_mel_ratio is not None:
            count = min(len(ids), len(mel) // self.token_mel_ratio)
            ids, mel = ids[:count], mel[: self.token_mel_ratio * count]
        return {
            "speech_token_ids": ids,
            "mel": mel,
            "speaker_embedding": torch.tensor(recording.speaker_embedding, dtype=torch.float32),
        }


def collate_token_mels(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Pads tokens and mels with 0.

    Returns:
        `speech_token_ids` `(b, n)`, `speech_token_mask` `(b, n)`, `mel` `(b, t, m)`, `mel_mask` `(b, t)`, masks int64
        with 1 = real, `speaker_embedding` `(b, s)`.
    """
    batch = {"speaker_embedding": torch.stack([item["speaker_embedding"] for item in items])}
    for name, mask in (("speech_token_ids", "speech_token_mask"), ("mel", "mel_mask")):
        lengths = torch.tensor([len(item[name]) for item in items])
        batch[name] = pad_sequence([item[name] for item in items], batch_first=True)
        batch[mask] = (torch.arange(batch[name].shape[1]) < lengths[:, None]).long()
    return batch
