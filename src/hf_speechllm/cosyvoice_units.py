"""A CosyVoice as both ends of a unit language model: recordings to speech tokens, and tokens to sound in one voice.

The design of GLM-4-Voice (https://arxiv.org/abs/2412.02612): the units are the tokens of CosyVoice's supervised
tokenizer, with their repeats, and its flow and vocoder speak them. What is here takes the place of both a
`speechgpt_units` model and a unit vocoder:

    voice = CosyVoiceUnits.from_pretrained(COSYVOICE)
    pipeline("any-to-any", model=LM, units=voice, vocoder=voice, voice={"speaker": "jackson"}, trust_remote_code=True)
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForTextToWaveform, AutoProcessor

from .models.feature_extraction_s3_tokenizer import S3FeatureExtractor
from .models.modeling_cosyvoice import CosyVoiceForTextToWaveform, CosyVoicePrompt
from .models.processing_cosyvoice import CosyVoiceProcessor
from .models.ragged_rows import padded_with_mask
from .models.streaming_cosyvoice import SpeechStream
from .models.token_to_mel import TokenToMelModel
from .models.unit_string import parse_unit_string


@dataclass
class SpeechTokenUnits:
    """
    Args:
        reduced_ids (`(b, n)`, int64): tokens from 0, with their repeats; -1 = padding.
    """

    reduced_ids: Tensor


class CosyVoiceUnits:
    """
    Args:
        model: in evaluation mode. processor: its own, whose speakers are the voices.
    """

    def __init__(self, model: CosyVoiceForTextToWaveform, processor: CosyVoiceProcessor) -> None:
        self.model, self.processor, self.config = model, processor, model.config
        self.feature_extractor = S3FeatureExtractor(feature_size=model.speech_tokenizer.config.num_mel_bins)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, **kwargs) -> "CosyVoiceUnits":
        """Model and processor of a folder or Hub id; `kwargs` go to both."""
        model = AutoModelForTextToWaveform.from_pretrained(name, **kwargs).eval()
        return cls(model, AutoProcessor.from_pretrained(name, **kwargs))

    @property
    def device(self) -> torch.device:
        return self.model.device

    @torch.no_grad()
    def encode(self, input_values: Tensor, attention_mask: Tensor) -> SpeechTokenUnits:
        """Tokens of recordings.

        Args:
            input_values (`(b, samples)`, float32, 16 kHz), attention_mask (`(b, samples)`, 1 = real sample).
        """
        waveforms = [row[mask.bool()].cpu() for row, mask in zip(input_values, attention_mask, strict=True)]
        features = self.feature_extractor(waveforms).to(self.device)
        output = self.model.speech_tokenizer.encode(**features)
        return SpeechTokenUnits(output.token_ids.masked_fill(~output.token_mask, -1))

    def synthesize_batch(
        self, units: Sequence[str | Sequence[int] | Tensor], speaker: str, num_steps: int = 10, seed: int = 0
    ) -> list[Tensor]:
        """Waveforms of utterances, in one batch.

        Args:
            units: strings such as `<sosp><12><7><eosp>`, or ids.
            speaker: one that the processor knows.
            num_steps: Euler steps of the flow. seed: row `r` draws from a generator with `seed + r`.

        Returns:
            `(samples,)` float32 each, at `config.sampling_rate`; empty for an utterance without a unit.

        Raises:
            KeyError: an unknown speaker. ValueError: units that the flow does not have.
        """
        rows = [
            torch.as_tensor(parse_unit_string(row) if isinstance(row, str) else row, dtype=torch.long).flatten()
            for row in units
        ]
        spoken = [row for row in rows if len(row)]
        if not spoken:
            return [torch.zeros(0) for _ in rows]
        prompt = self._voice(speaker, len(spoken))
        ids, mask = (value.to(self.device) for value in padded_with_mask("ids", spoken).values())
        generators = [torch.Generator().manual_seed(seed + row) for row in range(len(spoken))]
        mel, mel_mask = self.model.token_to_mel(ids, mask, prompt, num_steps, generator=generators)
        waveforms, waveform_mask = self.model.mel_to_waveform(mel, mel_mask, generators)
        found = iter(wave[real.bool()].cpu() for wave, real in zip(waveforms, waveform_mask, strict=True))
        return [next(found) if len(row) else torch.zeros(0) for row in rows]

    def synthesize(self, units: str | Sequence[int] | Tensor, speaker: str, **options) -> Tensor:
        """Waveform `(samples,)` of one utterance; see [`synthesize_batch`]."""
        return self.synthesize_batch([units], speaker, **options)[0]

    def start_stream(self, speaker: str, num_steps: int = 10, seed: int = 0) -> "CosyVoiceUnitStream":
        """State of an utterance whose units come one by one."""
        generator = torch.Generator().manual_seed(seed)
        stream = SpeechStream(self.model, self._voice(speaker, 1), num_steps, generator, generator)
        return CosyVoiceUnitStream(stream, self.model.flow)

    def _voice(self, speaker: str, rows: int) -> CosyVoicePrompt:
        """The speaker's recording, where there is one, and embedding, for every row."""
        known = self.processor.known_speaker(speaker)
        data = padded_with_mask("speech_ids", [known.speech_ids] * rows, "speech_mask")
        data |= padded_with_mask("mel", [known.mel] * rows)
        data["speaker_embedding"] = known.embedding.expand(rows, -1)
        return CosyVoicePrompt(**{name: value.to(self.device) for name, value in data.items()})


class CosyVoiceUnitStream:
    """Sound of one utterance whose units come one by one; the flow and the vocoder keep what they need of the past."""

    def __init__(self, stream: SpeechStream, flow: TokenToMelModel) -> None:
        self._stream, self._flow = stream, flow

    @torch.no_grad()
    def push(self, units: list[int], is_last: bool = False) -> Tensor:
        """More samples `(samples,)`, float32, after more units; `is_last` gives the rest.

        Raises:
            ValueError: units that the flow does not have.
        """
        # Units that wait for the rest of their chunk are read with a later piece, in which nobody expects an error.
        self._flow.check_token_ids(torch.as_tensor(units, dtype=torch.long))
        return self._stream.push(units, is_last)[0].float().cpu()
