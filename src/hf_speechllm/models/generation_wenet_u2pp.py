"""Decoding of U2++: the four search methods, CTC alignment, and streaming.

Upstream: `wenet/models/transformer/search.py`, `asr_model.py` and the runtime's end-point rescoring. Searches
themselves are in `ctc.py`; this file runs the network for them and gathers results.

Shape legend: `b` utterances, `k` hypotheses of each, `n` tokens, `t` encoder frames, `v` vocabulary.
"""

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .context_graph import ContextGraph
from .ctc import (
    PrefixBeam,
    advance_prefix_beam,
    collapse,
    ctc_forced_alignment,
    ctc_greedy_search,
    ctc_prefix_beam_search,
    finish_prefix_beam,
    token_borders,
)
from .streaming import EncoderStreamingState


DECODINGS = ("ctc_greedy", "ctc_prefix_beam_search", "attention", "attention_rescoring")


@dataclass
class WenetU2ppGenerateOutput(ModelOutput):
    """
    Args:
        sequences (`(b * r, n)`, int64): token ids, padded with the blank; `r` = `num_return_sequences`, best first.
        sequences_lengths (`(b * r,)`): real tokens of each.
        scores (`(b * r,)`): log-score of the chosen method; greedy CTC: log-probability of the best path.
        token_timestamps (`(b * r, n, 2)`): start and end in seconds, 0 where padded.
        token_confidences (`(b * r, n)`), confidences (`(b * r,)`): between 0 and 1.
        token_frames (`(b * r, n)`, int64): encoder frame of each token's peak, -1 where padded.
    """

    sequences: Tensor | None = None
    sequences_lengths: Tensor | None = None
    scores: Tensor | None = None
    token_timestamps: Tensor | None = None
    token_confidences: Tensor | None = None
    confidences: Tensor | None = None
    token_frames: Tensor | None = None


@dataclass
class NBest:
    """Hypotheses of one utterance, best first."""

    tokens: list[list[int]]
    scores: list[float]
    frames: list[list[int]]
    token_confidences: list[list[float]] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)


@dataclass
class StreamOptions:
    """What a stream was opened with; see [`WenetU2ppGenerationMixin.stream_step`]."""

    chunk_size: int
    num_left_chunks: int
    decoding: str
    num_beams: int
    ctc_weight: float
    reverse_weight: float
    blank_penalty: float
    length_penalty: float
    hotwords: list[list[int]]
    hotwords_score: float
    hotwords_end: str


