"""Speech tokens of several answers in, waveforms out, as they become settled; rows may join and leave.

The flows of versions 2 and 3 step all rows in one batch. That of version 1 and the vocoders remember tensors whose
sizes depend on how a row was cut so far: they go row by row.
"""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .causal_token_to_mel import CausalMelStream, CausalTokenToMelModel, gather_streams
from .mixed_lengths import lengths_to_encode_apart
from .modeling_cosyvoice import CosyVoiceForTextToWaveform, CosyVoicePrompt
from .modeling_cosyvoice_flow import CosyVoiceFlowModel, CosyVoiceMelStream
from .modeling_cosyvoice_hift import CosyVoiceHiftStreamState


class CausalMelRows:
    """Rows of the flow of version 2 or 3, all in one state.

    Args:
        flow: used and not changed. num_steps, num_left_chunks, cache_dtype: see its `start_stream`.
    """

    def __init__(
        self, flow: CausalTokenToMelModel, num_steps: int, num_left_chunks: int, cache_dtype: torch.dtype | None
    ) -> None:
        self.flow = flow
        self.options = {"num_steps": num_steps, "num_left_chunks": num_left_chunks, "cache_dtype": cache_dtype}
        self.handles: list[int] = []
        self.state: CausalMelStream | None = None

    def add(self, handles: Sequence[int], prompt: CosyVoicePrompt) -> None:
        """Rows of `prompt` under these numbers; the complete chunks of their prompts are computed here."""
        fields = [prompt.speaker_embedding, prompt.speech_ids, prompt.speech_mask, prompt.mel, prompt.mel_mask]
        groups = [fields]
        if lengths_to_encode_apart(prompt.mel, prompt.mel_mask) is not None:
            groups = [[field[row : row + 1] for field in fields] for row in range(len(handles))]
        new = [self.flow.start_stream(*group, **self.options) for group in groups]
        states = new if self.state is None else [self.state, *new]
        rows = [list(range(len(state.frames))) for state in states]
        self.state = states[0] if len(states) == 1 else gather_streams(states, rows)
        self.handles += handles

    def tokens_to_next_piece(self) -> dict[int, int]:
        """How many more tokens each row needs before it gives frames again."""
        if self.state is None:
            return {}
        return dict(zip(self.handles, self.flow.tokens_to_next_piece(self.state), strict=True))

    def push(self, tokens: dict[int, list[int]], last: Collection[int]) -> dict[int, Tensor]:
        """The frames `(1, t, m)` of every row that are settled with these tokens; `t` may be 0.

        Args:
            tokens: of each row, from 0; a row may have none. last: rows that have no more; they leave.
        """
        if self.state is None:
            return {}
        rows = [torch.tensor(tokens.get(handle, []), dtype=torch.long) for handle in self.handles]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        endings = [handle in last for handle in self.handles]
        output, self.state = self.flow.stream_mel(self.state, ids, mask, is_last=endings)
        frames = output.mel_mask.sum(dim=1).tolist()
        mels = {
            handle: output.mel[row : row + 1, :count]
            for row, (handle, count) in enumerate(zip(self.handles, frames, strict=True))
        }
        self.remove(last)
        return mels

    def remove(self, handles: Collection[int]) -> None:
        """Forget rows; those that stay cost no more than before they came."""
        kept = [row for row, handle in enumerate(self.handles) if handle not in handles]
        if len(kept) == len(self.handles):
            return
        self.handles = [self.handles[row] for row in kept]
        self.state = gather_streams([self.state], [kept]) if kept else None


