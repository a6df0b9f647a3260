"""The causal flows of CosyVoice 2 and 3: a whole utterance at once, or exactly the same piece by piece.

In a stream every Euler step keeps keys, values and the last inputs of convolutions of its own, with and without
conditions, so that a new piece costs what it holds and nothing is computed twice. Upstream computes the whole history
again for each piece, and for the last one without chunks, so that the end of its stream is that of another network.
The price is memory: keys and values of every layer, twice for guidance, for every step;
`benchmarks/cosyvoice_cache.py` prints how much. `num_left_chunks` bounds it: the attention then sees that many chunks
before its own, and what is older is forgotten. `cache_dtype` stores keys and values in another type.

Shape legend: `b` batch, `n` tokens, `t` frames, `m` mel bins. In every mask 1 = real; real entries come first.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .causal_cache import CausalCache, gather_rows
from .flow_matching import FlowMatchingDraws, draw_flow_matching, fixed_noise
from .mixed_lengths import lengths_to_encode_apart
from .ragged_rows import drop_beginnings, join_rows, length_mask, padding_mask, row_lengths
from .token_to_mel import TokenToMelInputs, TokenToMelModel, TokenToMelOutput, TokenToMelTrainingOutput


# Frames for which a stream with a generator draws its noise: 300 s at 50 Hz.
_STREAM_NOISE_FRAMES = 15000


@dataclass
class CausalMelStream:
    """Streams of a batch between two pieces: what came and is not computed yet, and what the networks remember.

    A state is advanced in place by [`CausalTokenToMelModel.stream_mel`] and returned by it; [`clone`] one to continue
    it twice.

    Args:
        speaker (`(b, m)`): projected. prompt_mel (`list` of `(t, m)`): of each row.
        noise (`(1 or b, t, m)`, *optional*): that the streams start from; `None` = the fixed noise.
        num_steps (`int`): Euler steps. times: what the velocity network makes of their times.
        waiting (`list` of `(n,)`): tokens of each row that are not encoded yet, those of the prompt included.
        frames (`list[int]`): mel frames of each row that are done, those of the prompt included.
        finished (`list[bool]`): rows whose last token has come.
        encoder_caches, step_caches: see [`CausalCache`]; one of the latter for every Euler step.
    """

    speaker: Tensor
    prompt_mel: list[Tensor]
    noise: Tensor | None
    num_steps: int
    times: list[Tensor]
    waiting: list[Tensor]
    frames: list[int]
    finished: list[bool]
    encoder_caches: tuple[CausalCache, ...]
    step_caches: list[CausalCache]

    def clone(self) -> "CausalMelStream":
        """A state that can be continued without changing this one."""
        return replace(
            self,
            waiting=list(self.waiting),
            frames=list(self.frames),
            finished=list(self.finished),
            encoder_caches=tuple(cache.clone() for cache in self.encoder_caches),
            step_caches=[cache.clone() for cache in self.step_caches],
        )

    @property
    def num_bytes(self) -> int:
        """Memory of what the networks remember, with the room that is kept to grow."""
        return sum(cache.num_bytes for cache in (*self.encoder_caches, *self.step_caches))

    @property
    def bytes_per_frame(self) -> float:
        """Memory that a mel frame of one stream takes while it is remembered; 0 before the first chunk."""
        row = max(range(len(self.frames)), key=self.frames.__getitem__)
        if not self.frames[row]:
            return 0.0
        total = 0.0
        for cache in (*self.encoder_caches, *self.step_caches):
            # Tokens are fewer than frames, and guidance has a second row for every stream.
            rate = cache.lengths[row] / self.frames[row] * (len(cache.lengths) // len(self.frames))
            total += cache.bytes_per_frame * rate
        return total


def gather_streams(states: list[CausalMelStream], rows: list[list[int]]) -> CausalMelStream:
    """The streams `rows[i]` of `states[i]` as one batch, in this order: streams that join others, or leave them.

    The states are used up.

    Raises:
        ValueError: no stream, or states of another number of steps or with noise beside one without.
    """
    first = states[0]
    if not any(rows):
        raise ValueError("rows: expected at least one stream")
    for state in states[1:]:
        if state.num_steps != first.num_steps:
            raise ValueError(f"num_steps: expected {first.num_steps} in every state, got {state.num_steps}")
        if (state.noise is None) != (first.noise is None):
            raise ValueError("noise: expected in all states or in none")
    picks = [(number, row) for number, kept in enumerate(rows) for row in kept]

    def gather(caches: list[CausalCache]) -> CausalCache:
        # Guidance: all rows with conditions come first, then all without.
        sizes = [len(state.frames) for state in states]
        copies = len(caches[0].lengths) // sizes[0]
        return gather_rows(
            caches, [(number, copy * sizes[number] + row) for copy in range(copies) for number, row in picks]
        )

    noise = None
    if first.noise is not None:
        noise = torch.stack([states[number].noise[row % len(states[number].noise)] for number, row in picks])
    return CausalMelStream(
        speaker=torch.stack([states[number].speaker[row] for number, row in picks]),
        prompt_mel=[states[number].prompt_mel[row] for number, row in picks],
        noise=noise,
        num_steps=first.num_steps,
        times=first.times,
        waiting=[states[number].waiting[row] for number, row in picks],
        frames=[states[number].frames[row] for number, row in picks],
        finished=[states[number].finished[row] for number, row in picks],
        encoder_caches=tuple(
            gather(list(caches)) for caches in zip(*(state.encoder_caches for state in states), strict=True)
        ),
        step_caches=[gather(list(caches)) for caches in zip(*(state.step_caches for state in states), strict=True)],
    )


class CausalTokenToMelModel(TokenToMelModel):
    """A flow whose frames see a few tokens ahead and nothing else to come.

    A subclass has `encode_tokens`, `new_encoder_caches`, `encode_step` and `chunk_tokens`.
    """

    # -- a whole utterance -------------------------------------------------------------------------------------------
    def encode_tokens(
        self, token_ids: Tensor, mask: Tensor | None, streaming: bool, num_following: int, num_left_chunks: int = -1
    ) -> tuple[Tensor, Tensor | None]:
        """`(b, n)` ids → conditions `(b, t, m)` and their mask; the last `num_following` tokens of a row are only seen
        by those before them."""
        raise NotImplementedError

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
            mel (`(b, t, m)`): targets with `t` = tokens times `token_mel_ratio`; mel_mask (`(b, t)`).
            speaker_embedding (`(b, speaker_embedding_size)`).
            draws: what is random; drawn from `generator`, or torch's global one, where it is not given.

        Raises:
            ValueError: shapes that do not fit.
        """
        config, ratio = self.config, self.config.token_mel_ratio
        if mel.shape[1] != ratio * speech_token_ids.shape[1]:
            raise ValueError(
                f"mel: expected {ratio * speech_token_ids.shape[1]} frames, {ratio} for each of "
                f"{speech_token_ids.shape[1]} tokens, got {mel.shape[1]}"
            )
        token_lengths = row_lengths("speech_token", speech_token_mask, speech_token_ids)
        mel_lengths = torch.minimum(row_lengths("mel", mel_mask, mel), ratio * token_lengths)
        if draws is None:
            draws = draw_flow_matching(
                mel,
                mel_lengths,
                config.condition_dropout,
                config.prompt_probability,
                config.longest_prompt,
                config.streaming_probability,
                generator,
            )
        mask = padding_mask(token_lengths, speech_token_ids.shape[1])
        conditions, _ = self.encode_tokens(speech_token_ids, mask, draws.streaming, 0)
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
        streaming: bool = False,
        is_last: bool = True,
        num_left_chunks: int = -1,
    ) -> TokenToMelOutput:
        """Mel spectrograms of whole token sequences; a row of a batch equals the row alone.

        Args:
            token_ids (`(b, n)`, int64), token_mask (`(b, n)`).
            prompt_token_ids (`(b, n')`), prompt_mel (`(b, t', m)`), with their masks: the voice to continue.
            speaker_embedding (`(b, speaker_embedding_size)`).
            num_steps (`int`): Euler steps.
            noise (`(1 or b, at least t, m)`): for the frames of prompt and tokens; otherwise drawn from `generator`,
                otherwise the fixed noise that upstream starts every utterance from.
            streaming (`bool`): as a stream would be computed, in chunks that see nothing after them.
            is_last (`bool`): `False`: more tokens will come, so that the last `num_lookahead_tokens` only serve those
                before them.
            num_left_chunks (`int`): with `streaming`, chunks that the attention sees before its own; negative = all.

        Raises:
            ValueError: shapes that do not fit, a prompt longer than the tokens account for, left chunks without
                `streaming`.
        """
        if speaker_embedding is None:
            raise ValueError("speaker_embedding: expected one vector a row, got none")
        if num_left_chunks >= 0 and not streaming:
            raise ValueError(f"num_left_chunks: expected -1 without streaming, got {num_left_chunks}")
        inputs = self.read_inputs(
            token_ids,
            token_mask,
            prompt_token_ids,
            prompt_token_mask,
            prompt_mel,
            prompt_mel_mask,
            speaker_embedding,
        )
        num_following = 0 if is_last else self.config.num_lookahead_tokens
        lengths = inputs.prompt_lengths + inputs.token_lengths - num_following
        if bool((lengths < 0).any()):
            raise ValueError(f"token_ids: expected at least {num_following} with more to come")
        frames = self.config.token_mel_ratio * lengths
        if bool((inputs.prompt_frames > frames).any()):
            raise ValueError(
                f"prompt_mel: expected at most {frames.tolist()} frames, got {inputs.prompt_frames.tolist()}"
            )
        size = int(frames.max()) if len(frames) else 0
        noise = self._noise(noise, generator, len(frames), size)
        options = (num_steps, streaming, num_following, num_left_chunks)
        if lengths_to_encode_apart(noise.expand(len(frames), -1, -1), length_mask(frames, size)) is not None:
            rows = [
                self._generate(inputs.row(row), noise[row % len(noise)][None], *options) for row in range(len(frames))
            ]
            pieces = [mel[0] for mel, _ in rows]
            mel = pad_sequence(pieces, batch_first=True)
            counts = torch.tensor([len(piece) for piece in pieces], device=self.device)
        else:
            mel, counts = self._generate(inputs, noise, *options)
        return TokenToMelOutput(mel=mel, mel_mask=length_mask(counts, mel.shape[1]))

    def _generate(
        self,
        inputs: TokenToMelInputs,
        noise: Tensor,
        num_steps: int,
        streaming: bool,
        num_following: int,
        num_left_chunks: int,
    ) -> tuple[Tensor, Tensor]:
        """Frames after the prompt `(b, t, m)` and how many are real."""
        ids, lengths = join_rows(inputs.prompt_ids, inputs.prompt_lengths, inputs.token_ids, inputs.token_lengths)
        frames = self.config.token_mel_ratio * (lengths - num_following)
        if ids.shape[1] <= num_following:
            return inputs.speaker.new_zeros(len(ids), 0, self.config.num_mel_bins, dtype=torch.float32), frames
        padding = padding_mask(lengths, ids.shape[1])
        conditions, mask = self.encode_tokens(ids, padding, streaming, num_following, num_left_chunks)
        prompt = torch.zeros_like(conditions)
        given = length_mask(inputs.prompt_frames, inputs.prompt_mel.shape[1])
        prompt[:, : given.shape[1]] = inputs.prompt_mel * given[..., None].to(prompt.dtype)
        noise = noise[:, : conditions.shape[1]].expand(conditions.shape[0], -1, -1)
        mel = self.solve(
            noise, conditions, inputs.speaker, prompt, mask, num_steps, streaming, num_left_chunks=num_left_chunks
        )
        return drop_beginnings(mel, frames, inputs.prompt_frames)

    def _noise(self, noise: Tensor | None, generator: torch.Generator | None, batch: int, frames: int) -> Tensor:
        bins = self.config.num_mel_bins
        if noise is None and generator is None:
            return fixed_noise(frames, bins, self.device)
        if noise is None:
            noise = torch.randn(batch, frames, bins, generator=generator, device=generator.device)
        if noise.dim() != 3 or noise.shape[0] not in (1, batch) or noise.shape[1] < frames or noise.shape[2] != bins:
            raise ValueError(f"noise: expected (1 or {batch}, at least {frames}, {bins}), got {tuple(noise.shape)}")
        return noise.to(self.device)

    # -- piece by piece ----------------------------------------------------------------------------------------------
    @property
    def chunk_tokens(self) -> int:
        """Tokens of a chunk: a stream advances by multiples of it.

        Raises:
            ValueError: a network that is not the same piece by piece.
        """
        raise NotImplementedError

    def new_encoder_caches(
        self, batch_size: int, num_left_chunks: int = -1, cache_dtype: torch.dtype | None = None
    ) -> tuple[CausalCache, ...]:
        """Empty caches of the encoder; see [`start_stream`]."""
        raise NotImplementedError

    def encode_step(
        self, token_ids: Tensor, available: Tensor, counts: list[int], caches: tuple[CausalCache, ...]
    ) -> Tensor:
        """Conditions `(b, t, m)` of the next `counts[b]` tokens of each row.

        Args:
            token_ids (`(b, n + num_lookahead_tokens)`), available (same, bool): the tokens and those after them.
        """
        raise NotImplementedError

    @torch.no_grad()
    def start_stream(
        self,
        speaker_embedding: Tensor,
        prompt_token_ids: Tensor | None = None,
        prompt_token_mask: Tensor | None = None,
        prompt_mel: Tensor | None = None,
        prompt_mel_mask: Tensor | None = None,
        num_steps: int = 10,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        num_left_chunks: int = -1,
        cache_dtype: torch.dtype | None = None,
    ) -> CausalMelStream:
        """Begin one stream for every row of `speaker_embedding`; the arguments are those of [`generate_mel`].

        The complete chunks of the prompt are computed here. A voice that speaks often is begun once, and every
        sentence continues a `clone()` of the state. `noise` must have enough frames for the whole stream; a
        `generator` draws 15,000.

        Args:
            num_left_chunks (`int`): chunks that every attention sees before its own; nothing older is kept, the prompt
                included, so that a stream takes the same memory however long it is. Negative = all of them, as
                upstream, whose `num_decoding_left_chunks` no code reads. The models were trained to see all.
            cache_dtype (*optional*): floating type that keys and values are stored in; that of the model by default.
                Every key is rounded before it is seen, so that it does not matter how the tokens are cut.

        Raises:
            ValueError: shapes that do not fit, ids that the model does not have, a type that is not floating, or a
                network that is not the same piece by piece.
        """
        batch = speaker_embedding.shape[0]
        no_tokens = torch.zeros(batch, 0, dtype=torch.long, device=self.device)
        inputs = self.read_inputs(
            no_tokens, None, prompt_token_ids, prompt_token_mask, prompt_mel, prompt_mel_mask, speaker_embedding
        )
        if not self.chunk_tokens:
            raise ValueError("estimator_chunk_size: expected a chunk for a stream, got 0")
        if cache_dtype is not None and not cache_dtype.is_floating_point:
            raise ValueError(f"cache_dtype: expected a floating type, got {cache_dtype}")
        if noise is not None or generator is not None:
            noise = self._noise(noise, generator, batch, _STREAM_NOISE_FRAMES if noise is None else 0)
        # Tokens that wait for the rest of their chunk are read with a later piece, in which nobody expects an error.
        self.check_token_ids(inputs.prompt_ids * length_mask(inputs.prompt_lengths, inputs.prompt_ids.shape[1]))
        rows = 2 * batch if self.config.guidance_scale else batch
        state = CausalMelStream(
            speaker=inputs.speaker,
            prompt_mel=[row[:count] for row, count in zip(inputs.prompt_mel, inputs.prompt_frames, strict=True)],
            noise=noise,
            num_steps=num_steps,
            times=self.embed_schedule(num_steps),
            waiting=[row[:count] for row, count in zip(inputs.prompt_ids, inputs.prompt_lengths, strict=True)],
            frames=[0] * batch,
            finished=[False] * batch,
            encoder_caches=self.new_encoder_caches(batch, num_left_chunks, cache_dtype),
            step_caches=[
                CausalCache([0] * rows, self.config.estimator_chunk_size, num_left_chunks, cache_dtype)
                for _ in range(num_steps)
            ],
        )
        # Where the mel ends before the tokens, what is behind it is heard, and comes with the first piece.
        chunk_frames = self.config.token_mel_ratio * self.chunk_tokens
        heard = [len(mel) // chunk_frames * self.chunk_tokens for mel in state.prompt_mel]
        self._advance(state, [min(pair) for pair in zip(self._ready(state), heard, strict=True)])
        return state

    @torch.no_grad()
    def stream_mel(
        self,
        state: CausalMelStream,
        token_ids: Tensor,
        token_mask: Tensor | None = None,
        is_last: bool | list[bool] = False,
    ) -> tuple[TokenToMelOutput, CausalMelStream]:
        """Take more tokens of every stream; give the frames that are settled by now.

        Put together, the pieces are what [`generate_mel`] with `streaming=True` gives for all tokens, however they are
        cut. A piece comes out when a chunk and the tokens after it are there.

        Args:
            state: is advanced in place. token_ids (`(b, n)`, int64; `n` may be 0), token_mask (`(b, n)`).
            is_last: whether the stream (or each of them) has no more tokens.

        Raises:
            ValueError: shapes that do not fit, tokens for a stream that has ended, or noise that is too short.
        """
        lengths = row_lengths("token", token_mask, token_ids).tolist()
        endings = [is_last] * len(lengths) if isinstance(is_last, bool) else list(is_last)
        if len(lengths) != len(state.waiting) or len(endings) != len(lengths):
            raise ValueError(f"token_ids: expected {len(state.waiting)} rows, got {len(lengths)}")
        for row, length in enumerate(lengths):
            if state.finished[row] and length:
                raise ValueError(f"token_ids[{row}]: expected none after the end of the stream, got {length}")
        for row, length in enumerate(lengths):
            state.waiting[row] = torch.cat([state.waiting[row], token_ids[row, :length].to(self.device)])
            state.finished[row] |= endings[row]
        return self._advance(state, self._ready(state)), state

    def tokens_to_next_piece(self, state: CausalMelStream) -> list[int]:
        """How many more tokens each stream needs before it gives frames again; 0 where it has ended.

        To the end of the chunk in which the prompt ends or the stream stands, and the tokens that it looks ahead.
        """
        lookahead, ratio, chunk = self.config.num_lookahead_tokens, self.config.token_mel_ratio, self.chunk_tokens
        needed = []
        for frames, prompt, waiting, ended in zip(
            state.frames, state.prompt_mel, state.waiting, state.finished, strict=True
        ):
            heard = max(frames, len(prompt)) // ratio // chunk * chunk + chunk
            missing = heard + lookahead - frames // ratio - len(waiting)
            needed.append(0 if ended else max(missing, 0))
        return needed

    def _ready(self, state: CausalMelStream) -> list[int]:
        """Tokens of each row that can be computed: whole chunks that have their look-ahead, or all that are left."""
        lookahead, chunk = self.config.num_lookahead_tokens, self.chunk_tokens
        return [
            len(waiting) if finished else max(0, len(waiting) - lookahead) // chunk * chunk
            for waiting, finished in zip(state.waiting, state.finished, strict=True)
        ]

    def _advance(self, state: CausalMelStream, counts: list[int]) -> TokenToMelOutput:
        """Compute the next `counts[b]` tokens of each row; the frames that come after the prompt."""
        lookahead, ratio = self.config.num_lookahead_tokens, self.config.token_mel_ratio
        if not any(counts):
            empty = torch.zeros(len(counts), 0, self.config.num_mel_bins, device=self.device)
            return TokenToMelOutput(mel=empty, mel_mask=empty[..., 0].bool())
        seen = [row[: count + lookahead] for row, count in zip(state.waiting, counts, strict=True)]
        ids = pad_sequence(seen, batch_first=True)
        ids = torch.nn.functional.pad(ids, (0, max(counts) + lookahead - ids.shape[1]))
        available = length_mask(torch.tensor([len(row) for row in seen], device=self.device), ids.shape[1])
        conditions = self.encode_step(ids, available, counts, state.encoder_caches)
        state.waiting = [row[count:] for row, count in zip(state.waiting, counts, strict=True)]
        frames = [ratio * count for count in counts]
        return self._new_frames(state, self._solve_step(state, conditions, frames), frames)

    def _solve_step(self, state: CausalMelStream, conditions: Tensor, counts: list[int]) -> Tensor:
        size, bins = conditions.shape[1], self.config.num_mel_bins
        longest = max(start + count for start, count in zip(state.frames, counts, strict=True))
        # One frame more than is used at most: rows that stand behind others read past their end and ignore it.
        source = fixed_noise(longest + size, bins, self.device) if state.noise is None else state.noise
        if source.shape[1] < longest:
            raise ValueError(f"noise: expected at least {longest} frames for this stream, got {source.shape[1]}")
        noise, prompt = [], torch.zeros_like(conditions)
        for row, start in enumerate(state.frames):
            piece = source[row % len(source), start : start + size]
            noise.append(torch.nn.functional.pad(piece, (0, 0, 0, size - len(piece))))
            given = state.prompt_mel[row][start : start + size]
            prompt[row, : len(given)] = given
        for cache in state.step_caches:
            cache.begin(counts * (2 if self.config.guidance_scale else 1), self.device)
        mel = self.solve(
            torch.stack(noise),
            conditions,
            state.speaker,
            prompt,
            None,
            state.num_steps,
            caches=state.step_caches,
            times=state.times,
        )
        for cache in state.step_caches:
            cache.end()
        return mel

    @staticmethod
    def _new_frames(state: CausalMelStream, mel: Tensor, counts: list[int]) -> TokenToMelOutput:
        """What comes after the prompt of each row."""
        dropped = [
            min(count, max(0, len(prompt) - start))
            for start, count, prompt in zip(state.frames, counts, state.prompt_mel, strict=True)
        ]
        state.frames = [start + count for start, count in zip(state.frames, counts, strict=True)]
        count, drop = (torch.tensor(values, device=mel.device) for values in (counts, dropped))
        mel, kept = drop_beginnings(mel, count, drop)
        return TokenToMelOutput(mel=mel, mel_mask=length_mask(kept, mel.shape[1]))
