"""CosyVoice's HiFT vocoder, versions 1 and 2: log-mel spectrogram to waveform (`cosyvoice_hift`).

Papers: https://arxiv.org/abs/2309.09493 (HiFTNet), https://arxiv.org/abs/2203.02395 (iSTFTNet). Upstream:
FunAudioLLM/CosyVoice, `cosyvoice/hifigan/generator.py`, `HiFTGenerator`.

A network finds the fundamental frequency of every frame; sines of it and of its harmonics, with noise, excite a
HiFi-GAN, whose output is the spectrum of very short frames.

Shape legend: `b` batch, `t` mel frames, `n = t * hop_length` samples, `h` sines (`num_harmonics + 1`).

What differs from upstream: a batch may hold spectrograms of different lengths, and each of them sounds as it does
alone; noise is an argument; the fundamental frequency is found in double precision (upstream: only in version 3),
because the phase is its sum over the whole utterance. Streaming gives the waveform of one pass, late by what the
convolutions look ahead ([`CosyVoiceHiftModel.stream_lookahead`]), where upstream computes an overlap twice and fades.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .configuration_cosyvoice_hift import CosyVoiceHiftConfig
from .cross_fade import cross_fade, hamming_window
from .edge_convolution import (
    EdgeConv1d,
    EdgeConvTranspose1d,
    Pass,
    RepeatConv1d,
    StreamPass,
    StreamPast,
    WholePass,
    fold_normalized_weights,
    normalize_weights,
)
from .mixed_lengths import encode_apart, lengths_to_encode_apart
from .short_time_fourier import overlap_add, real_and_imaginary
from .sine_source import SinePast, SineSource
from .snake import Snake


# Magnitudes beyond this are clipped before the inverse transform, as upstream.
_LARGEST_MAGNITUDE = 1e2
NUM_F0_LAYERS = 5


@dataclass
class CosyVoiceHiftOutput(ModelOutput):
    """
    Args:
        waveform (`(b, n)`, float): 0 after the end of each item.
        waveform_mask (`(b, n)`, int64): 1 = real sample.
        f0 (`(b, t)`, float32): fundamental frequency in Hz, with gradient in training mode.
        source (`(b, n)`, float): the excitation.
    """

    waveform: Tensor | None = None
    waveform_mask: Tensor | None = None
    f0: Tensor | None = None
    source: Tensor | None = None


@dataclass
class CosyVoiceHiftStreamState:
    """Streams that advance together; a call takes one and returns the next, and does not change what it took.

    Args:
        batch_size: streams.
        noise (`(b, samples, h)`, *optional*): what is left of the noise that was given.
        generator: where noise comes from otherwise; `None` is torch's own.
        noise_state (uint8, *optional*): of the generator that a model's own noise comes from.
        phase (`(b, h)`, *optional*): initial phase in radians.
        f0, network: what the two networks remember. sine: where the sines are.
        waiting_f0 (`(b, k)`): frequencies of the frames whose excitation has not been given.
        compatibility: `None` or `"upstream"`.
        mel, source, waveform: overlap of `"upstream"`, `None` before its first piece.
    """

    batch_size: int
    noise: Tensor | None = None
    generator: torch.Generator | None = None
    noise_state: Tensor | None = None
    phase: Tensor | None = None
    f0: StreamPast | None = None
    network: StreamPast | None = None
    sine: SinePast | None = None
    waiting_f0: Tensor | None = None
    compatibility: str | None = None
    mel: Tensor | None = None
    source: Tensor | None = None
    waveform: Tensor | None = None


class CosyVoiceHiftF0Predictor(nn.Module):
    """Fundamental frequency: five convolutions over frames with ELU, and a projection of which the size counts."""

    def __init__(self, config: CosyVoiceHiftConfig) -> None:
        super().__init__()
        width = config.f0_hidden_size
        sizes = [config.num_mel_bins] + [width] * NUM_F0_LAYERS
        self.layers = nn.ModuleList(
            self._layer(config, first, inside, width) for first, inside in enumerate(sizes[:-1])
        )
        self.proj = nn.Linear(width, 1)

    @staticmethod
    def _layer(config: CosyVoiceHiftConfig, number: int, inside: int, width: int) -> EdgeConv1d:
        if not config.is_causal:
            return EdgeConv1d.centred(inside, width, 3)
        if number == 0:
            ahead = config.f0_look_ahead_frames
            return EdgeConv1d(inside, width, ahead + 1, right=ahead)
        return EdgeConv1d.causal(inside, width, 3)

    def forward(self, mel: Tensor, run: Pass) -> Tensor:
        """Hz `(b, t)` from mel `(b, num_mel_bins, t)`; of its precision, whatever the type of the weights."""
        hidden = mel
        for layer in self.layers:
            hidden = functional.elu(run.conv(layer, hidden))
        weight, bias = self.proj.weight.to(hidden.dtype), self.proj.bias.to(hidden.dtype)
        return functional.linear(hidden.transpose(1, 2), weight, bias)[..., 0].abs()


class CosyVoiceHiftResidualBlock(GradientCheckpointingLayer):
    """Pairs of convolutions, a dilated and a plain one, each behind a Snake, around which the input is added."""

    def __init__(self, channels: int, kernel_size: int, dilations: list[int], is_causal: bool) -> None:
        super().__init__()
        make = EdgeConv1d.causal if is_causal else EdgeConv1d.centred
        self.convs1 = nn.ModuleList(make(channels, channels, kernel_size, dilation) for dilation in dilations)
        self.convs2 = nn.ModuleList(make(channels, channels, kernel_size) for _ in dilations)
        self.activations1 = nn.ModuleList(Snake(channels) for _ in dilations)
        self.activations2 = nn.ModuleList(Snake(channels) for _ in dilations)

    def forward(self, hidden: Tensor, run: Pass) -> Tensor:
        for conv1, conv2, act1, act2 in zip(
            self.convs1, self.convs2, self.activations1, self.activations2, strict=True
        ):
            inner = run.conv(conv2, act2(run.conv(conv1, act1(hidden))))
            hidden = run.add(inner, hidden)
        return hidden


class CosyVoiceHiftModel(PreTrainedModel):
    """The vocoder: `forward` for whole spectrograms, `start_stream` and `stream` for those that are still growing."""

    config_class = CosyVoiceHiftConfig
    config: CosyVoiceHiftConfig
    base_model_prefix = "model"
    main_input_name = "mel"
    # Nothing attends here, so that a CosyVoice may be told any kernel for the parts that do.
    _supports_sdpa = True
    output_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["CosyVoiceHiftResidualBlock"]
    # Whether upstream finds the fundamental frequency in single precision.
    _single_f0_upstream = True

    def __init__(self, config: CosyVoiceHiftConfig) -> None:
        super().__init__(config)
        causal, spectrum_size = config.is_causal, config.istft_n_fft + 2
        self.f0_predictor = CosyVoiceHiftF0Predictor(config)
        self.source = SineSource(
            config.num_harmonics,
            config.sampling_rate,
            config.hop_length,
            config.sine_amplitude,
            config.noise_std,
            config.voiced_threshold,
            config.phase_interpolation,
        )
        width = config.hidden_size
        if causal:
            ahead = config.look_ahead_frames
            self.conv_pre = EdgeConv1d(config.num_mel_bins, width, ahead + 1, right=ahead)
        else:
            self.conv_pre = EdgeConv1d.centred(config.num_mel_bins, width, 7)
        upsample = RepeatConv1d if causal else EdgeConvTranspose1d
        self.upsampler = nn.ModuleList()
        self.source_downs, self.source_resblocks = nn.ModuleList(), nn.ModuleList()
        self.resblocks = nn.ModuleList()
        rates = config.upsample_rates
        for stage, (rate, kernel) in enumerate(zip(rates, config.upsample_kernel_sizes, strict=True)):
            channels = width >> (stage + 1)
            self.upsampler.append(upsample(width >> stage, channels, kernel, rate))
            # The spectrum of the excitation has as many frames as the last stage.
            down = 1
            for later in rates[stage + 1 :]:
                down *= later
            self.source_downs.append(self._downsampling(spectrum_size, channels, down, causal))
            source_kernel = config.source_resblock_kernel_sizes[stage]
            source_dilations = config.source_resblock_dilation_sizes[stage]
            self.source_resblocks.append(CosyVoiceHiftResidualBlock(channels, source_kernel, source_dilations, causal))
            self.resblocks.extend(
                CosyVoiceHiftResidualBlock(channels, size, dilations, causal)
                for size, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True)
            )
        make = EdgeConv1d.causal if causal else EdgeConv1d.centred
        self.conv_post = make(width >> len(rates), spectrum_size, 7)
        if config.weight_norm:
            self._normalize_weights()
        self.post_init()

    @staticmethod
    def _downsampling(in_channels: int, channels: int, rate: int, causal: bool) -> EdgeConv1d:
        if rate == 1:
            return EdgeConv1d(in_channels, channels, 1)
        left, right = (rate - 1, 0) if causal else (rate // 2, rate // 2)
        return EdgeConv1d(in_channels, channels, 2 * rate, rate, left=left, right=right)

    def _normalize_weights(self) -> None:
        normalize_weights(self.conv_pre)
        normalize_weights(self.conv_post)
        for module in (*self.f0_predictor.layers, *self.upsampler):
            normalize_weights(module)
        for block in (*self.source_resblocks, *self.resblocks):
            for conv in (*block.convs1, *block.convs2):
                normalize_weights(conv)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # torch's own defaults, as upstream trains from: its own initialisation does not reach normalised weights.
        if isinstance(module, nn.Linear | nn.Conv1d | nn.ConvTranspose1d):
            if parametrize.is_parametrized(module, "weight"):
                parts = module.parametrizations.weight
                init.kaiming_uniform_(parts.original1, a=5**0.5)
                init.copy_(parts.original0, torch.norm_except_dim(parts.original1, 2, 0))
                bound = parts.original1[0].numel() ** -0.5
            else:
                init.kaiming_uniform_(module.weight, a=5**0.5)
                bound = module.weight[0].numel() ** -0.5
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, Snake):
            init.ones_(module.alpha)

    def apply_weight_norm(self) -> None:
        """Keep weights as magnitude and direction, to train them further."""
        if not self.config.weight_norm:
            self._normalize_weights()
            self.config.weight_norm = True

    def fold_weight_norm(self) -> None:
        """Make plain weights of magnitudes and directions: the same function, computed faster."""
        fold_normalized_weights(self)
        self.config.weight_norm = False

    # -- whole spectrograms ------------------------------------------------------------------------------------------
    def forward(
        self,
        mel: Tensor,
        mel_mask: Tensor | None = None,
        noise: Tensor | None = None,
        phase: Tensor | None = None,
        generator: torch.Generator | None = None,
        cached_source: Tensor | None = None,
        f0: Tensor | None = None,
        compatibility: str | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> CosyVoiceHiftOutput | tuple[Tensor, ...]:
        """
        Args:
            mel (`(b, t, num_mel_bins)`, float): natural logarithm of the mel spectrogram.
            mel_mask (`(b, t)`): 1 = real frame, 0 = padding after the end; default all real.
            noise (`(b, n, h)`): standard normal. phase (`(b, h)`): initial phase in radians, where the fundamental's
                counts as 0; only for `phase_interpolation="sample"`. Both are drawn if they are not given.
            generator: to draw them from; default torch's own.
            cached_source (`(b, k)`): excitation to take in place of the first `k` samples, upstream's `cache_source`.
            f0 (`(b, t)`): fundamental frequency in Hz to take in place of that of the model.
            compatibility: `"upstream"` finds the fundamental frequency in the precision of upstream and adds the phase
                up as upstream does, which rounds differently with every length.

        Raises:
            ValueError: shapes that do not fit, a mask with padding in front, or another `compatibility`.

        Example:

        ```python
        >>> waveform = model(mel, generator=torch.Generator().manual_seed(0)).waveform
        ```
        """
        self._check_mel(mel)
        lengths = self._lengths(mel_mask, mel)
        mel = mel.to(self.dtype)
        if mel.shape[1] == 0:
            empty = mel[..., 0]
            return self._output(empty, empty.long(), empty.float(), empty, return_dict)
        if lengths is not None:
            mel = mel * mel_mask[..., None].to(mel)
        self._check_compatibility(compatibility)
        f0 = self.predict_f0(mel, lengths, compatibility) if f0 is None else f0.to(mel.device)
        source = self.source(self.sines(f0, noise, phase, generator, lengths, compatibility))
        if cached_source is not None:
            source = torch.cat((cached_source.to(source), source[:, cached_source.shape[1] :]), dim=1)
        waveform = self.decode(mel, source, mel_mask if lengths is not None else None)
        counts = None if lengths is None else (lengths * self.config.hop_length)[:, None]
        positions = torch.arange(waveform.shape[1], device=waveform.device)
        mask = torch.ones_like(waveform, dtype=torch.long) if counts is None else (positions < counts).long()
        if counts is not None:
            waveform, source, f0 = waveform * mask, source * mask, f0 * mel_mask.to(f0)
        return self._output(waveform, mask, f0, source, return_dict)

    def _output(self, *values: Tensor | bool | None) -> CosyVoiceHiftOutput | tuple[Tensor, ...]:
        output = CosyVoiceHiftOutput(*values[:-1])
        return_dict = self.config.return_dict if values[-1] is None else values[-1]
        return output if return_dict else output.to_tuple()

    def predict_f0(self, mel: Tensor, lengths: Tensor | None = None, compatibility: str | None = None) -> Tensor:
        """Fundamental frequency in Hz, `(b, t)` float32.

        Args:
            mel (`(b, t, num_mel_bins)`): 0 after the end of each item. lengths (`(b,)`): frames of each item.
            compatibility: see [`forward`].
        """
        # Its error is summed over the whole utterance, and a convolution rounds differently in another batch or piece.
        single = self.training or mel.device.type == "mps" or (compatibility is not None and self._single_f0_upstream)
        run = WholePass(lengths, masked=not self.config.is_causal)
        return self.f0_predictor((mel if single else mel.double()).transpose(1, 2), run).float()

    @torch.no_grad()
    def sines(
        self,
        f0: Tensor,
        noise: Tensor | None = None,
        phase: Tensor | None = None,
        generator: torch.Generator | None = None,
        lengths: Tensor | None = None,
        compatibility: str | None = None,
    ) -> Tensor:
        """Sines and noise `(b, n, h)`, float32, without gradient as upstream.

        Args:
            f0 (`(b, t)`): Hz. lengths (`(b,)`): frames of each item. The others: see [`forward`].
        """
        rows, samples = f0.shape[0], f0.shape[1] * self.config.hop_length
        phase = self._initial_phase(rows, phase, generator, f0.device)
        noise = self._noise(rows, samples, generator, f0.device) if noise is None else noise.to(f0.device)
        expected = (rows, samples, self.source.num_sines)
        if tuple(noise.shape) != expected:
            raise ValueError(f"noise: expected {expected}, got {tuple(noise.shape)}")
        frequencies = self.source.frequencies(f0)
        if compatibility is None:
            radians, _ = self.source.radians(frequencies, num_frames=lengths)
        else:
            radians = self.source.upstream_radians(frequencies)
        return self.source.sines(radians, f0, noise, phase)

    def _initial_phase(
        self, rows: int, phase: Tensor | None, generator: torch.Generator | None, device: torch.device
    ) -> Tensor | None:
        """Radians `(rows, h)`, 0 for the fundamental; `None` where the kind of phase has none."""
        if self.config.phase_interpolation != "sample":
            return None
        expected = (rows, self.source.num_sines)
        if phase is None:
            phase = (
                torch.rand(expected, generator=generator, device=_device_of(generator, device)) * 2 - 1
            ) * torch.pi
        if tuple(phase.shape) != expected:
            raise ValueError(f"phase: expected {expected}, got {tuple(phase.shape)}")
        return torch.cat((torch.zeros_like(phase[:, :1]), phase[:, 1:]), dim=1).to(device)

    def _noise(self, rows: int, samples: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
        shape = (rows, samples, self.source.num_sines)
        return torch.randn(shape, generator=generator, device=_device_of(generator, device)).to(device)

    # -- the network -------------------------------------------------------------------------------------------------
    def decode(self, mel: Tensor, source: Tensor, mel_mask: Tensor | None = None) -> Tensor:
        """Waveform `(b, n)` of `mel` `(b, t, num_mel_bins)`, 0 after the end of each item, and excitation `(b, n)`."""
        if mel_mask is not None and (apart := lengths_to_encode_apart(mel, mel_mask)) is not None:
            hop = self.config.hop_length
            waveform, _ = encode_apart(
                lambda row, piece: self._run(piece, source[row : row + 1, : piece.shape[1] * hop], WholePass())[
                    ..., None
                ],
                mel,
                apart,
            )
            waveform = waveform[..., 0]
            return functional.pad(waveform, (0, mel.shape[1] * hop - waveform.shape[1]))
        lengths = None if mel_mask is None else mel_mask.sum(dim=1)
        return self._run(mel, source, WholePass(lengths, masked=not self.config.is_causal))

    def _run(self, mel: Tensor, source: Tensor, run: Pass) -> Tensor:
        """The network against a pass: mel `(b, t, num_mel_bins)`, excitation `(b, n)`."""
        config = self.config
        lengths = run.lengths if isinstance(run, WholePass) else None
        hidden = self.spectrum(mel, source, run)
        half = config.istft_n_fft // 2 + 1
        hidden = hidden.float().transpose(1, 2)
        magnitude = torch.exp(hidden[..., :half]).clamp(max=_LARGEST_MAGNITUDE)
        # Upstream's network gives the sine of something as the phase.
        spectrum = torch.polar(magnitude, torch.sin(hidden[..., half:]))
        frames = None if lengths is None else lengths * (config.hop_length // config.istft_hop_length) + 1
        waveform = overlap_add(spectrum, config.istft_hop_length, run, frames)
        return waveform.clamp(-config.audio_limit, config.audio_limit)

    def spectrum(self, mel: Tensor, source: Tensor, run: Pass | None = None) -> Tensor:
        """Logarithm of the magnitudes over what the phases are the sine of, `(b, istft_n_fft + 2, frames)`."""
        config, run = self.config, WholePass() if run is None else run
        rate, kinds = 1, len(config.resblock_kernel_sizes)
        per_frame = config.hop_length // config.istft_hop_length
        lengths = run.lengths if isinstance(run, WholePass) else None
        samples = None if lengths is None else lengths * config.hop_length
        excitation = real_and_imaginary(source.float(), config.istft_n_fft, config.istft_hop_length, run, samples)
        excitation = run.at(per_frame, 1).zero_padding(excitation.to(self.dtype))
        hidden = run.conv(self.conv_pre, mel.transpose(1, 2))
        for stage, upsample in enumerate(self.upsampler):
            rate *= config.upsample_rates[stage]
            here = run.at(rate)
            hidden = here.upsample(upsample, functional.leaky_relu(hidden, config.leaky_relu_slope))
            if stage == len(self.upsampler) - 1:
                here = run.at(rate, 1)
                hidden = here.reflect_first(hidden)
            driven = self.source_resblocks[stage](here.conv(self.source_downs[stage], excitation), here)
            hidden = here.add(hidden, driven)
            blocks = self.resblocks[stage * kinds : (stage + 1) * kinds]
            outputs = [block(hidden, here) for block in blocks]
            hidden = here.add(*outputs) / kinds
        # torch's default slope here, as upstream.
        return run.at(rate, 1).conv(self.conv_post, functional.leaky_relu(hidden))

    # -- streams -----------------------------------------------------------------------------------------------------
    def start_stream(
        self,
        batch_size: int = 1,
        noise: Tensor | None = None,
        phase: Tensor | None = None,
        generator: torch.Generator | None = None,
        compatibility: str | None = None,
    ) -> CosyVoiceHiftStreamState:
        """The state in front of the first frame of streams that advance together.

        Args:
            noise (`(b, samples, h)`): of the streams' samples in their order, as many as they will have at least.
            phase, generator: see [`forward`].
            compatibility: `"upstream"` streams as upstream does: overlapping pieces, each vocoded anew, with the
                excitation of the overlap kept and the waveforms faded into each other. By default the stream is the
                waveform of one pass.

        Raises:
            ValueError: another `compatibility`, or shapes that do not fit.
        """
        self._check_compatibility(compatibility)
        if noise is not None and (noise.shape[0] != batch_size or noise.shape[2] != self.source.num_sines):
            raise ValueError(
                f"noise: expected {(batch_size, 'samples', self.source.num_sines)}, got {tuple(noise.shape)}"
            )
        if compatibility is None:
            phase = self._initial_phase(batch_size, phase, generator, self.device)
        return CosyVoiceHiftStreamState(
            batch_size,
            noise=noise,
            generator=generator,
            noise_state=self._first_noise_state(),
            phase=phase,
            compatibility=compatibility,
        )

    def _first_noise_state(self) -> Tensor | None:
        """State of the generator of a model that has its own noise."""
        return None

    @torch.no_grad()
    def stream(
        self, mel: Tensor, state: CosyVoiceHiftStreamState, is_last: bool = False
    ) -> tuple[Tensor, CosyVoiceHiftStreamState | None]:
        """The next frames, to the samples that are settled by now.

        Args:
            mel (`(b, t, num_mel_bins)`, float): without padding. 0 frames may end a stream.
            state: what the call before, or `start_stream`, returned.
            is_last: these are the last frames.

        Returns:
            samples `(b, n)`, where `n` may be 0, and the state for the next call; `None` after the last.

        Raises:
            ValueError: shapes that do not fit, or noise that has come to its end.
        """
        self._check_mel(mel)
        if mel.shape[0] != state.batch_size:
            raise ValueError(f"mel: expected a batch of {state.batch_size} streams, got {mel.shape[0]}")
        mel = mel.to(self.dtype)
        if state.compatibility == "upstream":
            waveform, state = self._stream_overlapping(mel, state, is_last)
        else:
            waveform, state = self._stream_exactly(mel, state, is_last)
        return waveform, None if is_last else state

    def _stream_exactly(
        self, mel: Tensor, state: CosyVoiceHiftStreamState, is_last: bool
    ) -> tuple[Tensor, CosyVoiceHiftStreamState]:
        precise = mel if mel.device.type == "mps" else mel.double()
        f0_run, network_run = StreamPass(state.f0, is_last), StreamPass(state.network, is_last)
        f0 = self.f0_predictor(precise.transpose(1, 2), f0_run).float()
        radians, sine = self.source.radians(self.source.frequencies(f0), state.sine, is_last)
        if state.waiting_f0 is not None:
            f0 = torch.cat((state.waiting_f0, f0), dim=1)
        samples = radians.shape[1]
        count = samples // self.config.hop_length
        noise, state = self._next_noise(samples, state)
        source = self.source(self.source.sines(radians, f0[:, :count], noise, state.phase))
        waveform = self._run(mel, source, network_run)
        state = replace(state, f0=f0_run.new, network=network_run.new, sine=sine, waiting_f0=f0[:, count:].clone())
        return waveform, state

    def _next_noise(self, samples: int, state: CosyVoiceHiftStreamState) -> tuple[Tensor, CosyVoiceHiftStreamState]:
        """Noise `(b, samples, h)`, and the state without it."""
        if state.noise is None:
            return self._noise(state.batch_size, samples, state.generator, self.device), state
        if state.noise.shape[1] < samples:
            raise ValueError(f"noise: expected at least {samples} more samples, got {state.noise.shape[1]}")
        taken, left = state.noise[:, :samples], state.noise[:, samples:]
        return taken.to(self.device), replace(state, noise=left)

    def _stream_overlapping(
        self, mel: Tensor, state: CosyVoiceHiftStreamState, is_last: bool
    ) -> tuple[Tensor, CosyVoiceHiftStreamState]:
        """Upstream's `token2wav`: the last `overlap_frames` are vocoded again with the frames that follow them."""
        frames = self.config.overlap_frames
        overlap = frames * self.config.hop_length
        if state.mel is not None:
            mel = torch.cat((state.mel, mel), dim=1)
        noise, state = self._next_noise(mel.shape[1] * self.config.hop_length, state)
        output = self(
            mel,
            noise=noise,
            phase=state.phase,
            generator=state.generator,
            cached_source=state.source,
            compatibility="upstream",
            return_dict=True,
        )
        waveform = output.waveform
        if state.waveform is not None:
            waveform = cross_fade(waveform, state.waveform, hamming_window(2 * overlap, waveform.device))
        if is_last:
            return waveform, state
        state = replace(
            state, mel=mel[:, -frames:], source=output.source[:, -overlap:], waveform=waveform[:, -overlap:]
        )
        return waveform[:, : waveform.shape[1] - overlap], state

    @property
    def stream_lookahead(self) -> int:
        """How many samples a stream is late at most: what the layers on the slowest way wait for."""
        config = self.config
        hop = config.hop_length
        ahead_f0 = sum(layer.right for layer in self.f0_predictor.layers)
        ahead_f0 += config.phase_interpolation == "linear"
        excitation = ahead_f0 * hop + config.istft_n_fft // 2
        lag, rate, kinds = self.conv_pre.right * hop, 1, len(config.resblock_kernel_sizes)

        def wait(block: CosyVoiceHiftResidualBlock) -> int:
            return sum(conv.right for conv in (*block.convs1, *block.convs2))

        for stage, upsample in enumerate(self.upsampler):
            rate *= config.upsample_rates[stage]
            step = hop // rate
            lag += 0 if isinstance(upsample, RepeatConv1d) else upsample.padding[0] * step
            down = self.source_downs[stage]
            driven = excitation + (down.span - down.left) * config.istft_hop_length
            driven += wait(self.source_resblocks[stage]) * step
            blocks = self.resblocks[stage * kinds : (stage + 1) * kinds]
            lag = max(lag, driven) + max(wait(block) for block in blocks) * step
        return lag + self.conv_post.right * config.istft_hop_length + config.istft_n_fft

    # -- arguments ---------------------------------------------------------------------------------------------------
    def _check_mel(self, mel: Tensor) -> None:
        if mel.dim() != 3 or mel.shape[2] != self.config.num_mel_bins:
            raise ValueError(f"mel: expected (batch, frames, {self.config.num_mel_bins}), got {tuple(mel.shape)}")

    @staticmethod
    def _check_compatibility(compatibility: str | None) -> None:
        if compatibility not in (None, "upstream"):
            raise ValueError(f"compatibility: expected None or 'upstream', got {compatibility!r}")

    @staticmethod
    def _lengths(mask: Tensor | None, mel: Tensor) -> Tensor | None:
        """Frames of each item `(b,)`, or `None` where all are as long as the batch."""
        if mask is None:
            return None
        if mask.shape != mel.shape[:2]:
            raise ValueError(f"mel_mask: expected {tuple(mel.shape[:2])}, got {tuple(mask.shape)}")
        lengths = mask.long().sum(dim=1)
        if not torch.equal(torch.arange(mask.shape[1], device=mask.device) < lengths[:, None], mask.bool()):
            raise ValueError("mel_mask: expected 1 for real frames and 0 after them in every row, got another order")
        return None if bool((lengths == mel.shape[1]).all()) else lengths


def _device_of(generator: torch.Generator | None, device: torch.device) -> torch.device:
    """Where numbers are drawn: where the generator is."""
    return device if generator is None else generator.device


CosyVoiceHiftModel.register_for_auto_class("AutoModel")
