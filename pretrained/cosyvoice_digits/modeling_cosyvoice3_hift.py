"""CosyVoice 3's causal HiFT vocoder (`cosyvoice3_hift`).

Upstream: FunAudioLLM/CosyVoice, `cosyvoice/hifigan/generator.py`, `CausalHiFTGenerator`. As `cosyvoice_hift`, but that
convolutions look back only, except for the first of both networks, and that the noise is always the same: uniform
numbers in 0..1, 300 s of them, which upstream draws when the model is built and does not save.

Those numbers, 259 MB, are what a generator gives next once the models in front of the vocoder have been initialised
from seed 0. Here the state of that generator, 5 KB, is part of the checkpoint, and every call draws what it needs: the
same on every device, since the numbers are drawn on the CPU, for audio of any length, and the same in a stream as in
one pass, since the generator gives them one after the other.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .configuration_cosyvoice3_hift import CosyVoice3HiftConfig
from .modeling_cosyvoice_hift import NUM_F0_LAYERS, CosyVoiceHiftModel, CosyVoiceHiftStreamState


class FixedNoise(nn.Module):
    """The numbers that follow a state of torch's generator of the CPU (a Mersenne twister), uint8."""

    def __init__(self, state: Tensor) -> None:
        super().__init__()
        # On the device where the model is made, which may be the meta device.
        self.register_buffer("state", torch.empty(state.shape, dtype=torch.uint8).copy_(state))

    def draw(self, samples: int, sines: int, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Uniform numbers in 0..1, `(samples, sines)` float32 on the CPU, and the state behind them.

        Args:
            state (uint8, *optional*): where to go on; default the beginning.
        """
        generator = torch.Generator(device="cpu")
        generator.set_state((self.state if state is None else state).cpu())
        # The default device may be another one.
        return torch.rand(samples, sines, generator=generator, device="cpu"), generator.get_state()


class CosyVoice3HiftModel(CosyVoiceHiftModel):
    """The vocoder; see [`CosyVoiceHiftModel`].

    In evaluation mode noise that is not given is the model's own, and `generator` is not used; in training mode it is
    drawn anew, standard normal, as upstream.
    """

    config_class = CosyVoice3HiftConfig
    config: CosyVoice3HiftConfig
    _single_f0_upstream = False

    def __init__(self, config: CosyVoice3HiftConfig) -> None:
        super().__init__(config)
        self.fixed_noise = FixedNoise(upstream_noise_state(config))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FixedNoise):
            init.copy_(module.state, upstream_noise_state(self.config))

    def _noise(self, rows: int, samples: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        if self.training:
            return super()._noise(rows, samples, generator, device)
        noise, _ = self.fixed_noise.draw(samples, self.source.num_sines)
        return noise.to(device).expand(rows, -1, -1)

    def _first_noise_state(self) -> Tensor | None:
        return self.fixed_noise.state

    def _next_noise(self, samples: int, state: CosyVoiceHiftStreamState) -> tuple[Tensor, CosyVoiceHiftStreamState]:
        if state.noise is not None:
            return super()._next_noise(samples, state)
        noise, behind = self.fixed_noise.draw(samples, self.source.num_sines, state.noise_state)
        return noise.to(self.device).expand(state.batch_size, -1, -1), replace(state, noise_state=behind)

    def _stream_overlapping(
        self, mel: Tensor, state: CosyVoiceHiftStreamState, is_last: bool
    ) -> tuple[Tensor, CosyVoiceHiftStreamState]:
        """Upstream's `token2wav` of version 3: all frames are vocoded anew, and the samples that were given left out.

        Nothing is faded: what the frames that follow could change is kept back.
        """
        given = 0 if state.mel is None else self._settled_frames(state.mel)
        mel = mel if state.mel is None else torch.cat((state.mel, mel), dim=1)
        hop = self.config.hop_length
        noise = None if state.noise is None else state.noise[:, : mel.shape[1] * hop]
        waveform = self(mel, noise=noise, compatibility="upstream", return_dict=True).waveform
        settled = mel.shape[1] if is_last else self._settled_frames(mel)
        return waveform[:, given * hop : settled * hop], replace(state, mel=mel)

    def _settled_frames(self, mel: Tensor) -> int:
        """Frames whose samples upstream gives of a beginning: what both networks look ahead, and one, is left out."""
        ahead = self.config.f0_look_ahead_frames + self.config.look_ahead_frames + 1
        return max(mel.shape[1] - ahead, 0)


def upstream_noise_state(config: CosyVoice3HiftConfig) -> Tensor:
    """State of torch's generator in front of upstream's noise, uint8.

    Upstream builds language model, flow and vocoder in the order of the yaml, in one process. The decoder of the flow
    sets seed 0 and draws 300 s of its own noise. What is built after that draws its first weights: the embedding of
    speech tokens, the projection of speaker vectors, and the network that finds the fundamental frequency. The initial
    phase of the sines is next, and then their noise.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)
    torch.randn(80 * 50 * 300, generator=generator, device="cpu")
    (rows, width), speaker = config.layers_before_noise
    torch.randn(rows * width, generator=generator, device="cpu")
    hidden = config.f0_hidden_size
    convolutions = [(config.num_mel_bins * (config.f0_look_ahead_frames + 1), hidden)]
    convolutions += [(hidden * 3, hidden)] * (NUM_F0_LAYERS - 1)
    for inputs, outputs in (speaker, *convolutions, (hidden, 1)):
        # Weight and bias of a layer are uniform; only how many numbers are drawn matters here.
        torch.rand(inputs * outputs, generator=generator, device="cpu")
        torch.rand(outputs, generator=generator, device="cpu")
    torch.rand(config.num_harmonics + 1, generator=generator, device="cpu")
    return generator.get_state()


CosyVoice3HiftModel.register_for_auto_class("AutoModel")