@dataclass
class WenetU2ppStreamingState:
    """State of a batch of streams between two steps. A value: steps return a new one.

    Args:
        encoder: attention and convolution caches, and the frame offset of each stream.
        encoder_outputs: what the encoder has said so far, `(t_i, hidden_size)` per stream, for the final rescoring.
        beams: prefix-beam state per stream (the beam methods).
        labels, label_log_probs: best label of every frame and its log-probability, per stream (the other methods).
        ended: streams whose last window has been seen.
    """

    options: StreamOptions
    encoder: EncoderStreamingState
    encoder_outputs: list[Tensor]
    beams: list[PrefixBeam]
    labels: list[list[int]]
    label_log_probs: list[list[float]]
    ended: list[bool]

    @property
    def batch_size(self) -> int:
        return len(self.ended)

    def save(self, path: str | Path) -> None:
        """Write the state as one safetensors file, searches and options as JSON in its metadata."""
        tensors = {f"encoder.{name}": tensor for name, tensor in self.encoder.to_tensors().items()}
        tensors |= {f"encoder_outputs.{row}": tensor.contiguous() for row, tensor in enumerate(self.encoder_outputs)}
        searches = {
            "options": vars(self.options),
            "num_layers": len(self.encoder.keys),
            "beams": [beam.to_dict() for beam in self.beams],
            "labels": self.labels,
            "label_log_probs": self.label_log_probs,
            "ended": self.ended,
        }
        save_file(tensors, path, metadata={"searches": json.dumps(searches)})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "WenetU2ppStreamingState":
        """Inverse of [`save`]."""
        with safe_open(path, framework="pt", device=str(device)) as file:
            searches = json.loads(file.metadata()["searches"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        encoder = {name.removeprefix("encoder."): t for name, t in tensors.items() if name.startswith("encoder.")}
        return cls(
            options=StreamOptions(**searches["options"]),
            encoder=EncoderStreamingState.from_tensors(encoder, searches["num_layers"]),
            encoder_outputs=[tensors[f"encoder_outputs.{row}"] for row in range(len(searches["ended"]))],
            beams=[PrefixBeam.from_dict(beam) for beam in searches["beams"]],
            labels=searches["labels"],
            label_log_probs=searches["label_log_probs"],
            ended=searches["ended"],
        )

    def reset(self, rows: list[int]) -> "WenetU2ppStreamingState":
        """A state in which the given streams start anew; the others go on untouched."""
        chosen = torch.zeros(self.batch_size, dtype=torch.bool, device=self.encoder.offsets.device)
        chosen[rows] = True
        encoder = replace(
            self.encoder,
            convolutions=[
                None if tensor is None else tensor.masked_fill(chosen[:, None, None], 0.0)
                for tensor in self.encoder.convolutions
            ],
            key_mask=self.encoder.key_mask & ~chosen[:, None],
            offsets=self.encoder.offsets.masked_fill(chosen, 0),
        )
        keep = [row not in rows for row in range(self.batch_size)]
        return replace(
            self,
            encoder=encoder,
            encoder_outputs=[t if kept else t[:0] for t, kept in zip(self.encoder_outputs, keep, strict=True)],
            beams=[beam if kept else PrefixBeam() for beam, kept in zip(self.beams, keep, strict=True)],
            labels=[row if kept else [] for row, kept in zip(self.labels, keep, strict=True)],
            label_log_probs=[row if kept else [] for row, kept in zip(self.label_log_probs, keep, strict=True)],
            ended=[end and kept for end, kept in zip(self.ended, keep, strict=True)],
        )


@dataclass
class WenetU2ppStreamOutput:
    """
    Args:
        sequences: token ids per stream: the best partial hypothesis or, where `is_final`, the result.
        token_timestamps: start and end of each token in seconds since the start of its stream.
        scores, is_final: per stream.
        state: goes into the next step.
    """

    sequences: list[list[int]]
    token_timestamps: list[list[tuple[float, float]]]
    scores: list[float]
    is_final: list[bool]
    state: WenetU2ppStreamingState


class WenetU2ppGenerationMixin:
    """`generate`, `align` and `stream_step` of [`WenetU2ppForSpeechRecognition`]."""

    @torch.no_grad()
    def generate(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        decoding: str | None = None,
        num_beams: int = 10,
        num_return_sequences: int = 1,
        ctc_weight: float = 0.5,
        reverse_weight: float | None = None,
        blank_penalty: float = 0.0,
        length_penalty: float = 0.0,
        decoding_chunk_size: int = -1,
        num_left_chunks: int = -1,
        hotwords: list[list[int]] | None = None,
        hotwords_score: float = 3.0,
        hotwords_end: str = "resort",
        return_timestamps: bool | str = False,
        return_dict_in_generate: bool = False,
    ) -> Tensor | WenetU2ppGenerateOutput:
        """Recognise a batch.

        Args:
            input_features (`(b, f, bins)`), attention_mask (`(b, f)`): as from the processor, 1 = real frame.
            decoding: `"ctc_greedy"`, `"ctc_prefix_beam_search"`, `"attention"` or `"attention_rescoring"`; by default
                rescoring where a decoder exists, else prefix beam search.
            num_beams: beam of the searches. num_return_sequences: hypotheses to return, at most `num_beams`.
            ctc_weight, reverse_weight: of rescoring; `reverse_weight=None` takes the configuration's.
            blank_penalty: subtracted from the blank's logit. length_penalty: exponent of the length in `"attention"`.
            decoding_chunk_size, num_left_chunks: attention span in encoder frames and chunks; -1 = everything.
            hotwords: token ids of phrases to favour (CTC beam and rescoring), `hotwords_score` per matched token; see
                `finish_prefix_beam` for `hotwords_end`.
            return_dict_in_generate, return_timestamps: either one makes the result a [`WenetU2ppGenerateOutput`].

        Returns:
            `(b * num_return_sequences, n)` token ids padded with the blank, or the output class.

        Raises:
            ValueError: an unknown method, or one that needs a decoder that the model lacks.
        """
        decoding = self._check_decoding(decoding, hotwords_end)
        if num_return_sequences > (num_beams if decoding != "ctc_greedy" else 1):
            raise ValueError(
                f"num_return_sequences: {decoding} with num_beams={num_beams} cannot give {num_return_sequences}"
            )
        encoded = self.model.encoder(
            input_features,
            attention_mask,
            decoding_chunk_size=decoding_chunk_size,
            num_left_chunks=num_left_chunks,
        )
        hidden, mask = encoded.last_hidden_state, encoded.attention_mask
        lengths = mask.sum(dim=-1)
        log_probs = self.ctc_log_probs(hidden, blank_penalty)
        if decoding == "ctc_greedy":
            results = self._greedy(log_probs, lengths)
        elif decoding == "attention":
            results = self._attention_beam_search(
                hidden, mask, num_beams, length_penalty, num_return_sequences, return_dict_in_generate
            )
            if return_timestamps or return_dict_in_generate:
                self._align_results(results, log_probs, lengths)
        else:
            graph = ContextGraph(hotwords, hotwords_score) if hotwords else None
            results = self._prefix_beam(log_probs, lengths, num_beams, graph, hotwords_end)
            if decoding == "attention_rescoring":
                reverse_weight = self.config.reverse_weight if reverse_weight is None else reverse_weight
                memory, memory_mask = self.decoder_memory(hidden, mask, log_probs)
                if self.config.padding == "upstream":
                    # Upstream cuts the memory to the utterance's frames, after dropping blanks too, and masks nothing.
                    memory_mask = torch.arange(memory.shape[1], device=memory.device) < lengths[:, None]
                results = self._rescore(results, memory, memory_mask, ctc_weight, reverse_weight)
            elif return_dict_in_generate:
                add_ctc_confidences(results, log_probs)
        if attention_mask is None:
            frames = torch.full((len(results),), input_features.shape[1])
        else:
            frames = attention_mask.sum(dim=-1)
        durations = [float(count) * self.config.frame_shift_ms / 1000 for count in frames]
        output = self._collate(results, num_return_sequences, durations, input_features.device)
        return output if return_dict_in_generate or return_timestamps else output.sequences

    def _check_decoding(self, decoding: str | None, hotwords_end: str = "resort") -> str:
        if decoding is None:
            decoding = "attention_rescoring" if self.config.decoder_layers else "ctc_prefix_beam_search"
        if decoding not in DECODINGS:
            raise ValueError(f"decoding: expected one of {DECODINGS}, got {decoding!r}")
        if decoding.startswith("attention") and not self.config.decoder_layers:
            raise ValueError(f"decoding={decoding!r} needs a decoder; this model has decoder_layers=0")
        if hotwords_end not in ("resort", "upstream"):
            raise ValueError(f"hotwords_end: expected 'resort' or 'upstream', got {hotwords_end!r}")
        return decoding

    def _greedy(self, log_probs: Tensor, lengths: Tensor) -> list[NBest]:
        best = log_probs.max(dim=-1).values
        frame = torch.arange(log_probs.shape[1], device=log_probs.device)
        totals = best.masked_fill(frame >= lengths[:, None], 0.0).sum(dim=-1).tolist()
        results = [
            NBest([tokens], [total], [frames])
            for (tokens, frames), total in zip(
                ctc_greedy_search(log_probs, lengths, self.config.pad_token_id), totals, strict=True
            )
        ]
        add_ctc_confidences(results, log_probs)
        return results

    def _prefix_beam(
        self, log_probs: Tensor, lengths: Tensor, num_beams: int, graph: ContextGraph | None, end: str
    ) -> list[NBest]:
        searched = ctc_prefix_beam_search(log_probs, lengths, num_beams, self.config.pad_token_id, graph, end)
        return [NBest(result.tokens, result.scores, result.frames) for result in searched]

    def _rescore(
        self, results: list[NBest], memory: Tensor, memory_mask: Tensor, ctc_weight: float, reverse_weight: float
    ) -> list[NBest]:
        """Second pass of U2++: all hypotheses of all utterances in one call per decoder, sorted by the new score.

        final = (1 - r) * left + r * right + ctc_weight * ctc; confidence = exp of the attention part per token.
        """
        memory_mask = None if bool(memory_mask.all()) else memory_mask
        texts = [result.tokens for result in results]
        left = self._label_log_probs(self.model.decoder, self.decoder_head, texts, memory, memory_mask)
        use_right = reverse_weight > 0 and self.right_decoder_head is not None
        if use_right:
            backward = [[tokens[::-1] for tokens in text] for text in texts]
            right = self._label_log_probs(
                self.model.right_decoder, self.right_decoder_head, backward, memory, memory_mask
            )

        rescored = []
        for row, result in enumerate(results):
            scores, confidences, token_confidences = [], [], []
            for column, tokens in enumerate(result.tokens):
                count = len(tokens)
                forward = left[row][column]
                score = sum(forward)
                per_token = [math.exp(value) for value in forward[:count]]
                if use_right:
                    backward_row = right[row][column]
                    score = (1 - reverse_weight) * score + reverse_weight * sum(backward_row)
                    per_token = [
                        (value + math.exp(other)) / 2
                        for value, other in zip(per_token, reversed(backward_row[:count]), strict=True)
                    ]
                confidences.append(math.exp(score / (count + 1)))
                scores.append(score + ctc_weight * result.scores[column])
                token_confidences.append(per_token)
            order = sorted(range(len(scores)), key=scores.__getitem__, reverse=True)
            rescored.append(
                NBest(
                    tokens=[result.tokens[i] for i in order],
                    scores=[scores[i] for i in order],
                    frames=[result.frames[i] for i in order],
                    token_confidences=[token_confidences[i] for i in order],
                    confidences=[confidences[i] for i in order],
                )
            )
        return rescored

    def _label_log_probs(
        self,
        decoder: nn.Module,
        head: nn.Module,
        texts: list[list[list[int]]],
        memory: Tensor,
        memory_mask: Tensor | None,
    ) -> list[list[list[float]]]:
        """Log-probability of each token and of the final eos of every hypothesis of every utterance.

        The hypotheses of an utterance mostly share their beginnings. What a causal decoder says after a beginning does
        not depend on what follows, so each distinct one is computed once: the decoder runs on the utterance's prefix
        tree, every node seeing its ancestors only.
        """
        bos, eos = self.config.bos_token_id, self.config.eos_token_id
        device = memory.device
        trees = [PrefixTree(hypotheses, bos) for hypotheses in texts]
        width = max(len(tree.tokens) for tree in trees)
        tokens = torch.full((len(trees), width), eos)
        positions = torch.zeros(len(trees), width, dtype=torch.int64)
        # A padded node sees itself alone.
        visible = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)
        real = torch.zeros(len(trees), width, dtype=torch.bool)
        first, picks = 0, []
        for row, (tree, hypotheses) in enumerate(zip(trees, texts, strict=True)):
            size = len(tree.tokens)
            tokens[row, :size] = torch.tensor(tree.tokens)
            positions[row, :size] = torch.tensor(tree.depths)
            visible[row, :size, :size] = tree.ancestors()
            for path, hypothesis in zip(tree.paths, hypotheses, strict=True):
                picks += [(first + node, target) for node, target in zip(path, [*hypothesis, eos], strict=True)]
            real[row, :size] = True
            first += size
        hidden = decoder(
            tokens.to(device),
            decoder.project_memory(memory),
            memory_mask,
            position_ids=positions.to(device),
            attention_mask=visible.to(device),
        ).last_hidden_state
        logits = head(hidden[real.to(device)]).float()  # (nodes of all trees, v)
        nodes, targets = torch.tensor(picks, device=device).unbind(dim=1)
        values = (logits[nodes, targets] - logits.logsumexp(dim=-1)[nodes]).tolist()
        remaining = iter(values)
        return [[[next(remaining) for _ in range(len(y) + 1)] for y in hypotheses] for hypotheses in texts]

    def _attention_beam_search(
        self,
        hidden: Tensor,
        mask: Tensor,
        num_beams: int,
        length_penalty: float,
        num_return_sequences: int,
        with_confidences: bool,
    ) -> list[NBest]:
        """Autoregressive search with the left decoder (WeNet's `attention_beam_search`).

        A hypothesis has at most as many tokens as its own utterance has encoder frames; upstream takes the padded
        length, which makes the result depend on the batch (`config.padding="upstream"` does so too).
        """
        config, device = self.config, hidden.device
        batch, limit = hidden.shape[0], hidden.shape[1]
        steps = mask.sum(dim=-1) if config.padding == "invariant" else torch.full((batch,), limit, device=device)
        memory = self.model.decoder.project_memory(hidden)
        memory_mask = None if bool(mask.all()) else mask
        eos = config.eos_token_id
        hypotheses = torch.full((batch * num_beams, 1), config.bos_token_id, device=device)
        scores = torch.full((batch, num_beams), -math.inf, device=device)
        scores[:, 0] = 0.0
        ended = torch.zeros(batch, num_beams, dtype=torch.bool, device=device)
        first_row = torch.arange(batch, device=device)[:, None] * num_beams
        past, width = None, min(num_beams, config.vocab_size)
        for step in range(int(steps.max())):
            frozen = (step >= steps)[:, None]
            if bool((ended | frozen).all()):
                break
            decoded = self.model.decoder(hypotheses[:, -1:], memory, memory_mask, past=past)
            log_probs = self.decoder_head(decoded.last_hidden_state[:, -1]).float().log_softmax(dim=-1)
            top_scores, top_tokens = log_probs.topk(width, dim=-1)
            top_scores = top_scores.view(batch, num_beams, width)
            top_tokens = top_tokens.view(batch, num_beams, width)
            # An ended hypothesis goes on as itself: eos again, for free.
            only_first = torch.full((width,), -math.inf, device=device)
            only_first[0] = 0.0
            top_scores = torch.where(ended[..., None], only_first, top_scores)
            top_tokens = top_tokens.masked_fill(ended[..., None], eos)
            best, choice = (scores[..., None] + top_scores).flatten(1).topk(num_beams, dim=-1)
            parent = choice // width
            token = top_tokens.flatten(1).gather(1, choice)
            if bool(frozen.any()):
                best = torch.where(frozen, scores, best)
                parent = torch.where(frozen, torch.arange(num_beams, device=device), parent)
                token = torch.where(frozen, torch.full_like(token, eos), token)
            source = (first_row + parent).flatten()
            past = [(key.index_select(0, source), value.index_select(0, source)) for key, value in decoded.past]
            hypotheses = torch.cat([hypotheses.index_select(0, source), token.view(-1, 1)], dim=1)
            scores = best
            ended = torch.where(frozen, ended, token == eos)
        counted = hypotheses.ne(eos).sum(dim=1).view(batch, num_beams).float()
        # An utterance without a frame ends with the score 0 and no token: 0, not 0 / 0.
        normalised = (scores / counted.pow(length_penalty)).masked_fill(scores == 0, 0.0)
        ranked = normalised.sort(dim=-1, descending=True, stable=True)
        results = []
        for row in range(batch):
            chosen = ranked.indices[row, :num_return_sequences].tolist()
            rows = [hypotheses[row * num_beams + beam, 1:].tolist() for beam in chosen]
            tokens = [[token for token in tokens if token != eos] for tokens in rows]
            values = ranked.values[row, : len(chosen)].tolist()
            results.append(NBest(tokens, values, [[] for _ in tokens]))
        if with_confidences:
            for row, rescored in zip(results, self._rescore(results, hidden, mask, 0.0, 0.0), strict=True):
                # The order stays that of the search.
                place = {tuple(tokens): i for i, tokens in enumerate(rescored.tokens)}
                picked = [place[tuple(tokens)] for tokens in row.tokens]
                row.token_confidences = [rescored.token_confidences[i] for i in picked]
                row.confidences = [rescored.confidences[i] for i in picked]
        return results

    def _align_results(self, results: list[NBest], log_probs: Tensor, lengths: Tensor) -> None:
        """Frames of hypotheses that came without: CTC forced alignment or, with too few frames, an even spread."""
        for row, result in enumerate(results):
            length = int(lengths[row])
            for index, tokens in enumerate(result.tokens):
                repeats = sum(a == b for a, b in zip(tokens, tokens[1:], strict=False))
                if not tokens:
                    result.frames[index] = []
                elif len(tokens) + repeats > length or self.config.pad_token_id in tokens:
                    result.frames[index] = [i * length // len(tokens) for i in range(len(tokens))]
                else:
                    labels = torch.tensor([tokens], device=log_probs.device)
                    result.frames[index] = self._peaks(log_probs[row : row + 1, :length], labels)

    def _peaks(self, log_probs: Tensor, labels: Tensor) -> list[int]:
        """First frame of each label's run in the alignment of one utterance."""
        lengths = torch.tensor([log_probs.shape[1]], device=log_probs.device)
        counts = torch.tensor([labels.shape[1]], device=log_probs.device)
        path = ctc_forced_alignment(log_probs, lengths, labels, counts, self.config.pad_token_id)[0].tolist()
        previous = [self.config.pad_token_id, *path[:-1]]
        return [
            frame
            for frame, (label, before) in enumerate(zip(path, previous, strict=True))
            if label not in (self.config.pad_token_id, before)
        ]

    def _collate(
        self, results: list[NBest], num_return_sequences: int, durations: list[float], device: torch.device
    ) -> WenetU2ppGenerateOutput:
        rows: list[tuple] = []
        for result, duration in zip(results, durations, strict=True):
            for index in range(num_return_sequences):
                # A beam can hold fewer hypotheses than asked for (very short audio): the last one stands in.
                pick = min(index, len(result.tokens) - 1)
                frames = result.frames[pick]
                rows.append(
                    (
                        result.tokens[pick],
                        result.scores[pick],
                        frames,
                        token_borders(frames, duration, self.config.seconds_per_frame),
                        result.token_confidences[pick] if result.token_confidences else [],
                        result.confidences[pick] if result.confidences else 0.0,
                    )
                )
        width = max((len(row[0]) for row in rows), default=0)
        sequences = torch.full((len(rows), width), self.config.pad_token_id, dtype=torch.int64)
        token_frames = torch.full((len(rows), width), -1, dtype=torch.int64)
        timestamps, token_confidences = torch.zeros(len(rows), width, 2), torch.zeros(len(rows), width)
        for index, (tokens, _, frames, borders, token_confidence, _) in enumerate(rows):
            sequences[index, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            if frames:
                token_frames[index, : len(frames)] = torch.tensor(frames)
                timestamps[index, : len(frames)] = torch.tensor(borders)
            if token_confidence:
                token_confidences[index, : len(tokens)] = torch.tensor(token_confidence)
        return WenetU2ppGenerateOutput(
            sequences=sequences.to(device),
            sequences_lengths=torch.tensor([len(row[0]) for row in rows], device=device),
            scores=torch.tensor([row[1] for row in rows], dtype=torch.float64, device=device),
            token_timestamps=timestamps.to(device),
            token_confidences=token_confidences.to(device),
            confidences=torch.tensor([row[5] for row in rows], device=device),
            token_frames=token_frames.to(device),
        )

    @torch.no_grad()
    def align(self, input_features: Tensor, labels: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        """CTC forced alignment of a known text.

        Args:
            input_features (`(b, f, bins)`), attention_mask (`(b, f)`); labels (`(b, n)`): token ids, -100 = padding.
            kwargs: `decoding_chunk_size`, `num_left_chunks` of the encoder.

        Returns:
            `(b, t)` int64: the label of every encoder frame, blank elsewhere. `model.config.seconds_per_frame` turns
            frames into seconds.
        """
        encoded = self.model.encoder(input_features, attention_mask, **{"decoding_chunk_size": -1, **kwargs})
        log_probs = self.ctc_log_probs(encoded.last_hidden_state)
        real = labels != -100
        lengths = encoded.attention_mask.sum(dim=-1)
        return ctc_forced_alignment(
            log_probs, lengths, labels.clamp_min(0), real.sum(dim=-1), self.config.pad_token_id
        )

    def open_stream(
        self,
        batch_size: int = 1,
        chunk_size: int = 16,
        num_left_chunks: int = -1,
        decoding: str | None = None,
        num_beams: int = 10,
        ctc_weight: float = 0.5,
        reverse_weight: float | None = None,
        blank_penalty: float = 0.0,
        length_penalty: float = 0.0,
        hotwords: list[list[int]] | None = None,
        hotwords_score: float = 3.0,
        hotwords_end: str = "resort",
    ) -> WenetU2ppStreamingState:
        """State of `batch_size` new streams. Options as in [`generate`]; `chunk_size` in encoder frames.

        Raises:
            ValueError: the model was not trained with chunks, so that streaming it would not reproduce anything.
        """
        if not self.config.is_streamable:
            raise ValueError("stream: the model has neither use_dynamic_chunk nor static_chunk_size")
        if chunk_size < 1:
            raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
        weight = self.ctc_head.weight
        options = StreamOptions(
            chunk_size=chunk_size,
            num_left_chunks=num_left_chunks,
            decoding=self._check_decoding(decoding, hotwords_end),
            num_beams=num_beams,
            ctc_weight=ctc_weight,
            reverse_weight=self.config.reverse_weight if reverse_weight is None else reverse_weight,
            blank_penalty=blank_penalty,
            length_penalty=length_penalty,
            hotwords=hotwords or [],
            hotwords_score=hotwords_score,
            hotwords_end=hotwords_end,
        )
        return WenetU2ppStreamingState(
            options=options,
            encoder=self.model.encoder.initial_state(batch_size),
            encoder_outputs=[weight.new_zeros(0, self.config.hidden_size) for _ in range(batch_size)],
            beams=[PrefixBeam() for _ in range(batch_size)],
            labels=[[] for _ in range(batch_size)],
            label_log_probs=[[] for _ in range(batch_size)],
            ended=[False] * batch_size,
        )

    @torch.no_grad()
    def stream_step(
        self,
        input_features: Tensor,
        state: WenetU2ppStreamingState | None = None,
        attention_mask: Tensor | None = None,
        is_last: bool | list[bool] = False,
        **options,
    ) -> WenetU2ppStreamOutput:
        """Advance every stream of a batch by one window of features (see [`WenetU2ppProcessor.stream`]).

        Args:
            input_features (`(b, f, bins)`), attention_mask (`(b, f)`): windows, 1 = real frame; a stream whose window
                is all padding stands still. `f` may be 0.
            state: the last step's `state`; `None` opens streams with `options` (see [`open_stream`]).
            is_last: end point, for all streams or each: the result is rescored and final.

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
        if attention_mask is None:
            attention_mask = torch.ones(input_features.shape[:2], dtype=torch.long, device=input_features.device)
        last = [is_last] * batch if isinstance(is_last, bool) else list(is_last)
        for row, (ended, count) in enumerate(zip(state.ended, attention_mask.sum(dim=-1).tolist(), strict=True)):
            if ended and count:
                raise ValueError(f"stream_step: stream {row} has ended; start it anew with state.reset([{row}])")

        opts = state.options
        past_frames = -1 if opts.num_left_chunks < 0 else opts.chunk_size * opts.num_left_chunks
        hidden, mask, encoder = self.model.encoder.forward_chunk(
            input_features, state.encoder, attention_mask, past_frames
        )
        log_probs = self.ctc_log_probs(hidden, opts.blank_penalty)
        lengths = mask.sum(dim=-1).tolist()
        state = replace(
            state,
            encoder=encoder,
            encoder_outputs=[
                torch.cat([seen, new[:length]])
                for seen, new, length in zip(state.encoder_outputs, hidden, lengths, strict=True)
            ],
            ended=[before or now for before, now in zip(state.ended, last, strict=True)],
        )
        graph = ContextGraph(opts.hotwords, opts.hotwords_score) if opts.hotwords else None
        state = self._advance_searches(state, log_probs, lengths, graph)
        return self._stream_output(state, last, graph)

    def _advance_searches(
        self, state: WenetU2ppStreamingState, log_probs: Tensor, lengths: list[int], graph: ContextGraph | None
    ) -> WenetU2ppStreamingState:
        if state.options.decoding in ("ctc_greedy", "attention"):
            best, labels = log_probs.max(dim=-1)
            return replace(
                state,
                labels=[old + new[:n] for old, new, n in zip(state.labels, labels.tolist(), lengths, strict=True)],
                label_log_probs=[
                    old + new[:n] for old, new, n in zip(state.label_log_probs, best.tolist(), lengths, strict=True)
                ],
            )
        beam_size = state.options.num_beams
        values, indices = log_probs.topk(min(beam_size, log_probs.shape[-1]), dim=-1)
        beams = []
        for beam, value, index, length in zip(state.beams, values.tolist(), indices.tolist(), lengths, strict=True):
            # A copy, so that the caller's old state stays what it was; it also drops prefixes that left the beam.
            beam = PrefixBeam.from_dict(beam.to_dict())
            advance_prefix_beam(beam, value[:length], index[:length], beam_size, self.config.pad_token_id, graph)
            beams.append(beam)
        return replace(state, beams=beams)

    def _stream_output(
        self, state: WenetU2ppStreamingState, last: list[bool], graph: ContextGraph | None
    ) -> WenetU2ppStreamOutput:
        sequences, timestamps, scores = [], [], []
        for row in range(state.batch_size):
            result = self._partial(state, row, graph)
            if last[row]:
                result = self._final(state, row, result)
            frames = result.frames[0]
            duration = len(state.encoder_outputs[row]) * self.config.seconds_per_frame
            sequences.append(result.tokens[0])
            scores.append(result.scores[0])
            timestamps.append(token_borders(frames, duration, self.config.seconds_per_frame))
        return WenetU2ppStreamOutput(sequences, timestamps, scores, last, state)

    def _partial(self, state: WenetU2ppStreamingState, row: int, graph: ContextGraph | None) -> NBest:
        """Hypotheses so far, from CTC alone."""
        if state.options.decoding in ("ctc_greedy", "attention"):
            tokens, frames = collapse(state.labels[row], state.label_log_probs[row], self.config.pad_token_id)
            return NBest([tokens], [sum(state.label_log_probs[row])], [frames])
        result = finish_prefix_beam(state.beams[row], graph, state.options.hotwords_end)
        return NBest(result.tokens, result.scores, result.frames)

    def _final(self, state: WenetU2ppStreamingState, row: int, result: NBest) -> NBest:
        """The second pass at the end point."""
        options, hidden = state.options, state.encoder_outputs[row][None]
        if not options.decoding.startswith("attention"):
            return result
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        if not hidden.shape[1]:
            # A stream without a frame: one padded frame, as in `generate`.
            hidden, mask = hidden.new_zeros(1, 1, hidden.shape[2]), mask.new_zeros(1, 1)
        log_probs = self.ctc_log_probs(hidden, options.blank_penalty)
        if options.decoding == "attention":
            results = self._attention_beam_search(hidden, mask, options.num_beams, options.length_penalty, 1, False)
            self._align_results(results, log_probs, mask.sum(dim=-1))
            return results[0]
        memory, memory_mask = self.decoder_memory(hidden, mask, log_probs)
        return self._rescore([result], memory, memory_mask, options.ctc_weight, options.reverse_weight)[0]


class PrefixTree:
    """Distinct beginnings of a list of token sequences.

    Node 0 is the empty beginning and holds `bos`. `tokens[i]`, `depths[i]`, `parents[i]` describe node `i`, which
    comes after its parent; `paths[k]` lists the nodes of sequence `k`, the root first.
    """

    def __init__(self, sequences: list[list[int]], bos: int) -> None:
        self.tokens, self.depths, self.parents = [bos], [0], [-1]
        self.paths: list[list[int]] = []
        children: dict[tuple[int, int], int] = {}
        for sequence in sequences:
            path = [0]
            for token in sequence:
                step = (path[-1], token)
                if step not in children:
                    children[step] = len(self.tokens)
                    self.tokens.append(token)
                    self.depths.append(self.depths[path[-1]] + 1)
                    self.parents.append(path[-1])
                path.append(children[step])
            self.paths.append(path)

    def ancestors(self) -> Tensor:
        """`(nodes, nodes)` bool: node `i` sees node `j`, an ancestor or itself."""
        seen = np.eye(len(self.tokens), dtype=bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return torch.from_numpy(seen)


def add_ctc_confidences(results: list[NBest], log_probs: Tensor) -> None:
    """Probability of each token at its peak frame, and the geometric mean over a hypothesis, in place."""
    for row, result in enumerate(results):
        for tokens, frames in zip(result.tokens, result.frames, strict=True):
            if not tokens:
                result.token_confidences.append([])
                result.confidences.append(1.0)
                continue
            picked = log_probs[row, torch.tensor(frames), torch.tensor(tokens)]
            result.token_confidences.append(picked.exp().tolist())
            result.confidences.append(float(picked.mean().exp()))
