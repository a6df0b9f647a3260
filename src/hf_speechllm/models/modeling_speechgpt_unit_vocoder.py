"""Unit HiFi-GAN: speech units to a waveform (`speechgpt_unit_vocoder`).

Paper: https://arxiv.org/abs/2104.00355. Upstream: fairseq, `fairseq/models/text_to_speech/codehifigan.py`, and the
same in facebookresearch/textlesslib, `textless/vocoders/hifigan` (styles, quantised f0). The generator is
transformers' `SpeechT5HifiGan`.

Shape legend: `b` batch, `n` units, `t` frames (a unit lasts one or more), `s` samples.

What differs from upstream: a batch may hold several utterances, of different lengths, and each of them sounds as it
does alone; durations may be given; a unit, speaker, style or bin that does not exist is an error that names it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, SpeechT5HifiGan
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_speechgpt_unit_vocoder import SpeechGptUnitVocoderConfig
from .mixed_lengths import encode_apart, lengths_to_encode_apart
from .pitch_scale import PitchScale
from .streaming_speechgpt_unit_vocoder import UnitVocoderStream
from .unit_string import parse_unit_string


@dataclass
class SpeechGptUnitVocoderOutput(ModelOutput):
    """
    Args:
        loss (scalar): mean squared error of the logarithms of durations, with `duration_labels`.
        waveform (`(b, s)`): zero after the end of each utterance.
        lengths (`(b,)`, int64): samples of each.
        durations (`(b, n)`, int64): frames of each unit that was spoken, 0 on padding.
        log_durations (`(b, n)`): what the predictor said, log(1 + frames), where it was asked; 0 on padding.
        frames (`(b, t, c)`): what entered the generator.
    """

    loss: Tensor | None = None
    waveform: Tensor | None = None
    lengths: Tensor | None = None
    durations: Tensor | None = None
    log_durations: Tensor | None = None
    frames: Tensor | None = None


class SpeechGptUnitVocoderDurationPredictor(nn.Module):
    """log(1 + frames) of each unit: two convolutions with ReLU and layer norm, and a projection."""

    def __init__(self, config: SpeechGptUnitVocoderConfig) -> None:
        super().__init__()
        width, kernel = config.duration_hidden_size, config.duration_kernel_size
        self.conv1 = nn.Conv1d(config.embedding_size, width, kernel, padding=(kernel - 1) // 2)
        self.layer_norm1 = nn.LayerNorm(width)
        # Upstream's padding, whatever the kernel: for any but 3 there are not as many numbers as units.
        self.conv2 = nn.Conv1d(width, width, kernel, padding=1)
        self.layer_norm2 = nn.LayerNorm(width)
        self.proj = nn.Linear(width, 1)
        self.dropout = nn.Dropout(config.duration_dropout)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """`(b, n)` from embedded units `(b, n, embedding_size)`; `mask` `(b, n)`, bool, True = real unit.

        Raises:
            ValueError: a kernel for which upstream has no durations.
        """
        hidden_states = hidden_states * mask[..., None]
        hidden_states = self.conv1(hidden_states.transpose(1, 2)).relu().transpose(1, 2)
        if self.conv1.kernel_size[0] != 3:
            raise ValueError(
                f"duration_kernel_size: expected 3 to predict durations, got {self.conv1.kernel_size[0]}; give "
                "durations, or one unit per frame"
            )
        hidden_states = self.dropout(self.layer_norm1(hidden_states)) * mask[..., None]
        hidden_states = self.conv2(hidden_states.transpose(1, 2)).relu().transpose(1, 2)
        hidden_states = self.dropout(self.layer_norm2(hidden_states))
        return self.proj(hidden_states)[..., 0] * mask


class SpeechGptUnitVocoderModel(PreTrainedModel):
    """Embeddings, duration predictor and generator. `synthesize` speaks a string of units."""

    config_class = SpeechGptUnitVocoderConfig
    config: SpeechGptUnitVocoderConfig
    base_model_prefix = "model"
    main_input_name = "unit_ids"
    output_modalities = ("audio",)
    _no_split_modules = ["HifiGanResidualBlock"]

    def __init__(self, config: SpeechGptUnitVocoderConfig) -> None:
        super().__init__(config)
        size = config.embedding_size
        self.unit_embeddings = nn.Embedding(config.num_units, size)
        if config.use_f0 and config.num_f0_bins:
            self.f0_embeddings = nn.Embedding(config.num_f0_bins, size)
        if config.num_speakers:
            self.speaker_embeddings = nn.Embedding(config.num_speakers, size)
        elif config.speaker_embedding_size:
            self.speaker_proj = nn.Linear(config.speaker_embedding_size, size)
        if config.num_styles:
            self.style_embeddings = nn.Embedding(config.num_styles, size)
        if config.duration_hidden_size:
            self.duration_predictor = SpeechGptUnitVocoderDurationPredictor(config)
        self.generator = SpeechT5HifiGan(config.hifigan_config)
        if config.weight_norm:
            self.generator.apply_weight_norm()
        # As loading sets it, so that a model saved, loaded and saved again has the same configuration.
        config.hifigan_config.dtype = self.dtype
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # The generator initialises itself. For the rest torch's own defaults, as upstream trains from.
        if isinstance(module, nn.Linear | nn.Conv1d):
            init.kaiming_uniform_(module.weight, a=5**0.5)
            bound = module.weight[0].numel() ** -0.5
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)

    def apply_weight_norm(self) -> None:
        """Keep the generator's weights as direction and length, to train them further."""
        self.generator.apply_weight_norm()
        self.config.weight_norm = True

    def fold_weight_norm(self) -> None:
        """Turn direction and length of the generator's weights into plain weights: the end of a training."""
        for module in self.generator.modules():
            if parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
        self.config.weight_norm = False

    # -- units to waveform -------------------------------------------------------------------------------------------
    def forward(
        self,
        unit_ids: Tensor,
        attention_mask: Tensor | None = None,
        durations: Tensor | None = None,
        predict_durations: bool | None = None,
        speaker_id: Tensor | int | None = None,
        speaker_embeddings: Tensor | None = None,
        style_id: Tensor | int | None = None,
        f0: Tensor | None = None,
        f0_attention_mask: Tensor | None = None,
        duration_unit_ids: Tensor | None = None,
        duration_labels: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> SpeechGptUnitVocoderOutput | tuple:
        """
        Args:
            unit_ids (`(b, n)`, int64): negative entries are dropped. attention_mask (`(b, n)`): 1 = real unit.
            durations (`(b, n)`, int64): frames of each unit; default: see `predict_durations`.
            predict_durations: whether the model finds the durations; otherwise each unit is one frame. Default: if it
                can, and none are given.
            speaker_id, style_id (`(b,)` or one for all): rows of the embeddings; 0 by default.
            speaker_embeddings (`(b, speaker_embedding_size)`): vectors of speakers, for a model that takes these.
            f0 (`(b, k)`), f0_attention_mask (`(b, k)`, 1 = real): bins, or pitch; see [`encode_f0`]. In each row as
                many as units or frames, or a multiple or a divisor of them. Default mask: that of the units as far as
                `k` is a multiple of `n`, else all real.
            duration_unit_ids, duration_labels (`(b, m)`, int64): reduced units of whole utterances with their frames,
                for `loss`; labels of 0 are padding.

        Raises:
            ValueError: an argument that the model has no use for, or lacks; ids that do not exist; pitch whose length
                does not fit.

        Example:

        ```python
        >>> output = model(torch.tensor([[189, 63, 991]]))
        >>> waveform = output.waveform[0, : output.lengths[0]]
        ```
        """
        config = self.config
        unit_ids = torch.as_tensor(unit_ids, device=self.device)
        if unit_ids.dim() != 2:
            raise ValueError(f"unit_ids: expected (batch, units), got {tuple(unit_ids.shape)}")
        kept = unit_ids >= 0
        if attention_mask is not None:
            kept = kept & attention_mask.to(kept.device).bool()
        if config.use_f0 != (f0 is not None):
            raise ValueError(f"f0: expected {'pitch' if config.use_f0 else 'none'} for this model")
        pitch = None if f0 is None else self._pitch_rows(f0.to(kept.device), f0_attention_mask, unit_ids, kept)
        units, unit_mask, durations = self._drop_invalid(unit_ids, kept, durations)
        self._check_ids("unit_ids", units, config.num_units)

        if predict_durations is None:
            predict_durations = durations is None and bool(config.duration_hidden_size)
        log_durations = None
        if predict_durations:
            if durations is not None:
                raise ValueError("predict_durations: expected false where durations are given")
            log_durations = self.predict_log_durations(units, unit_mask)
            durations = self.frames_of(log_durations)
        elif durations is None:
            durations = torch.ones_like(units)
        durations = durations * unit_mask

        frames, counts = self._frames(units, durations, pitch)
        frames = self._add_voice(frames, speaker_id, speaker_embeddings, style_id)
        waveform, lengths = self._generate(frames, counts)
        output = SpeechGptUnitVocoderOutput(None, waveform, lengths, durations, log_durations, frames)
        if duration_labels is not None:
            output.loss = self._duration_loss(duration_unit_ids, duration_labels)
        return_dict = config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def synthesize_batch(
        self,
        units: Sequence[str | Sequence[int] | Tensor],
        speaker: str | int | Sequence[str | int] | None = None,
        style: str | int | Sequence[str | int] | None = None,
        durations: Sequence[Sequence[int] | Tensor] | Tensor | None = None,
        **options,
    ) -> list[Tensor]:
        """Waveforms of utterances, in one batch.

        Args:
            units: strings such as `<sosp><12><7><eosp>`, or ids.
            speaker, style: names or numbers, one for all or one for each.
            durations: frames of each unit of each utterance, e.g. those of `speechgpt_units`; default: predicted.
            options: of [`forward`], e.g. `predict_durations=False` for one unit per frame.

        Returns:
            `(samples,)` float32 each, at `config.sampling_rate`; empty for an utterance without a unit.

        Raises:
            ValueError: see [`forward`]; a name that the model does not have.
        """
        rows = [
            torch.as_tensor(parse_unit_string(row) if isinstance(row, str) else row, dtype=torch.long).flatten()
            for row in units
        ]
        if not rows:
            return []
        unit_ids = pad_sequence(rows, batch_first=True, padding_value=-1)
        if durations is not None:
            frames = [torch.as_tensor(row, dtype=torch.long).flatten() for row in durations]
            if [len(row) for row in frames] != [len(row) for row in rows]:
                raise ValueError(
                    f"durations: expected one for each of {[len(row) for row in rows]} units, got "
                    f"{[len(row) for row in frames]}"
                )
            options["durations"] = pad_sequence(frames, batch_first=True)
        options |= self._voice_numbers(speaker, style, len(rows))
        output = self(unit_ids, return_dict=True, **options)
        return [wave[:length].float() for wave, length in zip(output.waveform, output.lengths.tolist(), strict=True)]

    def synthesize(
        self,
        units: str | Sequence[int] | Tensor,
        speaker: str | int | None = None,
        style: str | int | None = None,
        durations: Sequence[int] | Tensor | None = None,
        **options,
    ) -> Tensor:
        """Waveform `(samples,)` of one utterance; see [`synthesize_batch`].

        Example:

        ```python
        >>> waveform = model.synthesize("<sosp><189><63><991><eosp>")
        ```
        """
        durations = None if durations is None else [durations]
        return self.synthesize_batch([units], speaker, style, durations, **options)[0]

    def start_stream(
        self, speaker: str | int | None = None, style: str | int | None = None, **options
    ) -> UnitVocoderStream:
        """State of an utterance whose units come one by one; the arguments are those of [`synthesize`].

        Raises:
            ValueError: a name that the model does not have. The first sound raises what [`forward`] raises.

        Example:

        ```python
        >>> stream = model.start_stream()
        >>> pieces = [stream.push([189, 63]), stream.push([991], is_last=True)]
        ```
        """
        return UnitVocoderStream(self, **self._voice_numbers(speaker, style, 1), **options)

    # -- pitch -------------------------------------------------------------------------------------------------------
    @property
    def pitch_scale(self) -> PitchScale:
        """How Hz become the `f0` of [`forward`].

        Raises:
            ValueError: a model that takes no pitch, or does not say how its pitch is made.
        """
        config = self.config
        if not config.use_f0:
            raise ValueError("use_f0: expected true for a pitch, got false")
        if config.f0_range is None:
            raise ValueError("f0_range: expected the lowest and the highest pitch in Hz, got None")
        return PitchScale(*config.f0_range, num_bins=config.num_f0_bins)

    def encode_f0(self, f0: Tensor) -> Tensor:
        """Frequencies in Hz, 0 = no voice, to what [`forward`] takes as `f0`, of the same shape.

        Raises:
            ValueError: see [`pitch_scale`].

        Example:

        ```python
        >>> f0 = model.encode_f0(torch.tensor([[0.0, 110.0, 112.5]]))
        >>> waveform = model.synthesize([189, 63, 991], predict_durations=False, f0=f0)
        ```
        """
        return self.pitch_scale.encode(f0)

    # -- durations ---------------------------------------------------------------------------------------------------
    def predict_log_durations(self, unit_ids: Tensor, mask: Tensor) -> Tensor:
        """log(1 + frames) of each unit `(b, n)`; `mask` `(b, n)`, bool, True = real.

        Raises:
            ValueError: a model without a predictor.
        """
        if not self.config.duration_hidden_size:
            raise ValueError("predict_durations: expected false, this model does not predict durations")
        if unit_ids.numel() == 0:  # less than a kernel, even with its padding
            return self.unit_embeddings.weight.new_zeros(unit_ids.shape)
        return self.duration_predictor(self.unit_embeddings(unit_ids), mask)

    @staticmethod
    def frames_of(log_durations: Tensor) -> Tensor:
        """Whole frames, at least one each: max(1, round(exp(x) - 1)), halves to the even."""
        return (log_durations.float().exp() - 1).round().long().clamp_min(1)

    def _duration_loss(self, unit_ids: Tensor, labels: Tensor) -> Tensor:
        mask = labels > 0
        predicted = self.predict_log_durations(unit_ids.masked_fill(~mask, 0), mask)
        errors = (predicted.float() - (labels + 1).float().log()).square() * mask
        return errors.sum() / mask.sum().clamp_min(1)

    # -- what enters the generator -----------------------------------------------------------------------------------
    def _drop_invalid(
        self, unit_ids: Tensor, kept: Tensor, durations: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Real units moved to the front: ids `(b, n)` with 0 as padding, their mask, and their durations."""
        if durations is not None:
            durations = torch.as_tensor(durations, device=unit_ids.device)
            if durations.shape != unit_ids.shape or bool((durations[kept] < 0).any()):
                raise ValueError(f"durations: expected {tuple(unit_ids.shape)} numbers, none of them negative")
        if bool(kept.all()):
            return unit_ids, kept, durations
        counts = kept.sum(dim=1)
        mask = torch.arange(int(counts.max()), device=kept.device) < counts[:, None]

        def compact(values: Tensor) -> Tensor:
            return values.new_zeros(mask.shape).masked_scatter(mask, values[kept])

        return compact(unit_ids), mask, None if durations is None else compact(durations)

    def _pitch_rows(self, f0: Tensor, f0_mask: Tensor | None, unit_ids: Tensor, kept: Tensor) -> list[Tensor]:
        """Pitch of each row, without padding and without that of dropped units."""
        ratio, rest = divmod(f0.shape[1], max(1, unit_ids.shape[1]))
        rows = []
        for row, values in enumerate(f0):
            if f0_mask is not None:
                rows.append(values[f0_mask[row].bool()])
            elif rest == 0:
                rows.append(values[kept[row].repeat_interleave(ratio)])
            else:
                rows.append(values)
        return rows

    def _frames(self, units: Tensor, durations: Tensor, pitch: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        """Embedded units, one per frame, with pitch: `(b, t, c)`, and how many frames are real `(b,)`."""
        rows = [torch.repeat_interleave(row, counts) for row, counts in zip(units, durations, strict=True)]
        if pitch is None:
            counts = torch.tensor([len(row) for row in rows], device=units.device)
            return self.unit_embeddings(pad_sequence(rows, batch_first=True)), counts
        found = []
        for number, (row, values) in enumerate(zip(rows, pitch, strict=True)):
            if len(values) == 0 or len(row) == 0 or max(len(row), len(values)) % min(len(row), len(values)):
                raise ValueError(
                    f"f0[{number}]: expected a multiple or a divisor of {len(row)} frames, got {len(values)} values"
                )
            # The shorter of the two is stretched to the other.
            length = max(len(row), len(values))
            row, values = (side.repeat_interleave(length // len(side)) for side in (row, values))
            if self.config.num_f0_bins:
                self._check_ids("f0", values.long(), self.config.num_f0_bins)
                embedded = self.f0_embeddings(values.long())
            else:
                embedded = values[:, None].to(self.unit_embeddings.weight.dtype)
            found.append(torch.cat([self.unit_embeddings(row), embedded], dim=1))
        counts = torch.tensor([len(row) for row in found], device=units.device)
        return pad_sequence(found, batch_first=True), counts

    def _add_voice(
        self,
        frames: Tensor,
        speaker_id: Tensor | int | None,
        speaker_embeddings: Tensor | None,
        style_id: Tensor | int | None,
    ) -> Tensor:
        """Speaker and style beside every frame."""
        config, parts = self.config, [frames]
        batch, length = frames.shape[:2]
        if config.speaker_embedding_size:
            if speaker_embeddings is None or speaker_embeddings.shape != (batch, config.speaker_embedding_size):
                raise ValueError(
                    f"speaker_embeddings: expected {(batch, config.speaker_embedding_size)}, got "
                    f"{None if speaker_embeddings is None else tuple(speaker_embeddings.shape)}"
                )
            voice = self.speaker_proj(speaker_embeddings.to(frames))
            parts.append(voice[:, None].expand(-1, length, -1))
        elif speaker_embeddings is not None:
            raise ValueError("speaker_embeddings: expected none for this model")
        for name, rows, ids in (
            ("speaker_id", config.num_speakers, speaker_id),
            ("style_id", config.num_styles, style_id),
        ):
            if rows:
                ids = torch.as_tensor(0 if ids is None else ids, device=frames.device).expand(batch)
                self._check_ids(name, ids, rows)
                table = self.speaker_embeddings if name == "speaker_id" else self.style_embeddings
                parts.append(table(ids)[:, None].expand(-1, length, -1))
            elif ids is not None:
                raise ValueError(f"{name}: expected none, this model has one {name.removesuffix('_id')}")
        return torch.cat(parts, dim=2) if len(parts) > 1 else frames

    @staticmethod
    def _check_ids(name: str, ids: Tensor, rows: int) -> None:
        wrong = (ids < 0) | (ids >= rows)
        if bool(wrong.any()):
            raise ValueError(f"{name}: expected 0..{rows - 1}, got {int(ids[wrong][0])}")

    def _voice_numbers(
        self,
        speaker: str | int | Sequence[str | int] | None,
        style: str | int | Sequence[str | int] | None,
        count: int,
    ) -> dict[str, Tensor]:
        """`speaker_id` and `style_id` `(count,)` for [`forward`], of those that are given."""
        names = {"speaker": self.config.speakers, "style": self.config.styles}
        given = {"speaker": speaker, "style": style}
        return {
            f"{kind}_id": self._numbers_of(value, names[kind], kind, count)
            for kind, value in given.items()
            if value is not None
        }

    @staticmethod
    def _numbers_of(values: str | int | Sequence[str | int], names: list[str] | None, kind: str, count: int) -> Tensor:
        is_one = isinstance(values, str | Integral) or (isinstance(values, Tensor) and values.dim() == 0)
        rows = [values] * count if is_one else list(values)
        if len(rows) != count:
            raise ValueError(f"{kind}: expected one, or one for each of {count} utterances, got {len(rows)}")
        for value in rows:
            is_number = isinstance(value, Integral | Tensor)
            if not is_number and value not in (names or []):
                raise ValueError(f"{kind}: expected a number or one of {names}, got {value!r}")
        return torch.tensor([names.index(value) if isinstance(value, str) else int(value) for value in rows])

    # -- generator ---------------------------------------------------------------------------------------------------
    def _generate(self, frames: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Waveforms `(b, s)` of frames `(b, t, c)` of which the first `counts` are real, and their lengths."""
        lengths = torch.tensor([self.config.num_samples(count) for count in counts.tolist()], device=frames.device)
        if frames.shape[1] == 0 or len(frames) == 0:
            return frames.new_zeros(frames.shape[:2]), lengths
        if bool((counts == frames.shape[1]).all()):
            return self.generator(frames), lengths
        mask = torch.arange(frames.shape[1], device=frames.device) < counts[:, None]
        if (apart := lengths_to_encode_apart(frames, mask)) is not None:
            waveform, _ = encode_apart(lambda row, piece: self.generator(piece)[..., None], frames, apart)
            return waveform[..., 0], lengths
        return self._generate_masked(frames, counts), lengths

    def _generate_masked(self, frames: Tensor, counts: Tensor) -> Tensor:
        """The generator on a padded batch: before every convolution, what lies after an utterance is zero, as the
        padding of a convolution would be."""
        generator, slope = self.generator, self.generator.config.leaky_relu_slope
        stages = [self.config.stage_lengths(count) for count in counts.tolist()]

        def mask_of(lengths: Sequence[int], hidden: Tensor) -> Tensor:
            ends = torch.tensor(lengths, device=hidden.device)[:, None]
            return (torch.arange(hidden.shape[2], device=hidden.device) < ends)[:, None].to(hidden.dtype)

        hidden = frames.transpose(1, 2)
        mask = mask_of(counts.tolist(), hidden)
        hidden = generator.conv_pre(hidden * mask)
        for stage, upsample in enumerate(generator.upsampler):
            hidden = upsample(nn.functional.leaky_relu(hidden, slope) * mask)
            mask = mask_of([lengths[stage] for lengths in stages], hidden)
            hidden = hidden * mask
            first = stage * generator.num_kernels
            total = None
            for block in generator.resblocks[first : first + generator.num_kernels]:
                state = hidden
                for conv1, conv2 in zip(block.convs1, block.convs2, strict=True):
                    inner = conv1(nn.functional.leaky_relu(state, slope)) * mask
                    state = state + conv2(nn.functional.leaky_relu(inner, slope)) * mask
                total = state if total is None else total + state
            hidden = total / generator.num_kernels
        hidden = generator.conv_post(nn.functional.leaky_relu(hidden))
        return (hidden.tanh() * mask)[:, 0]


SpeechGptUnitVocoderModel.register_for_auto_class("AutoModel")
