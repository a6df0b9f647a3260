"""Streaming Paraformer: windows of past, new and future frames, with caches between them.

Upstream: `funasr/models/paraformer_streaming/model.py`, `funasr/models/scama/encoder.py` (`forward_chunk`).

A window is `[past | new | future]` of `config.chunk_size`. The encoder attends to the window and to the keys of
earlier ones; the weights of the future frames wait until they are new; what has accumulated without firing is carried
as one pseudo frame; tokens attend to the window and the last windows' frames. The first window starts with empty
frames. The end of a stream is a last, shorter window, which may have no new frame at all.

Which windows there are depends on the frames alone, not on the pieces that they come in.

Shape legend: `b` streams, `f` input frames, `h` heads, `s` cached frames, `d` size of a head, `c` channels.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .cif import fire_sequential, integrate


@dataclass
class ParaformerStream:
    """One stream between two windows.

    Args:
        pending (`(f, input_size)`): frames that fill no window yet.
        num_frames: frames that went into windows.
        window (`(past + future, input_size)`): end of the last window, scaled and with positions.
        keys, values (`list` of `(1, h, s, d)`): of the encoder's layers.
        memories (`list` of `(1, left_context, c)`, empty before the first token): of the decoder's layers.
        cross_keys, cross_values (`list` of `(1, h, s, d)`): of the decoder's layers.
        carried_alpha (`(1, 1)`), carried_hidden (`(1, 1, c)`): weight that has not fired, and its mean frame.
        tokens, log_probs, times: what was recognised so far; times in seconds.
        last_fire: frame after the last one that fired.
        ended: whether the last window has been seen.
    """

    pending: Tensor
    window: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    memories: list[Tensor]
    cross_keys: list[Tensor]
    cross_values: list[Tensor]
    carried_alpha: Tensor
    carried_hidden: Tensor
    num_frames: int
    tokens: list[int]
    log_probs: list[float]
    times: list[tuple[float, float]]
    last_fire: int
    ended: bool


_TENSORS = ("pending", "window", "carried_alpha", "carried_hidden")
_LISTS = ("keys", "values", "memories", "cross_keys", "cross_values")
_SCALARS = ("num_frames", "tokens", "log_probs", "times", "last_fire", "ended")


@dataclass
class FunasrParaformerStreamingState:
    """State of a batch of streams between two steps. A value: steps return a new one.

    Args:
        chunk_size, encoder_chunk_look_back, decoder_chunk_look_back: what the streams were opened with.
        streams: one each; they advance independently.
    """

    chunk_size: list[int]
    encoder_chunk_look_back: int
    decoder_chunk_look_back: int
    streams: list[ParaformerStream]

    @property
    def batch_size(self) -> int:
        return len(self.streams)

    def save(self, path: str | Path) -> None:
        """Write the state as one safetensors file, options and results as JSON in its metadata."""
        tensors, rows = {}, []
        for row, stream in enumerate(self.streams):
            tensors |= {f"{row}.{name}": getattr(stream, name).contiguous() for name in _TENSORS}
            for name in _LISTS:
                for layer, tensor in enumerate(getattr(stream, name)):
                    tensors[f"{row}.{name}.{layer}"] = tensor.contiguous().clone()
            rows.append({name: getattr(stream, name) for name in _SCALARS})
        options = {name: value for name, value in vars(self).items() if name != "streams"}
        save_file(tensors, path, metadata={"state": json.dumps({"options": options, "streams": rows})})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "FunasrParaformerStreamingState":
        """Inverse of [`save`]."""
        with safe_open(path, framework="pt", device=str(device)) as file:
            state = json.loads(file.metadata()["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        streams = []
        for row, scalars in enumerate(state["streams"]):
            lists = {}
            for name in _LISTS:
                count = sum(key.startswith(f"{row}.{name}.") for key in tensors)
                lists[name] = [tensors[f"{row}.{name}.{layer}"] for layer in range(count)]
            scalars["times"] = [tuple(span) for span in scalars["times"]]
            streams.append(ParaformerStream(**{n: tensors[f"{row}.{n}"] for n in _TENSORS}, **lists, **scalars))
        return cls(**state["options"], streams=streams)


@dataclass
class FunasrParaformerStreamOutput:
    """
    Args:
        sequences: token ids per stream, all that were recognised so far, without blank and sentence marks. They never
            change later.
        token_timestamps: start and end of each token in seconds since the start of its stream.
        scores: sum of the tokens' log-probabilities. is_final: whether the stream has ended.
        state: goes into the next step.
    """

    sequences: list[list[int]]
    token_timestamps: list[list[tuple[float, float]]]
    scores: list[float]
    is_final: list[bool]
    state: FunasrParaformerStreamingState


class FunasrParaformerStreamingMixin:
    """`open_stream` and `stream_step` of [`FunasrParaformerForSpeechRecognition`]."""

    def open_stream(
        self,
        batch_size: int = 1,
        chunk_size: list[int] | None = None,
        encoder_chunk_look_back: int | None = None,
        decoder_chunk_look_back: int | None = None,
    ) -> FunasrParaformerStreamingState:
        """State of `batch_size` new streams; options that are `None` are the configuration's.

        Raises:
            ValueError: the model was not trained with chunks, or its decoder looks ahead.
        """
        config = self.config
        if not config.is_streamable:
            raise ValueError("stream: the model was not trained with chunks (is_streaming is False)")
        kernel = config.decoder_fsmn_kernel_size
        if (kernel - 1) // 2 + config.decoder_fsmn_shift != kernel - 1 or config.decoder_fsmn_layers:
            raise ValueError(
                f"stream: expected a causal decoder (decoder_fsmn_shift {kernel - 1 - (kernel - 1) // 2}, "
                f"decoder_fsmn_layers 0), got {config.decoder_fsmn_shift} and {config.decoder_fsmn_layers}"
            )
        chunk_size = list(config.chunk_size if chunk_size is None else chunk_size)
        if len(chunk_size) != 3 or min(chunk_size) < 0 or chunk_size[1] < 1:
            raise ValueError(f"chunk_size: expected [past, new > 0, future] frames, got {chunk_size}")
        look_back = config.encoder_chunk_look_back if encoder_chunk_look_back is None else encoder_chunk_look_back
        cross = config.decoder_chunk_look_back if decoder_chunk_look_back is None else decoder_chunk_look_back
        streams = [self._new_stream(chunk_size) for _ in range(batch_size)]
        return FunasrParaformerStreamingState(chunk_size, look_back, cross, streams)

    def _new_stream(self, chunk_size: list[int]) -> ParaformerStream:
        config, weight = self.config, self.lm_head.weight
        empty = weight.new_zeros(1, config.num_attention_heads, 0, config.hidden_size // config.num_attention_heads)
        heads = config.decoder_attention_heads
        cross = weight.new_zeros(1, heads, 0, config.hidden_size // heads)
        return ParaformerStream(
            pending=weight.new_zeros(0, config.input_size),
            # Upstream starts with frames that are zero, positions included.
            window=weight.new_zeros(chunk_size[0] + chunk_size[2], config.input_size),
            keys=[empty] * config.num_hidden_layers,
            values=[empty] * config.num_hidden_layers,
            memories=[],
            cross_keys=[cross] * config.decoder_layers,
            cross_values=[cross] * config.decoder_layers,
            carried_alpha=torch.zeros(1, 1, device=weight.device),
            carried_hidden=weight.new_zeros(1, 1, config.hidden_size),
            num_frames=0,
            tokens=[],
            log_probs=[],
            times=[],
            last_fire=0,
            ended=False,
        )

    def reset_streams(self, state: FunasrParaformerStreamingState, rows: list[int]) -> FunasrParaformerStreamingState:
        """A state in which the given streams start anew; the others go on untouched."""
        streams = [
            self._new_stream(state.chunk_size) if row in rows else stream for row, stream in enumerate(state.streams)
        ]
        return replace(state, streams=streams)

    @torch.no_grad()
    def stream_step(
        self,
        input_features: Tensor,
        state: FunasrParaformerStreamingState | None = None,
        attention_mask: Tensor | None = None,
        is_last: bool | list[bool] = False,
        **options,
    ) -> FunasrParaformerStreamOutput:
        """Advance every stream of a batch by any number of frames; they are collected until they fill windows.

        Args:
            input_features (`(b, f, input_size)`), attention_mask (`(b, f)`): 1 = real frame; `f` may be 0.
            state: the last step's `state`; `None` opens streams with `options` (see [`open_stream`]).
            is_last: nothing follows, for all streams or each: the rest is recognised.

        Raises:
            ValueError: options beside a state, or features for a stream that has ended.
        """
        batch = input_features.shape[0]
        if state is None:
            state = self.open_stream(batch, **options)
        elif options:
            raise ValueError(f"stream_step: {sorted(options)} are fixed when a stream is opened")
        if state.batch_size != batch:
            raise ValueError(f"stream_step: the state has {state.batch_size} streams, the input {batch}")
        last = [is_last] * batch if isinstance(is_last, bool) else list(is_last)
        streams = []
        for row, (stream, ends) in enumerate(zip(state.streams, last, strict=True)):
            features = input_features[row].to(stream.pending.dtype)
            if attention_mask is not None:
                features = features[attention_mask[row].bool()]
            if stream.ended and len(features):
                raise ValueError(f"stream_step: stream {row} has ended; start it anew with reset_streams")
            streams.append(stream if stream.ended else self._advance(stream, state, features, ends))
        state = replace(state, streams=streams)
        return FunasrParaformerStreamOutput(
            sequences=[list(stream.tokens) for stream in streams],
            token_timestamps=[list(stream.times) for stream in streams],
            scores=[sum(stream.log_probs) for stream in streams],
            is_final=[stream.ended for stream in streams],
            state=state,
        )

    def _advance(
        self, stream: ParaformerStream, state: FunasrParaformerStreamingState, features: Tensor, ends: bool
    ) -> ParaformerStream:
        pending, new = torch.cat([stream.pending, features]), state.chunk_size[1]
        while len(pending) >= new:
            stream = self._stream_window(stream, state, pending[:new], is_last=False)
            pending = pending[new:]
        if ends and (stream.num_frames or len(pending)):
            stream = self._stream_window(stream, state, pending, is_last=True)
            pending = pending[:0]
        return replace(stream, pending=pending, ended=ends)

    def _stream_window(
        self, stream: ParaformerStream, state: FunasrParaformerStreamingState, features: Tensor, is_last: bool
    ) -> ParaformerStream:
        """One window: encoder, predictor and, where tokens fire, decoder."""
        past, new, future = state.chunk_size
        embedded = self.model.encoder.embed(features[None], start=stream.num_frames)
        frames = torch.cat([stream.window[None], embedded], dim=1)
        num_frames = stream.num_frames + len(features)
        hidden, keys, values = self._encode_window(frames, stream, state)
        stream = replace(
            stream,
            window=frames[0, frames.shape[1] - past - future :],
            num_frames=num_frames,
            keys=keys,
            values=values,
        )
        predictor = self.model.predictor
        alphas = predictor.weights(predictor.convolve(hidden), None)
        alphas[:, :past] = 0.0
        if not is_last:
            alphas[:, past + new :] = 0.0
        # Frame 0 is what was carried, frame `i + 1` is frame `i` of the window.
        alphas = torch.cat([stream.carried_alpha, alphas], dim=1)
        states = torch.cat([stream.carried_hidden, hidden], dim=1)
        if is_last:
            alphas = torch.nn.functional.pad(alphas, (0, 1), value=self.config.cif_tail_threshold)
            states = torch.nn.functional.pad(states, (0, 0, 0, 1))
        threshold = self.config.cif_threshold
        firing = fire_sequential(alphas, threshold, threshold)
        count = int(firing.fires.sum())
        embeddings = integrate(states, alphas, firing, count + 1, keep_incomplete=True)
        carried = (alphas.double().sum() - count * threshold).clamp_min(0.0).to(alphas.dtype).view(1, 1)
        rest = embeddings[:, count:]
        rest = rest / carried[..., None].to(rest.dtype) if bool(carried > 0) else rest
        stream = replace(stream, carried_alpha=carried, carried_hidden=rest)
        if not count:
            return stream
        fires = firing.fires[0].nonzero()[:, 0] - 1 + num_frames - frames.shape[1]
        return self._decode_window(stream, state, embeddings[:, :count], hidden, fires.tolist())

    def _encode_window(
        self, frames: Tensor, stream: ParaformerStream, state: FunasrParaformerStreamingState
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """The window after the encoder `(1, w, c)`, and the keys and values to remember."""
        _, new, future = state.chunk_size
        look_back = state.encoder_chunk_look_back
        hidden, keys, values = frames, [], []
        for layer, key, value in zip(self.model.encoder.layers, stream.keys, stream.values, strict=True):
            hidden, _, present = layer(hidden, None, None, (key, value))
            # The future frames come again, with more context.
            length = max(present[0].shape[2] - future, key.shape[2])
            first = length if look_back == 0 else 0 if look_back < 0 else max(length - look_back * new, 0)
            keys.append(present[0][:, :, first:length])
            values.append(present[1][:, :, first:length])
        return hidden, keys, values

    def _decode_window(
        self,
        stream: ParaformerStream,
        state: FunasrParaformerStreamingState,
        embeddings: Tensor,
        hidden: Tensor,
        fires: list[int],
    ) -> ParaformerStream:
        config, decoder = self.config, self.model.decoder
        kept = max(state.decoder_chunk_look_back, 0) * state.chunk_size[1]
        states, memories, cross_keys, cross_values = embeddings, [], [], []
        for index, layer in enumerate(decoder.layers):
            key, value = layer.encoder_attn.project_memory(hidden)
            key = torch.cat([stream.cross_keys[index], key], dim=2)
            value = torch.cat([stream.cross_values[index], value], dim=2)
            past = stream.memories[index] if stream.memories else None
            states, _, memory = layer(states, None, key, value, None, past)
            memories.append(memory)
            cross_keys.append(key[:, :, max(key.shape[2] - kept, 0) :])
            cross_values.append(value[:, :, max(value.shape[2] - kept, 0) :])
        logits = self.lm_head(decoder.norm(decoder.final_layer(states)))
        best, ids = logits.float().log_softmax(dim=-1)[0].max(dim=-1)
        tokens, log_probs, times = list(stream.tokens), list(stream.log_probs), list(stream.times)
        start = stream.last_fire
        for token, log_prob, fire in zip(ids.tolist(), best.tolist(), fires, strict=True):
            end = min(max(fire + 1, start), stream.num_frames)
            if token not in (config.pad_token_id, config.bos_token_id, config.eos_token_id):
                tokens.append(token)
                log_probs.append(log_prob)
                times.append((start * config.seconds_per_frame, end * config.seconds_per_frame))
            start = end
        return replace(
            stream,
            memories=memories,
            cross_keys=cross_keys,
            cross_values=cross_values,
            tokens=tokens,
            log_probs=log_probs,
            times=times,
            last_fire=start,
        )
