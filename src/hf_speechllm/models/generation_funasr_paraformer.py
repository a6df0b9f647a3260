"""Recognition with Paraformer: one pass, the best unit of every token, times from the firing track, hotwords.

Upstream: `inference` in `funasr/models/{paraformer,bicif_paraformer,contextual_paraformer,seaco_paraformer}/model.py`.

Shape legend: `b` utterances, `n` tokens, `t` encoder frames, `u` positions of the firing track, `w` hotwords, `v`
vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .cif_timestamps import firing_segments, token_times
from .mixed_lengths import encode_apart, encode_joined, lengths_to_encode_apart


# Frame that the rules in `cif_timestamps.py` count in.
_RULE_SECONDS = 0.06


@dataclass
class FunasrParaformerGenerateOutput(ModelOutput):
    """
    Args:
        sequences (`(b, n)`, int64): token ids without blank and sentence marks, padded with the blank.
        sequences_lengths (`(b,)`): real tokens of each.
        scores (`(b,)`, float64): sum of the log-probabilities of all positions, dropped ones included.
        token_timestamps (`(b, n, 2)`): start and end in seconds, 0 where padded.
        token_confidences (`(b, n)`), confidences (`(b,)`): probability of each token, and their geometric mean.
        raw_sequences (`(b, n')`), raw_lengths (`(b,)`): before blank and sentence marks were dropped.
        log_probs (`(b, n', v)`): of every position.
        alphas, peaks (`(b, u)`): weights and firing track: of the timestamp head where there is one, else of the
            predictor. track_lengths (`(b,)`): real positions of each.
    """

    sequences: Tensor | None = None
    sequences_lengths: Tensor | None = None
    scores: Tensor | None = None
    token_timestamps: Tensor | None = None
    token_confidences: Tensor | None = None
    confidences: Tensor | None = None
    raw_sequences: Tensor | None = None
    raw_lengths: Tensor | None = None
    log_probs: Tensor | None = None
    alphas: Tensor | None = None
    peaks: Tensor | None = None
    track_lengths: Tensor | None = None


class FunasrParaformerGenerationMixin:
    """`generate` of [`FunasrParaformerForSpeechRecognition`]."""

    @torch.no_grad()
    def generate(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        hotwords: list[list[int]] | None = None,
        hotwords_score: float = 1.0,
        return_timestamps: bool | str = False,
        return_dict_in_generate: bool = False,
    ) -> Tensor | FunasrParaformerGenerateOutput:
        """Recognise a batch.

        Args:
            input_features (`(b, f, input_size)`), attention_mask (`(b, f)`): as from the processor, 1 = real frame.
            hotwords: token ids of phrases to favour; the entry "no hotword" is added here.
            hotwords_score: contextual models: factor of the hotwords' share. SeACo: 0..1, how far a position that the
                hotword decoder claims follows it instead of the recogniser.
            return_dict_in_generate, return_timestamps: either one makes the result a
                [`FunasrParaformerGenerateOutput`].

        Returns:
            `(b, n)` token ids padded with the blank, or the output class.

        Raises:
            ValueError: hotwords for a model without a hotword encoder, or an empty one.
        """
        hotword_ids = self._hotword_ids(hotwords, input_features.device)
        hidden, mask = self._encode(input_features, attention_mask)
        frame_mask = None if bool(mask.all()) else mask
        predicted = self.model.predictor(hidden, frame_mask)
        lengths = predicted.token_lengths
        log_probs = self._log_probs(predicted.embeddings, lengths, hidden, mask, hotword_ids, hotwords_score)
        if self.config.timestamp_head is not None:
            alphas, peaks = self.model.predictor.fine_track(hidden, frame_mask, lengths)
            track_lengths = mask.sum(dim=-1) * self.config.upsample_times
        else:
            alphas, peaks = predicted.alphas, predicted.peaks
            track_lengths = mask.sum(dim=-1) + (alphas.shape[1] - mask.shape[1])
        output = self._collate(log_probs, lengths, alphas, peaks, track_lengths)
        return output if return_dict_in_generate or return_timestamps else output.sequences

    def _encode(self, input_features: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The encoder's frames `(b, t, c)` and their mask `(b, t)`."""
        # Upstream's batches are to be reproduced with their padding.
        is_invariant = self.config.padding == "invariant"
        lengths = lengths_to_encode_apart(input_features, attention_mask) if is_invariant else None
        if lengths is None:
            encoded = self.model(input_features, attention_mask)
            return encoded.last_hidden_state, encoded.attention_mask
        if self.config.encoder_type == "sanm":
            return encode_joined(self.model.encode_joined, input_features, lengths)
        return encode_apart(lambda row, frames: self.model(frames).last_hidden_state, input_features, lengths)

    def _hotword_ids(self, hotwords: list[list[int]] | None, device: torch.device) -> Tensor | None:
        """`(w + 1, m)` padded with -100, or `None`. The last row is "no hotword"."""
        if not hotwords:
            return None
        if self.config.hotword_type is None:
            raise ValueError("hotwords: this model has no hotword encoder (hotword_type is None)")
        rows = [*hotwords, [self.config.bos_token_id]]
        if not all(rows):
            raise ValueError(f"hotwords: expected at least one token in each, got {hotwords}")
        ids = torch.full((len(rows), max(len(row) for row in rows)), -100, device=device)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row, device=device)
        return ids

    def _log_probs(
        self,
        embeddings: Tensor,
        lengths: Tensor,
        hidden: Tensor,
        mask: Tensor,
        hotword_ids: Tensor | None,
        score: float,
    ) -> Tensor:
        """`(b, n, v)` float32 log-probabilities of every position."""
        is_contextual = self.config.hotword_type == "contextual"
        encoded = None if hotword_ids is None else self.model.encode_hotwords(hotword_ids)
        shown = encoded[None].expand(len(hidden), -1, -1) if encoded is not None and is_contextual else None
        decoded = self.model.decode(embeddings, lengths, hidden, mask, shown, score)
        log_probs = self.lm_head(decoded).float().log_softmax(dim=-1)
        if encoded is None or is_contextual or not embeddings.shape[1]:
            return log_probs
        chosen = self._filter_hotwords(encoded, decoded, lengths)
        merged = self.model.attend_to_hotwords(embeddings, decoded, lengths, chosen)
        biased = self.hotword_head(merged).float().log_softmax(dim=-1)
        # A position is either left to the recogniser ("no bias") or given to the hotword decoder.
        own = (biased.argmax(dim=-1, keepdim=True) == self.config.seaco_no_bias_token_id).float()
        own = own * score + (1.0 - score)
        return log_probs * own + biased * (1.0 - own)

    def _filter_hotwords(self, encoded: Tensor, decoded: Tensor, lengths: Tensor) -> Tensor:
        """The hotwords `(w, c)` that each item attends to, `(b, w', c)`: the most attended ones and "no hotword"."""
        batch, keep = len(decoded), self.config.hotword_filter_size
        shown = encoded[None].expand(batch, -1, -1)
        if not 0 < keep < len(encoded):
            return shown
        mask = torch.arange(decoded.shape[1], device=decoded.device) < lengths[:, None]
        upstream = self.config.padding == "upstream"
        scores = self.model.seaco_decoder.hotword_scores(decoded, mask, shown, count_padding=upstream)
        if upstream:
            # Upstream chooses for the whole batch what its first utterance looks at.
            scores = scores[:1].expand(batch, -1)
        best = scores.topk(min(keep, len(encoded) - 1), dim=-1).indices
        chosen = torch.cat([best, best.new_full((batch, 1), len(encoded) - 1)], dim=1)
        return encoded[chosen]

    def _collate(
        self, log_probs: Tensor, lengths: Tensor, alphas: Tensor, peaks: Tensor, track_lengths: Tensor
    ) -> FunasrParaformerGenerateOutput:
        config, device = self.config, log_probs.device
        best, ids = log_probs.max(dim=-1)
        real = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        ids = ids.masked_fill(~real, config.pad_token_id)
        kept = real & (ids != config.pad_token_id) & (ids != config.bos_token_id) & (ids != config.eos_token_id)
        counts = kept.sum(dim=-1)
        # Kept tokens to the front, in order.
        order = (~kept).long().argsort(dim=1, stable=True)[:, : int(counts.max()) if len(counts) else 0]
        front = torch.arange(order.shape[1], device=device) < counts[:, None]
        confidences = best.gather(1, order).masked_fill(~front, 0.0)
        times = torch.zeros(*order.shape, 2)
        for row, count in enumerate(counts.tolist()):
            track = slice(0, int(track_lengths[row]))
            spans = self._token_times(alphas[row, track], peaks[row, track], kept[row], count)
            if spans:
                times[row, :count] = torch.tensor(spans)
        return FunasrParaformerGenerateOutput(
            sequences=ids.gather(1, order).masked_fill(~front, config.pad_token_id),
            sequences_lengths=counts,
            scores=best.double().masked_fill(~real, 0.0).sum(dim=-1),
            token_timestamps=times.to(device),
            token_confidences=confidences.exp().masked_fill(~front, 0.0),
            confidences=(confidences.sum(dim=-1) / counts.clamp_min(1)).exp(),
            raw_sequences=ids,
            raw_lengths=lengths,
            log_probs=log_probs,
            alphas=alphas,
            peaks=peaks,
            track_lengths=track_lengths,
        )

    def _token_times(self, alphas: Tensor, peaks: Tensor, kept: Tensor, count: int) -> list[tuple[float, float]]:
        """Start and end in seconds of the kept tokens of one utterance.

        With a timestamp head: the rules of `cif_timestamps.py`. Without: a token ends with the frame at which it
        fires, and starts where the one before it ended. (Upstream swaps weights and track there.)
        """
        seconds = self.config.seconds_per_frame
        if self.config.timestamp_head is not None:
            segments = firing_segments(alphas, peaks, count, self.config.upsample_times)
            scale = seconds / _RULE_SECONDS
            return [(start * scale, end * scale) for start, end in token_times(segments, count)]
        fires = (torch.where(peaks >= 1.0)[0] + 1).clamp_max(len(peaks) - 1).tolist()
        # A sequential rule with a lower threshold, or rounding, may show fewer peaks than tokens.
        fires += [len(peaks) - 1] * (len(kept) - len(fires))
        starts = [0, *fires[:-1]]
        return [
            (start * seconds, end * seconds)
            for start, end, real in zip(starts, fires, kept.tolist(), strict=False)
            if real
        ]
