"""SpeechTokenizer: a neural codec whose first codebook says what is spoken and whose others say how.

Paper: https://arxiv.org/abs/2308.16692. Upstream: ZhangXInFD/SpeechTokenizer, `speechtokenizer/model.py`.

Shape legend: `b` batch, `q` quantizers, `frames` of `config.hop_length` samples (the last one is completed).

What differs from upstream: items of unequal length share a batch and give what each gives alone, and codes of the
levels after the first are those of what the levels before leave over, unless asked otherwise (`first_quantizer_from`).

Causality: the architecture is not causal. Every convolution sees later samples, and the encoder's LSTM reads the whole
waveform backwards, so encoding cannot stream. The decoder's LSTM reads forward and its convolutions see a bounded
number of later frames (`decoder_lookahead_ms`, 75 ms for the published shape), so that
[`SpeechTokenizerModel.decode_stream`] gives the samples of [`SpeechTokenizerModel.decode`], that much later.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedAudioTokenizerBase
from transformers.utils import ModelOutput

from .configuration_speechtokenizer import SpeechTokenizerConfig
from .residual_vector_quantizer import EmaCodebook, ResidualVectorQuantizer
from .seanet import SeanetDecoder, SeanetDecoderState, SeanetEncoder, SeanetShape, Snake


@dataclass
class SpeechTokenizerEncoderOutput(ModelOutput):
    """What `encode` gives.

    Args:
        audio_codes (`(b, q, frames)`, int64): -1 after the end of an item.
        code_lengths (`(b,)`, int64): frames of every item.
    """

    audio_codes: Tensor | None = None
    code_lengths: Tensor | None = None


@dataclass
class SpeechTokenizerDecoderOutput(ModelOutput):
    """What `decode` gives.

    Args:
        audio_values (`(b, 1, samples)`, float): 0 after the end of an item.
        audio_lengths (`(b,)`, int64): samples of every item.
    """

    audio_values: Tensor | None = None
    audio_lengths: Tensor | None = None


@dataclass
class SpeechTokenizerOutput(ModelOutput):
    """What the forward pass gives, for training.

    Args:
        audio_values (`(b, 1, frames * hop_length)`, float): the reconstruction, 0 after the end of an item.
        commitment_loss (scalar): mean squared distance of what is quantized to the codewords, 0 in evaluation.
        semantic_features (`(b, frames, semantic_hidden_size)`, float): the first level in the space of the teacher.
        audio_codes (`(b, q, frames)`, int64), code_lengths (`(b,)`, int64): see [`SpeechTokenizerEncoderOutput`].
    """

    audio_values: Tensor | None = None
    commitment_loss: Tensor | None = None
    semantic_features: Tensor | None = None
    audio_codes: Tensor | None = None
    code_lengths: Tensor | None = None


def lengths_from_mask(mask: Tensor | None, rows: int, width: int, name: str) -> list[int]:
    """Length of every row of `mask` `(rows, width)`, 1 = real; all `width` without a mask.

    Raises:
        ValueError: another shape, an empty row, or padding that is not at the end.
    """
    if mask is None:
        lengths = [width] * rows
    else:
        if mask.shape != (rows, width):
            raise ValueError(f"{name}: expected the shape {(rows, width)}, got {tuple(mask.shape)}")
        counts = mask.long().sum(dim=1)
        if not torch.equal(torch.arange(width, device=mask.device) < counts[:, None], mask.bool()):
            raise ValueError(f"{name}: expected 1 for what is real and 0 after it in every row, got another order")
        lengths = counts.tolist()
    if min(lengths, default=0) < 1:
        raise ValueError(f"{name}: expected at least 1 in every item, got lengths {lengths}")
    return lengths


def apply_by_length(function: Callable[[Tensor], Tensor], batch: Tensor, lengths: list[int]) -> Tensor:
    """Apply `function`, `(n, c, t)` → `(n, c', t')`, to the items of equal length together.

    The edges are reflected and an LSTM may read backwards, so that an item must be seen at its own length.

    Args:
        batch: `(b, c, max(lengths))` or wider.
    Returns:
        `(b, c', max t')`, 0 after the end of an item.
    """
    rows_of: dict[int, list[int]] = defaultdict(list)
    for row, length in enumerate(lengths):
        rows_of[length].append(row)
    if len(rows_of) == 1:
        return function(batch[..., : lengths[0]])
    items: dict[int, Tensor] = {}
    for length, rows in rows_of.items():
        items |= zip(rows, function(batch[rows, :, :length]), strict=True)
    width = max(item.shape[-1] for item in items.values())
    return torch.stack([functional.pad(items[row], (0, width - items[row].shape[-1])) for row in range(len(lengths))])


class SpeechTokenizerModel(PreTrainedAudioTokenizerBase):
    """The codec: `encode` waveforms to codes, `decode` codes to waveforms, and the forward pass for training."""

    config_class = SpeechTokenizerConfig
    config: SpeechTokenizerConfig
    base_model_prefix = "model"
    main_input_name = "input_values"
    input_modalities = ("audio",)
    # A codeword is found by distances whose differences 16 bits do not resolve.
    _keep_in_fp32_modules_strict = ["quantizer"]

    def __init__(self, config: SpeechTokenizerConfig) -> None:
        super().__init__(config)
        shape = SeanetShape(
            num_filters=config.num_filters,
            ratios=tuple(config.upsampling_ratios),
            hidden_size=config.hidden_size,
            num_residual_layers=config.num_residual_layers,
            residual_kernel_size=config.residual_kernel_size,
            dilation_growth_rate=config.dilation_growth_rate,
            num_lstm_layers=config.num_lstm_layers,
            bidirectional=config.use_bidirectional_lstm,
            activation=config.hidden_act,
            use_weight_norm=config.use_weight_norm,
        )
        self.encoder = SeanetEncoder(shape)
        self.quantizer = ResidualVectorQuantizer(
            config.num_quantizers,
            config.codebook_size,
            config.hidden_size,
            config.codebook_decay,
            config.dead_code_threshold,
            config.kmeans_iterations,
        )
        self.decoder = SeanetDecoder(shape)
        self.semantic_projection = (
            nn.Identity()
            if config.hidden_size == config.semantic_hidden_size
            else nn.Linear(config.hidden_size, config.semantic_hidden_size)
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # torch's own defaults, as upstream trains from.
        if isinstance(module, nn.Linear | nn.Conv1d | nn.ConvTranspose1d):
            if parametrize.is_parametrized(module, "weight"):
                magnitude = module.parametrizations.weight.original0
                weight = module.parametrizations.weight.original1
                init.kaiming_uniform_(weight, a=5**0.5)
                init.copy_(magnitude, torch.norm_except_dim(weight, 2, 0))
            else:
                weight = module.weight
                init.kaiming_uniform_(weight, a=5**0.5)
            bound = weight[0].numel() ** -0.5
            init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LSTM):
            bound = module.hidden_size**-0.5
            for parameter in module.parameters():
                init.uniform_(parameter, -bound, bound)
        elif isinstance(module, Snake):
            init.ones_(module.alpha)
        elif isinstance(module, EmaCodebook):
            for buffer in module.buffers():
                init.zeros_(buffer)

    def encode(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        num_quantizers: int | None = None,
        first_quantizer: int = 0,
        first_quantizer_from: str = "residual",
        padding_mask: Tensor | None = None,
    ) -> SpeechTokenizerEncoderOutput:
        """Waveforms to codes.

        Args:
            input_values (`(b, samples)` or `(b, 1, samples)`, float): at `config.sampling_rate`, about -1..1.
            attention_mask (`(b, samples)`): 1 = real sample, 0 = padding after the end; `None` = all real.
            num_quantizers: levels up to this one, those before `first_quantizer` included; default all.
            first_quantizer: the first level (from 0) whose codes are given.
            first_quantizer_from: what that level quantizes. `"residual"`: what the levels before leave over, so that
                the codes are those of `encode(...)` from that level on. `"input"`: the encoder's frames themselves,
                nothing subtracted, which is what upstream's `encode(st=...)` does.
            padding_mask: the mask under the name that `EncodecFeatureExtractor` gives it.
        Returns:
            codes `(b, num_quantizers - first_quantizer, frames)`.
        Raises:
            ValueError: an empty item, a mask with padding in front, levels that are not there, or two masks.
        """
        num_quantizers = self._check_levels(num_quantizers, first_quantizer)
        if first_quantizer_from not in ("residual", "input"):
            raise ValueError(f"first_quantizer_from: expected 'residual' or 'input', got {first_quantizer_from!r}")
        frames, lengths = self._encode_frames(input_values, self._one_mask(attention_mask, padding_mask))
        real = self._real_frames(lengths, frames)
        with torch.autocast(frames.device.type, enabled=False):
            vectors = frames.transpose(1, 2)[real].float()
            codes = self.quantizer.encode(
                vectors, num_quantizers, first_quantizer, subtract_skipped=first_quantizer_from == "residual"
            )
        return SpeechTokenizerEncoderOutput(
            audio_codes=self._put_back(codes.T, real, -1).transpose(1, 2),
            code_lengths=torch.tensor(lengths, device=frames.device),
        )

    def get_quantized(self, audio_codes: Tensor, first_quantizer: int = 0) -> Tensor:
        """Sum of the codewords of `audio_codes` `(b, q, frames)`, the levels from `first_quantizer` on.

        Returns:
            float32 `(b, frames, hidden_size)`, 0 where the codes are -1.
        Raises:
            ValueError: another shape, levels that are not there, codes outside of the codebook, or padding in some
                levels of a frame only.
        """
        if audio_codes.dim() != 3:
            raise ValueError(f"audio_codes: expected (batch, quantizers, frames), got {tuple(audio_codes.shape)}")
        self._check_levels(first_quantizer + audio_codes.shape[1], first_quantizer)
        size = self.config.codebook_size
        if audio_codes.numel() and not -1 <= int(audio_codes.min()) <= int(audio_codes.max()) < size:
            raise ValueError(
                f"audio_codes: expected -1..{size - 1}, got {int(audio_codes.min())}..{int(audio_codes.max())}"
            )
        if not bool(((audio_codes >= 0) == (audio_codes[:, :1] >= 0)).all()):
            raise ValueError("audio_codes: expected padding (-1) in all levels of a frame or in none")
        quantized = self.quantizer.decode(audio_codes.clamp_min(0).transpose(0, 1), first_quantizer)
        return quantized * (audio_codes[:, 0] >= 0)[..., None]

    def decode(
        self, audio_codes: Tensor, first_quantizer: int = 0, num_samples: Tensor | None = None
    ) -> SpeechTokenizerDecoderOutput:
        """Codes to waveforms.

        Args:
            audio_codes (`(b, q, frames)`, int64): of levels from `first_quantizer` on; -1 after the end of an item.
            first_quantizer: level (from 0) of the first of them.
            num_samples (`(b,)`, int64): samples that were encoded; the output is trimmed to them. By default it keeps
                all `frames * hop_length`, as upstream.
        Raises:
            ValueError: an empty item, levels that are not there, or codes outside of the codebook.
        """
        quantized = self.get_quantized(audio_codes, first_quantizer)
        rows, _, width = audio_codes.shape
        lengths = lengths_from_mask(audio_codes[:, 0] >= 0, rows, width, "audio_codes")
        audio = self._decode_frames(quantized, lengths)
        return self._trim(audio, torch.tensor(lengths, device=audio.device) * self.config.hop_length, num_samples)

    def decode_stream(
        self,
        audio_codes: Tensor,
        state: SeanetDecoderState | None = None,
        is_last: bool = False,
        first_quantizer: int = 0,
    ) -> tuple[Tensor, SeanetDecoderState | None]:
        """The next codes of streams that advance together, to the samples that are settled by now.

        All pieces together are what `decode` makes of all codes; they come `decoder_lookahead` samples late, the rest
        with the last piece.

        Args:
            audio_codes (`(b, q, frames)`, int64): without padding. 0 frames may end a stream.
            state: what the call before returned; `None` starts streams. It is not changed.
            is_last: these are the last codes.
            first_quantizer: see `decode`.
        Returns:
            samples `(b, 1, n)`, where n may be 0, and the state for the next call; `None` after the last.
        Raises:
            ValueError: see `decode`; also padding among the codes.
        """
        if audio_codes.numel() and int(audio_codes.min()) < 0:
            raise ValueError("audio_codes: expected no padding in a stream, got -1")
        quantized = self.get_quantized(audio_codes, first_quantizer)
        frames = quantized.transpose(1, 2).to(self._network_dtype)
        audio, state = self.decoder.stream(frames, state, is_last)
        return audio, None if is_last else state

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        num_quantizers: int | None = None,
        padding_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> SpeechTokenizerOutput | tuple[Tensor, ...]:
        """Encode and decode; in training mode the codebooks move, see [`EmaCodebook`].

        Args:
            input_values, attention_mask, num_quantizers, padding_mask: see `encode`.
            generator: of k-means on the first batch and of the vectors that replace dead codewords; default torch's.
        """
        num_quantizers = self._check_levels(num_quantizers, 0)
        frames, lengths = self._encode_frames(input_values, self._one_mask(attention_mask, padding_mask))
        real = self._real_frames(lengths, frames)
        with torch.autocast(frames.device.type, enabled=False):
            vectors = frames.transpose(1, 2)[real].float()
            quantized, codes, commitment_loss, first = self.quantizer(vectors, num_quantizers, generator)
        semantic = self.semantic_projection(first.to(self._network_dtype))
        output = SpeechTokenizerOutput(
            audio_values=self._decode_frames(self._put_back(quantized, real, 0.0), lengths),
            commitment_loss=commitment_loss,
            semantic_features=self._put_back(semantic, real, 0.0),
            audio_codes=self._put_back(codes.T, real, -1).transpose(1, 2),
            code_lengths=torch.tensor(lengths, device=frames.device),
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    @property
    def decoder_lookahead(self) -> int:
        """Samples by which `decode_stream` is late."""
        return self.decoder.lookahead

    @property
    def decoder_lookahead_ms(self) -> float:
        """The same in milliseconds."""
        return 1000 * self.decoder_lookahead / self.config.sampling_rate

    @torch.no_grad()
    def remove_weight_norm(self) -> None:
        """Fold the direction and magnitude of every convolution into one weight, for inference.

        The model gives the same, and its checkpoint loads as a folded one (`use_weight_norm: false`). Training goes on
        better from the one with both.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv1d | nn.ConvTranspose1d) and parametrize.is_parametrized(module, "weight"):
                parametrize.remove_parametrizations(module, "weight")
        self.config.use_weight_norm = False

    # -- pieces ------------------------------------------------------------------------------------------------------
    @property
    def _network_dtype(self) -> torch.dtype:
        return self.encoder.input_conv.conv.bias.dtype

    def _check_levels(self, num_quantizers: int | None, first_quantizer: int) -> int:
        """The number of levels up to the last one that is used."""
        total = self.config.num_quantizers
        num_quantizers = total if num_quantizers is None else num_quantizers
        if not 0 <= first_quantizer < num_quantizers <= total:
            raise ValueError(
                f"first_quantizer, num_quantizers: expected 0 <= first < number <= {total}, "
                f"got {first_quantizer} and {num_quantizers}"
            )
        return num_quantizers

    @staticmethod
    def _one_mask(attention_mask: Tensor | None, padding_mask: Tensor | None) -> Tensor | None:
        if attention_mask is not None and padding_mask is not None:
            raise ValueError("attention_mask, padding_mask: expected one of them, got both")
        return padding_mask if attention_mask is None else attention_mask

    def _encode_frames(self, input_values: Tensor, mask: Tensor | None) -> tuple[Tensor, list[int]]:
        """Frames of the encoder `(b, hidden_size, frames)`, and how many each item has."""
        if input_values.dim() == 2:
            input_values = input_values[:, None]
        if input_values.dim() != 3 or input_values.shape[1] != 1:
            raise ValueError(
                f"input_values: expected (batch, samples) or (batch, 1, samples), got {tuple(input_values.shape)}"
            )
        rows, _, samples = input_values.shape
        lengths = lengths_from_mask(mask, rows, samples, "attention_mask")
        frames = apply_by_length(self.encoder, input_values.to(self._network_dtype), lengths)
        return frames, [-(-length // self.config.hop_length) for length in lengths]

    def _decode_frames(self, quantized: Tensor, lengths: list[int]) -> Tensor:
        """Waveforms `(b, 1, samples)` of summed codewords `(b, frames, hidden_size)`."""
        return apply_by_length(self.decoder, quantized.transpose(1, 2).to(self._network_dtype), lengths)

    @staticmethod
    def _real_frames(lengths: list[int], frames: Tensor) -> Tensor:
        """Bool `(b, frames)`, True = real."""
        counts = torch.tensor(lengths, device=frames.device)
        return torch.arange(frames.shape[-1], device=frames.device) < counts[:, None]

    @staticmethod
    def _put_back(vectors: Tensor, real: Tensor, filler: float) -> Tensor:
        """Rows `(n, d)` at the True places of `real` `(b, frames)`: `(b, frames, d)`, `filler` elsewhere."""
        if bool(real.all()):
            return vectors.unflatten(0, real.shape)
        output = vectors.new_full((*real.shape, vectors.shape[-1]), filler)
        return output.masked_scatter(real[..., None], vectors)

    @staticmethod
    def _trim(audio: Tensor, lengths: Tensor, num_samples: Tensor | None) -> SpeechTokenizerDecoderOutput:
        if num_samples is not None:
            lengths = torch.minimum(lengths, torch.as_tensor(num_samples, device=lengths.device))
            audio = audio[..., : int(lengths.max())]
            real = torch.arange(audio.shape[-1], device=audio.device) < lengths[:, None]
            audio = audio * real[:, None]
        return SpeechTokenizerDecoderOutput(audio_values=audio, audio_lengths=lengths)


SpeechTokenizerModel.register_for_auto_class("AutoModel")