class OverlappingMelRows:
    """Rows of the flow of version 1, each with a state of its own.

    Args:
        flow: used and not changed. num_steps: see its `start_stream`.
    """

    def __init__(self, flow: CosyVoiceFlowModel, num_steps: int) -> None:
        self.flow, self.num_steps = flow, num_steps
        self.states: dict[int, CosyVoiceMelStream] = {}

    def add(
        self, handles: Sequence[int], prompt: CosyVoicePrompt, generators: Sequence[torch.Generator | None]
    ) -> None:
        """Rows of `prompt` under these numbers, with what their noise is drawn from."""
        for row, (handle, generator) in enumerate(zip(handles, generators, strict=True)):
            tokens, frames = (int(mask[row].sum()) for mask in (prompt.speech_mask, prompt.mel_mask))
            self.states[handle] = self.flow.start_stream(
                prompt.speaker_embedding[row : row + 1],
                prompt.speech_ids[row : row + 1, :tokens],
                prompt_mel=prompt.mel[row : row + 1, :frames],
                num_steps=self.num_steps,
                generator=generator,
            )

    def tokens_to_next_piece(self) -> dict[int, int]:
        """How many more tokens each row needs before it gives frames again."""
        return {handle: self.flow.tokens_to_next_piece(state) for handle, state in self.states.items()}

    def push(self, tokens: dict[int, list[int]], last: Collection[int]) -> dict[int, Tensor]:
        """As [`CausalMelRows.push`]."""
        mels = {}
        for handle, state in self.states.items():
            ids = torch.tensor([tokens.get(handle, [])], dtype=torch.long)
            output, self.states[handle] = self.flow.stream_mel(state, ids, is_last=handle in last)
            mels[handle] = output.mel
        self.remove(last)
        return mels

    def remove(self, handles: Collection[int]) -> None:
        """Forget rows."""
        for handle in handles:
            self.states.pop(handle, None)


class SpeechRows:
    """Flow and vocoder of several rows.

    Args:
        model: used and not changed.
        num_steps (`int`): Euler steps of the flow.
        compatibility (`"upstream"`, *optional*): of the vocoder: overlapping pieces that are faded into each other.
        num_left_chunks, cache_dtype: what the flow of versions 2 and 3 keeps of the past, see its `start_stream`.

    Raises:
        ValueError: `num_left_chunks` or `cache_dtype` for version 1, which keeps nothing.
    """

    def __init__(
        self,
        model: CosyVoiceForTextToWaveform,
        num_steps: int = 10,
        compatibility: str | None = None,
        num_left_chunks: int = -1,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.model, self.compatibility = model, compatibility
        self.mel_rows: CausalMelRows | OverlappingMelRows
        if model.config.version == 1:
            if num_left_chunks >= 0 or cache_dtype is not None:
                raise ValueError(
                    f"num_left_chunks, cache_dtype: expected -1 and None for version 1, which keeps no keys, got "
                    f"{num_left_chunks} and {cache_dtype}"
                )
            self.mel_rows = OverlappingMelRows(model.flow, num_steps)
        else:
            self.mel_rows = CausalMelRows(model.flow, num_steps, num_left_chunks, cache_dtype)
        self.wave_states: dict[int, CosyVoiceHiftStreamState] = {}

    def add(
        self,
        handles: Sequence[int],
        prompt: CosyVoicePrompt,
        flow_generators: Sequence[torch.Generator | None],
        vocoder_generators: Sequence[torch.Generator | None],
    ) -> None:
        """Rows of `prompt` under these numbers.

        Args:
            flow_generators, vocoder_generators: of what is random in the flow (version 1) and the vocoder of each row;
                torch's own random numbers where there is none.
        """
        if isinstance(self.mel_rows, OverlappingMelRows):
            self.mel_rows.add(handles, prompt, flow_generators)
        else:
            self.mel_rows.add(handles, prompt)
        for handle, generator in zip(handles, vocoder_generators, strict=True):
            self.wave_states[handle] = self.model.vocoder.start_stream(
                1, generator=generator, compatibility=self.compatibility
            )

    def push(self, tokens: dict[int, list[int]], last: Collection[int]) -> dict[int, Tensor]:
        """The samples `(n,)` float32 of every row that are settled with these tokens; `n` may be 0.

        Args:
            tokens: of each row, from 0; a row may have none. last: rows that have no more; they leave.
        """
        waveforms = {}
        for handle, mel in self.mel_rows.push(tokens, last).items():
            if not mel.shape[1] and handle not in last:
                waveforms[handle] = mel.new_zeros(0, dtype=torch.float32)
                continue
            waveform, self.wave_states[handle] = self.model.vocoder.stream(
                mel, self.wave_states[handle], is_last=handle in last
            )
            waveforms[handle] = waveform[0].float()
        for handle in last:
            self.wave_states.pop(handle, None)
        return waveforms

    def remove(self, handles: Collection[int]) -> None:
        """Forget rows before their end."""
        self.mel_rows.remove(handles)
        for handle in handles:
            self.wave_states.pop(handle, None)
