"""CosyVoice 1's flow (`cosyvoice_flow`): speech tokens to a mel spectrogram, whole or in overlapping pieces.

Paper: https://arxiv.org/abs/2407.05407. Upstream: `MaskedDiffWithXvec` in `cosyvoice/flow/flow.py`, and the stream in
`cosyvoice/cli/model.py`.

The networks look both ways, so a stream is not the whole in pieces: as upstream, each piece is computed with the
prompt in front and a few tokens after it, starts from the noise and the conditions that the piece before ended with,
and is faded into it.

Shape legend: `b` batch, `n` tokens, `t` frames, `m` mel bins, `c` channels. In every mask 1 = real.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .configuration_cosyvoice_flow import CosyVoiceFlowConfig
from .flow_matching import FlowMatchingDraws, draw_flow_matching
from .length_regulator import LengthRegulator
from .mixed_lengths import lengths_to_encode_apart
from .ragged_rows import drop_beginnings, join_rows, length_mask, padding_mask, row_lengths
from .relative_position_encoder import RelativePositionEncoder
from .token_to_mel import TokenToMelInputs, TokenToMelModel, TokenToMelOutput, TokenToMelTrainingOutput
from .unet_1d import UNet1d


# Frames at the end of a piece whose noise and conditions the next piece starts with, whatever the rate of the tokens.
_OVERLAP_FRAMES = 34
# Tokens that two pieces share.
_OVERLAP_TOKENS = 20


@dataclass
class MelOverlap:
    """Noise and conditions that the next piece of one row must start with.

    Args:
        noise, conditions (`(t, m)`): the frames of the prompt, then the last ones of the piece before.
    """

    noise: Tensor
    conditions: Tensor


@dataclass
class CosyVoiceFlowOutput(TokenToMelOutput):
    """
    Args:
        mel, mel_mask: see [`TokenToMelOutput`].
        overlaps (`list` of [`MelOverlap`]): for the next piece, one a row.
    """

    overlaps: list[MelOverlap] | None = None


@dataclass
class CosyVoiceMelStream:
    """Streams of a batch between two pieces.

    Args:
        prompt: inputs without new tokens. hop_tokens (`int`), num_steps (`int`).
        generator (*optional*): of the noise of all pieces.
        waiting (`list` of `(n,)`): tokens of each row that no piece has consumed.
        overlaps (`list`, *optional*): of the pieces before. tails (`list` of `(t, m)`): frames held back for the fade.
        finished (`bool`): whether the last tokens have come.
    """

    prompt: TokenToMelInputs
    hop_tokens: int
    num_steps: int
    generator: torch.Generator | None
    waiting: list[Tensor]
    overlaps: list[MelOverlap] | None
    tails: list[Tensor] | None
    finished: bool = False


class CosyVoiceFlowModel(TokenToMelModel):
    """Encoder, length regulator and U-Net."""

    config_class = CosyVoiceFlowConfig
    config: CosyVoiceFlowConfig
    _no_split_modules = ["RelativePositionLayer", "UNet1dLayer"]

    def __init__(self, config: CosyVoiceFlowConfig) -> None:
        super().__init__(config)
        self.encoder = RelativePositionEncoder(config.embedding_size, config)
        self.encoder_proj = nn.Linear(config.hidden_size, config.num_mel_bins)
        self.length_regulator = LengthRegulator(config)
        self.estimator = UNet1d(config)
        self.post_init()

    def _in_kaiming_part(self, module: nn.Module) -> bool:
        return any(module is part for part in self.estimator.modules())

    def encode(self, token_ids: Tensor, mask: Tensor | None) -> Tensor:
        """`(b, n)` ids → `(b, n, c)`."""
        return self.encoder(self.embed_speech(token_ids, mask), mask)

    def forward(
        self,
        speech_token_ids: Tensor,
        mel: Tensor,
        speaker_embedding: Tensor,
        speech_token_mask: Tensor | None = None,
        mel_mask: Tensor | None = None,
        draws: FlowMatchingDraws | None = None,
        generator: torch.Generator | None = None,
    ) -> TokenToMelTrainingOutput:
        """Training loss.

        Args:
            speech_token_ids (`(b, n)`, int64), speech_token_mask (`(b, n)`).
            mel (`(b, t, m)`): targets, of any length; mel_mask (`(b, t)`).
            speaker_embedding (`(b, speaker_embedding_size)`).
            draws: what is random; drawn from `generator`, or torch's global one, where it is not given.

        Raises:
            ValueError: shapes that do not fit, or a row without tokens or frames.
        """
        config = self.config
        token_lengths = row_lengths("speech_token", speech_token_mask, speech_token_ids)
        mel_lengths = row_lengths("mel", mel_mask, mel)
        if not bool(((token_lengths > 0) & (mel_lengths > 0)).all()):
            raise ValueError("speech_token_ids, mel: expected at least one token and one frame in every row")
        if draws is None:
            draws = draw_flow_matching(
                mel,
                mel_lengths,
                config.condition_dropout,
                config.prompt_probability,
                config.longest_prompt,
                0.0,
                generator,
            )
        mask = padding_mask(token_lengths, speech_token_ids.shape[1])
        hidden = self.encoder_proj(self.encode(speech_token_ids, mask))
        conditions = self.length_regulator(hidden, token_lengths.tolist(), mel_lengths.tolist())
        mel = mel[:, : conditions.shape[1]]
        return self.flow_matching_output(mel, mel_lengths, conditions, speaker_embedding, draws)

    @torch.no_grad()
    def generate_mel(
        self,
        token_ids: Tensor,
        token_mask: Tensor | None = None,
        prompt_token_ids: Tensor | None = None,
        prompt_token_mask: Tensor | None = None,
        prompt_mel: Tensor | None = None,
        prompt_mel_mask: Tensor | None = None,
        speaker_embedding: Tensor | None = None,
        num_steps: int = 10,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        overlaps: list[MelOverlap] | None = None,
    ) -> CosyVoiceFlowOutput:
        """Mel spectrograms of token sequences; with given noise a row of a batch equals the row alone.

        Args:
            token_ids (`(b, n)`, int64), token_mask (`(b, n)`).
            prompt_token_ids (`(b, n')`), prompt_mel (`(b, t', m)`), with their masks: the voice to continue.
            speaker_embedding (`(b, speaker_embedding_size)`).
            num_steps (`int`): Euler steps.
            noise (`(1 or b, at least t, m)`): for the frames of prompt and tokens; drawn from `generator`, or torch's
                global one, where it is not given.
            overlaps: of the pieces before, if these are pieces of a stream.

        Raises:
            ValueError: shapes that do not fit.
        """
        if speaker_embedding is None:
            raise ValueError("speaker_embedding: expected one vector a row, got none")
        inputs = self.read_inputs(
            token_ids,
            token_mask,
            prompt_token_ids,
            prompt_token_mask,
            prompt_mel,
            prompt_mel_mask,
            speaker_embedding,
        )
        return self._generate(inputs, num_steps, noise, generator, overlaps)

    def _generate(
        self,
        inputs: TokenToMelInputs,
        num_steps: int,
        noise: Tensor | None,
        generator: torch.Generator | None,
        overlaps: list[MelOverlap] | None,
    ) -> CosyVoiceFlowOutput:
        if bool(((inputs.prompt_lengths == 0) & (inputs.prompt_frames > 0)).any()):
            raise ValueError("prompt_token_ids: expected tokens wherever prompt_mel has frames")
        counts = [self.config.num_frames(length) for length in inputs.token_lengths.tolist()]
        frames = inputs.prompt_frames + torch.tensor(counts, device=self.device)
        size, batch = int(frames.max()) if len(frames) else 0, len(counts)
        noise = self._noise(noise, generator, batch, size)
        if lengths_to_encode_apart(noise.expand(batch, -1, -1), length_mask(frames, size)) is not None:
            rows = [
                self._solve(
                    inputs.row(row), noise[row % len(noise)][None], num_steps, overlaps and overlaps[row : row + 1]
                )
                for row in range(batch)
            ]
            mel = pad_sequence([mel[0] for mel, _, _ in rows], batch_first=True)
            kept = torch.cat([kept for _, kept, _ in rows])
            next_overlaps = [overlap for _, _, found in rows for overlap in found]
        else:
            mel, kept, next_overlaps = self._solve(inputs, noise, num_steps, overlaps)
        return CosyVoiceFlowOutput(mel=mel, mel_mask=length_mask(kept, mel.shape[1]), overlaps=next_overlaps)

    def _noise(self, noise: Tensor | None, generator: torch.Generator | None, batch: int, frames: int) -> Tensor:
        bins = self.config.num_mel_bins
        if noise is None:
            device = self.device if generator is None else generator.device
            noise = torch.randn(batch, frames, bins, generator=generator, device=device)
        if noise.dim() != 3 or noise.shape[0] not in (1, batch) or noise.shape[1] < frames or noise.shape[2] != bins:
            raise ValueError(f"noise: expected (1 or {batch}, at least {frames}, {bins}), got {tuple(noise.shape)}")
        return noise.to(self.device)

    def conditions_of(self, inputs: TokenToMelInputs) -> tuple[Tensor, Tensor | None]:
        """What the velocity network is told of prompt and new tokens: `(b, t, m)` and the mask of its frames."""
        ids, lengths = join_rows(inputs.prompt_ids, inputs.prompt_lengths, inputs.token_ids, inputs.token_lengths)
        hidden = self.encoder_proj(self.encode(ids, padding_mask(lengths, ids.shape[1])))
        return self.length_regulator.stretch_apart(
            hidden, inputs.prompt_lengths.tolist(), lengths.tolist(), inputs.prompt_frames.tolist()
        )

    @staticmethod
    def prompt_of(inputs: TokenToMelInputs, num_frames: int) -> Tensor:
        """The mel of the prompt in front of zeros, `(b, num_frames, m)`."""
        given = length_mask(inputs.prompt_frames, inputs.prompt_mel.shape[1])
        prompt = inputs.prompt_mel * given[..., None].to(inputs.prompt_mel.dtype)
        return nn.functional.pad(prompt, (0, 0, 0, num_frames - prompt.shape[1]))

    def _solve(
        self, inputs: TokenToMelInputs, noise: Tensor, num_steps: int, overlaps: list[MelOverlap] | None
    ) -> tuple[Tensor, Tensor, list[MelOverlap]]:
        """Frames after the prompt `(b, t, m)`, how many are real, and what the next piece must start with."""
        if not bool((inputs.prompt_lengths + inputs.token_lengths > 0).any()):
            raise ValueError("token_ids: expected at least one token")
        conditions, mask = self.conditions_of(inputs)
        batch, size = conditions.shape[:2]
        noise = noise[:, :size].expand(batch, -1, -1)
        if overlaps is not None:
            noise, conditions = continue_overlaps(noise, conditions, overlaps)
        frames = torch.full((batch,), size, device=self.device) if mask is None else mask.sum(dim=1)
        prompt_frames = inputs.prompt_frames.tolist()
        next_overlaps = [
            MelOverlap(
                *(
                    torch.cat([values[row, :prompt], values[row, :count][-_OVERLAP_FRAMES:]])
                    for values in (noise, conditions)
                )
            )
            for row, (prompt, count) in enumerate(zip(prompt_frames, frames.tolist(), strict=True))
        ]
        mel = self.solve(noise, conditions, inputs.speaker, self.prompt_of(inputs, size), mask, num_steps)
        mel, kept = drop_beginnings(mel, frames, inputs.prompt_frames)
        return mel, kept, next_overlaps

    @property
    def stream_overlap_tokens(self) -> int:
        """Tokens behind a piece of a stream that it must see."""
        return _OVERLAP_TOKENS

    # -- piece by piece ----------------------------------------------------------------------------------------------
    @torch.no_grad()
    def start_stream(
        self,
        speaker_embedding: Tensor,
        prompt_token_ids: Tensor | None = None,
        prompt_token_mask: Tensor | None = None,
        prompt_mel: Tensor | None = None,
        prompt_mel_mask: Tensor | None = None,
        num_steps: int = 10,
        generator: torch.Generator | None = None,
        hop_tokens: int | None = None,
    ) -> CosyVoiceMelStream:
        """Begin one stream for every row of `speaker_embedding`; the arguments are those of [`generate_mel`].

        Args:
            hop_tokens (`int`, *optional*): new tokens of a piece; upstream's two seconds where it is not given.

        Raises:
            ValueError: shapes that do not fit.
        """
        batch = speaker_embedding.shape[0]
        no_tokens = torch.zeros(batch, 0, dtype=torch.long, device=self.device)
        inputs = self.read_inputs(
            no_tokens, None, prompt_token_ids, prompt_token_mask, prompt_mel, prompt_mel_mask, speaker_embedding
        )
        hop_tokens = 2 * self.config.input_frame_rate if hop_tokens is None else hop_tokens
        if hop_tokens < _OVERLAP_TOKENS:
            raise ValueError(f"hop_tokens: expected at least {_OVERLAP_TOKENS}, the overlap, got {hop_tokens}")
        return CosyVoiceMelStream(
            inputs, hop_tokens, num_steps, generator, [row[:0] for row in no_tokens], overlaps=None, tails=None
        )

    def tokens_to_next_piece(self, state: CosyVoiceMelStream) -> int:
        """How many more tokens the streams need before they give frames again; 0 where they have ended."""
        return 0 if state.finished else max(state.hop_tokens + self.stream_overlap_tokens - len(state.waiting[0]), 0)

    @torch.no_grad()
    def stream_mel(
        self, state: CosyVoiceMelStream, token_ids: Tensor, is_last: bool = False, noise: Tensor | None = None
    ) -> tuple[CosyVoiceFlowOutput, CosyVoiceMelStream]:
        """Take more tokens of every stream; give the frames of all pieces that are complete.

        A piece is `hop_tokens` and 20 tokens after them; the frames of those are held back, and faded into those that
        the next piece makes of the same tokens. The rows advance together.

        Args:
            state: stays as it was. token_ids (`(b, n)`, int64; `n` may be 0).
            is_last: whether the streams have no more tokens.
            noise (`(1 or b, at least t, m)`): of every piece, in place of the generator's.

        Raises:
            ValueError: shapes that do not fit, or tokens after the end.
        """
        if token_ids.dim() != 2 or len(token_ids) != len(state.waiting):
            raise ValueError(f"token_ids: expected ({len(state.waiting)}, tokens), got {tuple(token_ids.shape)}")
        if state.finished and token_ids.shape[1]:
            raise ValueError(f"token_ids: expected none after the end of the stream, got {token_ids.shape[1]}")
        new = token_ids.to(self.device)
        state = replace(state, waiting=[torch.cat(rows) for rows in zip(state.waiting, new, strict=True)])
        pieces: list[Tensor] = []
        while len(state.waiting[0]) >= state.hop_tokens + _OVERLAP_TOKENS:
            piece = torch.stack([row[: state.hop_tokens + _OVERLAP_TOKENS] for row in state.waiting])
            mel, state = self._stream_piece(state, piece, noise, is_last=False)
            state.waiting = [row[state.hop_tokens :] for row in state.waiting]
            pieces.append(mel)
        if is_last and not state.finished:
            state = replace(state, finished=True)
            if len(state.waiting[0]):
                mel, state = self._stream_piece(state, torch.stack(state.waiting), noise, is_last=True)
                pieces.append(mel)
            state.waiting = [row[:0] for row in state.waiting]
        empty = torch.zeros(len(new), 0, self.config.num_mel_bins, device=self.device)
        mel = torch.cat([empty, *pieces], dim=1)
        mask = torch.ones(mel.shape[:2], dtype=torch.bool, device=self.device)
        return CosyVoiceFlowOutput(mel=mel, mel_mask=mask, overlaps=state.overlaps), state

    def _stream_piece(
        self, state: CosyVoiceMelStream, token_ids: Tensor, noise: Tensor | None, is_last: bool
    ) -> tuple[Tensor, CosyVoiceMelStream]:
        lengths = torch.full((len(token_ids),), token_ids.shape[1], device=self.device)
        inputs = replace(state.prompt, token_ids=token_ids, token_lengths=lengths)
        output = self._generate(inputs, state.num_steps, noise, state.generator, state.overlaps)
        mel, held = output.mel, self.config.num_frames(_OVERLAP_TOKENS)
        if state.tails is not None:
            mel = fade_in(mel, torch.stack(state.tails))
        tails = None
        if not is_last:
            tails = list(mel[:, mel.shape[1] - held :])
            mel = mel[:, : mel.shape[1] - held]
        return mel, replace(state, overlaps=output.overlaps, tails=tails)


def continue_overlaps(noise: Tensor, conditions: Tensor, overlaps: list[MelOverlap]) -> tuple[Tensor, Tensor]:
    """Noise and conditions `(b, t, m)` that begin with those of the pieces before."""
    noise, conditions = noise.clone(), conditions.clone()
    for row, overlap in enumerate(overlaps):
        frames = min(len(overlap.noise), noise.shape[1])
        noise[row, :frames] = overlap.noise[:frames].to(noise)
        conditions[row, :frames] = overlap.conditions[:frames].to(conditions)
    return noise, conditions


def fade_in(mel: Tensor, tail: Tensor) -> Tensor:
    """The beginning of `mel (b, t, m)` mixed with `tail (b, n, m)`, what the piece before had for the same frames.

    Upstream's halves of a Hamming window do not quite add up to one. A last piece may be shorter than the tail.
    """
    frames = min(tail.shape[1], mel.shape[1])
    window = torch.hamming_window(2 * tail.shape[1], periodic=False, dtype=torch.float64, device=mel.device)
    rising, falling = window[: tail.shape[1]].to(mel.dtype), window[tail.shape[1] :].to(mel.dtype)
    mixed = mel[:, :frames] * rising[:frames, None] + tail[:, :frames] * falling[:frames, None]
    return torch.cat([mixed, mel[:, frames:]], dim=1)


CosyVoiceFlowModel.register_for_auto_class("AutoModel")
