"""How much faster than real time units become sound: the published size of the unit HiFi-GAN, random weights.

The column of the peer is the sound itself: its duration. One utterance, and eight of different lengths in one batch.
"""

import torch
from timing import Comparison, compare

from hf_speechllm.models.configuration_speechgpt_unit_vocoder import SpeechGptUnitVocoderConfig
from hf_speechllm.models.modeling_speechgpt_unit_vocoder import SpeechGptUnitVocoderModel


FRAMES = (250, 230, 200, 180, 150, 120, 90, 60)


def vocoder() -> list[Comparison]:
    """Frame-rate units to samples; a ratio of 2 is a real-time factor of one half."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = SpeechGptUnitVocoderModel(SpeechGptUnitVocoderConfig()).eval().to(device)
    rows = [torch.randint(0, model.config.num_units, (frames,)) for frames in FRAMES]
    results = []
    with torch.inference_mode():
        for name, batch in (("one utterance of 5 s", rows[:1]), ("eight of 1.2 to 5 s", rows)):

            def speak(batch=batch) -> list[torch.Tensor]:
                return [wave.cpu() for wave in model.synthesize_batch(batch, predict_durations=False)]

            seconds = sum(len(wave) for wave in speak()) / model.config.sampling_rate
            timed = compare(f"unit vocoder, {name}, {device}", "> 1", lambda: None, speak, runs=3)
            results.append(Comparison(timed.name, timed.goal, [seconds] * len(timed.ours), timed.ours))
    return results
