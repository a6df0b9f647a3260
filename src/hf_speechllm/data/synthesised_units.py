"""Units of texts that a CosyVoice speaks, for answers of chains of modality of which nobody made recordings."""

import io
from collections.abc import Sequence

import soundfile
from torch import Tensor
from tqdm import tqdm

from hf_speechllm.cosyvoice_units import CosyVoiceUnits
from hf_speechllm.data.manifests import Utterance
from hf_speechllm.data.unit_extraction import extract_units
from hf_speechllm.eval.speech_synthesis import speak_tokens, synthesize
from hf_speechllm.models.modeling_speechgpt_units import SpeechGptUnitsModel


# Texts whose waveforms are held in memory together.
_WINDOW = 64


def synthesised_units(
    voice: CosyVoiceUnits,
    speaker: str,
    texts: Sequence[str],
    units_model: SpeechGptUnitsModel | None = None,
    seed: int = 0,
    batch_size: int = 8,
) -> dict[str, list[int]]:
    """Units of each different text, none for a text without words.

    Args:
        voice: who speaks. speaker: one that its processor knows.
        texts: what to say; a text that is there twice is spoken once.
        units_model: in evaluation mode. With it, units are those of the sound, adjacent repeats removed; without, they
            are the speech tokens of the language model of `voice`, with their repeats, as `voice` speaks them.
        seed: of all that is drawn. batch_size: sentences that are computed together.

    Raises:
        KeyError: an unknown speaker.
    """
    different = list(dict.fromkeys(texts))
    units: dict[str, list[int]] = {}
    with tqdm(total=len(different), desc="synthesis", unit="text") as bar:
        for start in range(0, len(different), _WINDOW):
            window = different[start : start + _WINDOW]
            requests = [{"text": text, "speaker": speaker} for text in window]
            if units_model is None:
                tokens = speak_tokens(voice.model, voice.processor, requests, seed + start, batch_size)
                units |= {text: row.tolist() for text, row in zip(window, tokens, strict=True)}
            else:
                spoken = synthesize(voice.model, voice.processor, requests, seed + start, batch_size).waveforms
                units |= {text: [] for text in window}
                heard = [
                    Utterance(text, _wav(waveform, voice.config.sampling_rate), text)
                    for text, waveform in zip(window, spoken, strict=True)
                    if len(waveform)
                ]
                units |= {row["key"]: row["units"] for row in extract_units(units_model, heard, progress=False)}
            bar.update(len(window))
    return units


def _wav(waveform: Tensor, sampling_rate: int) -> bytes:
    """The samples `(samples,)` as the content of a file, as they are: [`extract_units`] resamples what it decodes."""
    file = io.BytesIO()
    soundfile.write(file, waveform.numpy(), sampling_rate, format="WAV", subtype="FLOAT")
    return file.getvalue()
