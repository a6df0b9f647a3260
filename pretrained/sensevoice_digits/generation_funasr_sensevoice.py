"""Decoding of SenseVoice: tags and text in one pass, times by CTC alignment.

Upstream: `SenseVoiceSmall.inference` in `funasr/models/sense_voice/model.py`. Searches are in `ctc.py`.

Shape legend: `b` utterances, `n` tokens, `t` feature frames, `v` vocabulary. The model's frames are four prompt
frames, whose output answers language, emotion, event and text normalisation, and the `t` frames of the audio.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import ModelOutput

from .configuration_funasr_sensevoice import UNKNOWN_EMOTION
from .context_graph import ContextGraph
from .ctc import ctc_forced_alignment, ctc_prefix_beam_search
from .mixed_lengths import encode_joined, lengths_to_encode_apart


DECODINGS = ("ctc_greedy", "ctc_prefix_beam_search")


@dataclass
class FunasrSenseVoiceGenerateOutput(ModelOutput):
    """
    Args:
        sequences (`(b, n)`, int64): tags of the answers, then the text's tokens; padded with the blank.
        sequences_lengths (`(b,)`): real tokens of each.
        prompt_lengths (`(b,)`): how many of them, at the start, are answers (four, if no answer is blank).
        prompt_answers (`(b, 4)`, int64): best label of each prompt frame: language, emotion, event, normalisation.
        scores (`(b,)`): log-probability of the best path over all frames; prefix beam: of the best text.
        token_timestamps (`(b, n, 2)`): start and end in seconds; 0 for answers and where padded.
        token_confidences (`(b, n)`), confidences (`(b,)`): between 0 and 1; the latter is the text's geometric mean.
        token_frames (`(b, n)`, int64): frame of the audio where each token is most probable; -1 for answers and where
            padded.
    """

    sequences: Tensor | None = None
    sequences_lengths: Tensor | None = None
    prompt_lengths: Tensor | None = None
    prompt_answers: Tensor | None = None
    scores: Tensor | None = None
    token_timestamps: Tensor | None = None
    token_confidences: Tensor | None = None
    confidences: Tensor | None = None
    token_frames: Tensor | None = None


@dataclass
class Transcript:
    """One utterance: tokens of the answers and of the text, and of each the frame among all (prompts included)."""

    answers: list[int]
    answer_frames: list[int]
    tokens: list[int]
    frames: list[int]
    score: float


# Frames whose probabilities a CPU normalises at a time: 25055 units of each are 1.6 MB, which stays in the cache.
_FRAMES_AT_ONCE = 16


@dataclass
class FrameScores:
    """Scores of the real frames of a batch, one utterance behind the other.

    Args:
        logits (`(f, v)` float32), lengths: frames of each utterance, prompt frames included; their sum is `f`.
        best, labels (`(f,)`): the largest logit and its label. normalizers (`(f,)`): log of the sum of exponentials.
    """

    logits: Tensor
    lengths: list[int]
    best: Tensor
    labels: Tensor
    normalizers: Tensor

    @classmethod
    def of(cls, logits: Tensor, lengths: list[int]) -> "FrameScores":
        best, labels = logits.max(dim=-1)
        if logits.device.type != "cpu":
            return cls(logits, lengths, best, labels, logits.logsumexp(dim=-1))
        normalizers, scratch = torch.empty_like(best), torch.empty_like(logits[:_FRAMES_AT_ONCE])
        for start in range(0, len(logits), _FRAMES_AT_ONCE):
            piece, highest = logits[start : start + _FRAMES_AT_ONCE], best[start : start + _FRAMES_AT_ONCE]
            differences = torch.sub(piece, highest[:, None], out=scratch[: len(piece)])
            normalizers[start : start + len(piece)] = differences.exp_().sum(dim=-1).log_() + highest
        return cls(logits, lengths, best, labels, normalizers)

    def spans(self) -> list[slice]:
        """Where each utterance lies."""
        ends = list(accumulate(self.lengths))
        return [slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]


class FunasrSenseVoiceGenerationMixin:
    """`generate` and `align` of [`FunasrSenseVoiceForSpeechRecognition`]."""

    @torch.no_grad()
    def generate(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        language: str | Sequence[str] = "auto",
        use_itn: bool | Sequence[bool] = False,
        ban_emo_unk: bool = False,
        decoding: str | None = None,
        num_beams: int = 10,
        blank_penalty: float = 0.0,
        hotwords: list[list[int]] | None = None,
        hotwords_score: float = 3.0,
        return_timestamps: bool | str = False,
        return_dict_in_generate: bool = False,
    ) -> Tensor | FunasrSenseVoiceGenerateOutput:
        """Recognise a batch.

        Args:
            input_features (`(b, t, input_size)`), attention_mask (`(b, t)`): as from the processor, 1 = real frame.
            language: `"auto"` or a language that has a prompt (`config.language_prompt_ids`), for all or for each.
            use_itn: write numbers and punctuation (`withitn`) or spoken words only (`woitn`), for all or for each.
            ban_emo_unk: never answer `EMO_UNKNOWN`.
            decoding: `"ctc_greedy"` (default, as upstream) or, with hot words by default, `"ctc_prefix_beam_search"`
                over the audio's frames.
            num_beams, blank_penalty: of the beam; the penalty is subtracted from the blank's logit.
            hotwords: token ids of phrases to favour, `hotwords_score` per matched token; beam only.
            return_dict_in_generate, return_timestamps: either one makes the result a
                [`FunasrSenseVoiceGenerateOutput`].

        Returns:
            `(b, n)` token ids padded with the blank, answers first, or the output class.

        Raises:
            ValueError: an unknown language or method, hot words without a beam, or `ban_emo_unk` for a vocabulary
                without that tag.
        """
        if decoding is None:
            decoding = "ctc_prefix_beam_search" if hotwords else "ctc_greedy"
        if decoding not in DECODINGS:
            raise ValueError(f"decoding: expected one of {DECODINGS}, got {decoding!r}")
        if hotwords and decoding == "ctc_greedy":
            raise ValueError("hotwords: need decoding='ctc_prefix_beam_search', got 'ctc_greedy'")
        prompt_ids = self.prompt_ids(input_features.shape[0], language, use_itn).to(input_features.device)
        hidden, mask = self._encode(input_features, attention_mask, prompt_ids)
        frames = FrameScores.of(self.ctc_head(hidden[mask]).float(), mask.sum(dim=-1).tolist())
        searched = frames
        if ban_emo_unk or blank_penalty:
            if ban_emo_unk and UNKNOWN_EMOTION not in self.config.emotion_token_ids:
                raise ValueError(f"ban_emo_unk: emotion_token_ids has no {UNKNOWN_EMOTION}")
            changed = frames.logits.clone()
            if ban_emo_unk:
                changed[:, self.config.emotion_token_ids[UNKNOWN_EMOTION]] = -float("inf")
            changed[:, self.config.pad_token_id] -= blank_penalty
            searched = FrameScores.of(changed, frames.lengths)
        transcripts = self._greedy(searched)
        if decoding == "ctc_prefix_beam_search":
            graph = ContextGraph(hotwords, hotwords_score) if hotwords else None
            self._search(transcripts, searched, num_beams, graph)
        if not (return_dict_in_generate or return_timestamps):
            return self._pad([row.answers + row.tokens for row in transcripts], hidden.device)
        return self._collate(transcripts, frames, searched)

    def _encode(
        self, input_features: Tensor, attention_mask: Tensor | None, prompt_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The encoder's frames `(b, 4 + t, c)` and their mask."""
        lengths = lengths_to_encode_apart(input_features, attention_mask)
        if lengths is None:
            encoded = self.model(input_features, attention_mask, prompt_ids)
            return encoded.last_hidden_state, encoded.attention_mask
        frames = self.model.with_prompts(input_features, prompt_ids)
        first = self.config.num_prompt_frames
        return encode_joined(self.model.encoder.forward_joined, frames, [first + length for length in lengths])

    def prompt_ids(self, batch_size: int, language: str | Sequence[str], use_itn: bool | Sequence[bool]) -> Tensor:
        """Rows of the prompt embedding `(batch_size, 4)` int64 for names, one for all or one for each.

        Raises:
            ValueError: a language without a prompt, or not one value per utterance.
        """
        config = self.config
        languages = [language] * batch_size if isinstance(language, str) else list(language)
        styles = [use_itn] * batch_size if isinstance(use_itn, bool) else list(use_itn)
        for name, values in (("language", languages), ("use_itn", styles)):
            if len(values) != batch_size:
                raise ValueError(f"{name}: expected one value or {batch_size}, got {len(values)}")
        for value in languages:
            # Upstream silently takes "auto" instead, which hides a misspelt language.
            if value not in config.language_prompt_ids:
                raise ValueError(f"language: expected one of {sorted(config.language_prompt_ids)}, got {value!r}")
        rows = [
            [
                config.language_prompt_ids[value],
                config.emotion_prompt_id,
                config.event_prompt_id,
                config.textnorm_prompt_ids["withitn" if style else "woitn"],
            ]
            for value, style in zip(languages, styles, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.long).reshape(batch_size, config.num_prompt_frames)

    @torch.no_grad()
    def align(
        self,
        input_features: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        language: str | Sequence[str] = "auto",
        use_itn: bool | Sequence[bool] = False,
    ) -> Tensor:
        """CTC forced alignment of a known text.

        Args:
            input_features (`(b, t, input_size)`), attention_mask (`(b, t)`).
            labels (`(b, n)`): token ids of the text without its four tags, -100 = padding.
            language, use_itn: as in [`generate`].

        Returns:
            `(b, t)` int64: the label of every frame, blank elsewhere. `model.config.seconds_per_frame` turns frames
            into seconds.

        Raises:
            ValueError: an item has fewer frames than its labels need.
        """
        prompt_ids = self.prompt_ids(input_features.shape[0], language, use_itn).to(input_features.device)
        encoded = self.model(input_features, attention_mask, prompt_ids)
        first = self.config.num_prompt_frames
        log_probs = self.ctc_head(encoded.last_hidden_state[:, first:]).float().log_softmax(dim=-1)
        lengths = encoded.attention_mask.sum(dim=-1) - first
        real = labels != -100
        return ctc_forced_alignment(
            log_probs, lengths, labels.clamp_min(0), real.sum(dim=-1), self.config.pad_token_id
        )

    def _greedy(self, frames: FrameScores) -> list[Transcript]:
        """Best label of every frame. Repeats merge across the border between prompts and audio, as upstream."""
        first, blank = self.config.num_prompt_frames, self.config.pad_token_id
        transcripts = []
        labels, log_probs = frames.labels.tolist(), (frames.best - frames.normalizers).tolist()
        for span in frames.spans():
            label_row, log_prob_row = labels[span], log_probs[span]
            row = Transcript([], [], [], [], sum(log_prob_row))
            for token, start, end in runs(label_row):
                if token == blank:
                    continue
                peak = max(range(start, end), key=log_prob_row.__getitem__)
                tokens, places = (row.answers, row.answer_frames) if start < first else (row.tokens, row.frames)
                tokens.append(token)
                places.append(peak)
            transcripts.append(row)
        return transcripts

    def _search(
        self, transcripts: list[Transcript], frames: FrameScores, num_beams: int, graph: ContextGraph | None
    ) -> None:
        """Replace the texts by those of a prefix beam search over the audio's frames, in place."""
        first = self.config.num_prompt_frames
        log_probs = [frames.logits[span][first:].log_softmax(dim=-1) for span in frames.spans()]
        lengths = torch.tensor([len(row) for row in log_probs], device=frames.logits.device)
        padded = pad_sequence(log_probs, batch_first=True)
        found = ctc_prefix_beam_search(padded, lengths, num_beams, self.config.pad_token_id, graph)
        for row, result in zip(transcripts, found, strict=True):
            row.tokens, row.score = result.tokens[0], result.scores[0]
            row.frames = [frame + first for frame in result.frames[0]]

    def _token_times(self, transcripts: list[Transcript], frames: FrameScores) -> list[list[list[float]]]:
        """Start and end in seconds of each token of the texts.

        The decoded ids themselves are aligned (upstream re-encodes the text piece by piece, and fails where that
        gives other ids). As upstream, a blank costs nothing on frames that say blank, a frame's span is centred on its
        start, and nothing ends later than half a frame before the last frame's end.
        """
        first, blank = self.config.num_prompt_frames, self.config.pad_token_id
        device = frames.logits.device
        counts = torch.tensor([length - first for length in frames.lengths], device=device)
        if not bool(counts.any()):
            return [[] for _ in transcripts]
        # Of the vocabulary only the blank and the tokens of the text are looked at: columns 0, 1 … n.
        columns = nn.functional.pad(self._pad([row.tokens for row in transcripts], device), (1, 0), value=blank)
        emissions = []
        for span, chosen in zip(frames.spans(), columns, strict=True):
            log_probs = frames.logits[span][first:, chosen] - frames.normalizers[span][first:, None]
            log_probs[:, 0].masked_fill_(frames.labels[span][first:] == blank, 0.0)
            emissions.append(log_probs)
        # A token that comes again keeps the column of its first time: equal neighbours need a blank between them.
        labels = (columns[:, 1:, None] == columns[:, None, :]).int().argmax(dim=-1)
        token_counts = torch.tensor([len(row.tokens) for row in transcripts], device=device)
        path = ctc_forced_alignment(pad_sequence(emissions, batch_first=True), counts, labels, token_counts, blank=0)
        step = self.config.seconds_per_frame
        half = step / 2
        times = []
        for labels_of_row, count in zip(path.tolist(), counts.tolist(), strict=True):
            spans = [(start, end) for column, start, end in runs(labels_of_row[:count]) if column != 0]
            latest = count * step - half
            times.append([[max(start * step - half, 0.0), min(end * step - half, latest)] for start, end in spans])
        return times

    def _collate(
        self, transcripts: list[Transcript], frames: FrameScores, searched: FrameScores
    ) -> FunasrSenseVoiceGenerateOutput:
        device, first = frames.logits.device, self.config.num_prompt_frames
        starts = torch.tensor([span.start for span in searched.spans()], dtype=torch.long, device=device)
        sequences = self._pad([row.answers + row.tokens for row in transcripts], device)
        timestamps = torch.zeros(*sequences.shape, 2)
        confidences = torch.zeros(sequences.shape)
        token_frames = torch.full(sequences.shape, -1)
        means = []
        rows = zip(transcripts, self._token_times(transcripts, frames), searched.spans(), strict=True)
        for index, (row, times, span) in enumerate(rows):
            prompts, count = len(row.answers), len(row.answers) + len(row.tokens)
            if not count:
                means.append(1.0)
                continue
            places = torch.tensor(row.answer_frames + row.frames, device=device)
            picked = searched.logits[span][places, sequences[index, :count]] - searched.normalizers[span][places]
            confidences[index, :count] = picked.exp().cpu()
            means.append(float(picked[prompts:].mean().exp()) if row.tokens else 1.0)
            if row.tokens:
                timestamps[index, prompts:count] = torch.tensor(times)
                token_frames[index, prompts:count] = torch.tensor(row.frames) - first
        return FunasrSenseVoiceGenerateOutput(
            sequences=sequences,
            sequences_lengths=torch.tensor([len(row.answers) + len(row.tokens) for row in transcripts], device=device),
            prompt_lengths=torch.tensor([len(row.answers) for row in transcripts], device=device),
            prompt_answers=searched.labels[starts[:, None] + torch.arange(first, device=device)],
            scores=torch.tensor([row.score for row in transcripts], dtype=torch.float64, device=device),
            token_timestamps=timestamps.to(device),
            token_confidences=confidences.to(device),
            confidences=torch.tensor(means, device=device),
            token_frames=token_frames.to(device),
        )

    def _pad(self, rows: list[list[int]], device: torch.device) -> Tensor:
        width = max((len(row) for row in rows), default=0)
        blank = self.config.pad_token_id
        return torch.tensor(
            [row + [blank] * (width - len(row)) for row in rows], dtype=torch.long, device=device
        ).reshape(len(rows), width)


def runs(labels: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of equal labels as (label, first frame, frame after the last)."""
    found, start = [], 0
    for label, group in groupby(labels):
        end = start + len(list(group))
        found.append((label, start, end))
        start = end
    return found
