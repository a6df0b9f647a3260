"""Every stage of WeNet's Paraformer against upstream: features, encoder, predictor, decoder, searches, losses.

Upstream lets padded frames and the other items of a batch leak, so the model runs with `padding="upstream"`. Rows of
padded frames and tokens mean nothing and are left out of comparisons.
"""

from pathlib import Path
from typing import Any

import torch
from convert_wenet import convert_wenet_pack
from paraformer_names import upstream_state_dict
from torch import Tensor, nn

import hf_speechllm  # noqa: F401  registers the Auto classes
from hf_speechllm.models.ctc import ctc_greedy_search, ctc_prefix_beam_search
from hf_speechllm.models.kaldi_fbank import kaldi_fbank, low_frame_rate
from hf_speechllm.models.modeling_funasr_paraformer import FunasrParaformerForSpeechRecognition
from hf_speechllm.models.processing_funasr_paraformer import FunasrParaformerProcessor

from .case import Case
from .funasr_paraformer import recorded_firing


# float32 rounding of the power spectrum, relative to the strongest mel band of a frame.
_SPECTRUM_ROUNDING = 4e-6
# Threshold above which upstream sees a peak.
_PEAK = 1 - 1e-4


def check_wenet_paraformer(case: Case, work: Path) -> None:
    """Convert the pack of `case` into `work` and check every expected value."""
    convert_wenet_pack(case.directory, work / "model")
    model = FunasrParaformerForSpeechRecognition.from_pretrained(work / "model", padding="upstream").eval()
    model.config.cif_training = "upstream"
    processor = FunasrParaformerProcessor.from_pretrained(work / "model")
    WenetParaformerChecks(case, model, processor).run()


class WenetParaformerChecks:
    """The stages, in the order in which a failure of one explains those after it."""

    def __init__(
        self, case: Case, model: FunasrParaformerForSpeechRecognition, processor: FunasrParaformerProcessor
    ) -> None:
        self.case, self.model, self.processor = case, model, processor
        tensors = case.tensors
        count = sum(name.startswith("feat") and name[4:].isdigit() for name in tensors)
        self.waves = [tensors[f"wav{index}_int16"] for index in range(count)]
        case.use(*(f"wav{index}_int16" for index in range(count)))
        self.labels = tensors["target"].long().masked_fill(tensors["target"] < 0, -100)

    def run(self) -> None:
        self.check_front_end()
        with torch.no_grad():
            self.check_network()
            self.check_decodes()
        self.check_training()
        self.check_gradients()
        self.check_state_dict()

    # -- features ----------------------------------------------------------------------------------------------------
    def check_front_end(self) -> None:
        case, extractor = self.case, self.processor.feature_extractor
        fbanks = []
        for index, wave in enumerate(self.waves):
            actual = kaldi_fbank(
                wave[None].float(),
                sampling_rate=extractor.sampling_rate,
                num_mel_bins=extractor.feature_size,
                frame_length_ms=extractor.frame_length_ms,
                frame_shift_ms=extractor.frame_shift_ms,
                window_type=extractor.window_type,
            )[0]
            expected = case.tensors[f"feat{index}"]
            if actual.shape != expected.shape:
                case.compare(f"feat{index}", actual)
                continue
            headroom = (expected.amax(dim=-1, keepdim=True) - expected).exp()
            allowed = case.atol + case.rtol * expected.abs() + _SPECTRUM_ROUNDING * headroom
            difference = (actual - expected).abs()
            passed = bool((difference <= allowed).all())
            case.record(
                f"feat{index}", float(difference.max()), f"{case.atol} + float32 rounding of the frame", passed
            )
            fbanks.append(expected)
        lengths = torch.tensor([len(fbank) for fbank in fbanks])
        case.compare("feats_lengths", lengths.to(case.tensors["feats_lengths"].dtype))
        # From here on upstream's own filter banks.
        stacked = low_frame_rate(
            nn.utils.rnn.pad_sequence(fbanks, batch_first=True), lengths, extractor.lfr_m, extractor.lfr_n
        )
        self.lengths = torch.div(lengths + extractor.lfr_n - 1, extractor.lfr_n, rounding_mode="floor")
        self.mask = (torch.arange(stacked.shape[1]) < self.lengths[:, None]).long()
        case.compare("lfr_lens", self.lengths.to(case.tensors["lfr_lens"].dtype))
        expected = case.tensors["lfr_out_utt1"]
        case.compare("lfr_out_utt1", stacked[1, : len(expected)])
        # Padded frames stay: upstream stacks the last frame into them, and they leak.
        self.features = stacked
        if extractor.cmvn_mean is not None:
            self.features = (stacked - torch.tensor(extractor.cmvn_mean)) * torch.tensor(extractor.cmvn_inverse_std)
        inputs = self.processor(audio=[wave.numpy() for wave in self.waves], sampling_rate=extractor.sampling_rate)
        case.record("feature_extractor", None, "lengths", inputs["attention_mask"].sum(dim=1).equal(self.lengths))

    # -- network -----------------------------------------------------------------------------------------------------
    def check_network(self) -> None:
        case, model = self.case, self.model
        network, predictor = model.model, model.model.predictor
        encoded = network(self.features, self.mask)
        hidden, frames = encoded.last_hidden_state, encoded.attention_mask
        self.hidden, self.frames = hidden, frames
        mask = None if bool(frames.all()) else frames
        predicted = predictor(hidden, mask)
        self.output = model.generate(self.features, self.mask, return_dict_in_generate=True)
        tokens = (torch.arange(predicted.embeddings.shape[1]) < predicted.token_lengths[:, None])[..., None]
        case.compare("encoder_out", hidden, where=frames[..., None])
        case.compare("encoder_mask", frames[:, None].to(case.tensors["encoder_mask"].dtype))
        case.compare("acoustic_embeds", predicted.embeddings, where=tokens)
        tail = nn.functional.pad(frames, (1, 0), value=True)
        case.compare("alphas", predicted.alphas, where=tail)
        case.compare("cif_peak", predicted.peaks, where=tail)
        for name in ("token_num", "decoder_out_lens"):
            case.compare(name, predicted.token_lengths.to(case.tensors[name].dtype))
        case.compare("decoder_logprobs", self.output.log_probs, where=tokens)
        fine = frames.repeat_interleave(model.config.upsample_times, dim=1)
        weights = predictor.fine_weights(hidden, mask)
        case.compare("tp_alphas", weights, where=fine)
        case.compare("tp_token_num", weights.sum(dim=-1))
        case.compare("tp_peaks", self.output.peaks, where=fine)

    # -- searches ----------------------------------------------------------------------------------------------------
    def check_decodes(self) -> None:
        found = {
            "paraformer_greedy_search": self.greedy,
            # Positions are independent, so the best of the beam is the best of each.
            "paraformer_beam_search": lambda expected: [{"tokens": row["tokens"]} for row in self.greedy(expected)],
            "ctc_greedy_search": self.ctc_greedy,
            "ctc_prefix_beam_search": self.ctc_prefix,
            "beam_size": lambda expected: expected,
            "detokenized_greedy": self.texts,
            "tokenize": lambda expected: {
                text: list(self.processor.tokenizer(text)["input_ids"]) for text in expected
            },
        }
        for name, check in found.items():
            if name in self.case.decodes:
                expected = self.case.decodes[name]
                self.case.compare_value(f"decodes/{name}", check(expected), expected)

    def raw_ids(self) -> list[list[int]]:
        """Ids as upstream gives them: the end mark is a token there."""
        output = self.output
        return [row[:n].tolist() for row, n in zip(output.raw_sequences, output.raw_lengths, strict=True)]

    def greedy(self, expected: list[dict[str, Any]]) -> list[dict[str, Any]]:
        best = self.output.log_probs.max(dim=-1).values
        results = []
        for row, ids in enumerate(self.raw_ids()):
            scores = best[row, : len(ids)]
            peaks = torch.where(self.output.peaks[row, : int(self.output.track_lengths[row])] > _PEAK)[0]
            results.append(
                {
                    "tokens": ids,
                    "confidence": float(scores.mean().exp()),
                    "tokens_confidence": scores.exp().tolist(),
                    "times": peaks[: len(ids)].tolist(),
                }
            )
        return results

    def ctc_log_probs(self) -> Tensor:
        return self.model.ctc_head(self.hidden).log_softmax(dim=-1)

    def ctc_greedy(self, expected: list[dict[str, Any]]) -> list[dict[str, Any]]:
        found = ctc_greedy_search(self.ctc_log_probs(), self.frames.sum(dim=1), self.model.config.pad_token_id)
        return [{"tokens": tokens} for tokens, _ in found]

    def ctc_prefix(self, expected: list[dict[str, Any]]) -> list[dict[str, Any]]:
        beam = self.case.decodes["beam_size"]
        lengths = self.frames.sum(dim=1)
        found = ctc_prefix_beam_search(self.ctc_log_probs(), lengths, beam, self.model.config.pad_token_id)
        return [
            {
                "tokens": result.tokens[0],
                "score": result.scores[0],
                "times": result.frames[0],
                "nbest": result.tokens,
                "nbest_scores": result.scores,
                "nbest_times": result.frames,
            }
            for result in found
        ]

    def texts(self, expected: list[str]) -> list[str]:
        return [str(self.processor.post_process_upstream(ids)["text"]) for ids in self.raw_ids()]

    # -- training ----------------------------------------------------------------------------------------------------
    def check_training(self) -> None:
        case, model = self.case, self.model
        tensors, predictor = case.tensors, model.model.predictor
        targets, lengths = model._targets(self.labels)
        real = (targets != -100)[..., None]
        case.compare("target_with_eos", targets.masked_fill(targets == -100, -1).to(tensors["target_with_eos"].dtype))
        case.use("target", "target_lengths")
        mask = None if bool(self.frames.all()) else self.frames
        with torch.no_grad():
            scaled = predictor(self.hidden, mask, lengths)
            case.compare("train_alphas", scaled.alphas, where=self.frames)
            case.compare("train_token_num", scaled.token_counts)
            case.compare("train_tp_token_num", predictor.fine_weights(self.hidden, mask).sum(dim=-1))
        plain = None
        for entry in case.decodes.get("sampler", []):
            ratio = entry["sampling_ratio"]
            draws = iter(torch.tensor(draw) for draw in entry["randperm_draws"])
            outcome = self.train(ratio, draws)
            name = f"sampled_embeds_ratio{ratio}"
            case.compare(name, outcome["embeddings"], where=real)
            if ratio == 0:
                plain = outcome
        plain = self.train(0.0, iter(())) if plain is None else plain
        case.compare("train_acoustic_embeds", plain["embeddings"], where=real)
        case.compare("train_decoder_logits_first_pass", plain["logits"], where=real)
        found = []
        for entry in case.decodes.get("sampler", []):
            outcome = self.train(entry["sampling_ratio"], iter(torch.tensor(d) for d in entry["randperm_draws"]))
            right = ((outcome["logits"].argmax(dim=-1) == targets) & real[..., 0]).sum() / real.sum()
            found.append({**entry, "loss_decoder": float(outcome["loss_att"]), "th_accuracy": float(right)})
        if found:
            case.compare_value("decodes/sampler", found, case.decodes["sampler"])
        name = "training_forward sampling_ratio=0"
        if name in case.decodes:
            right = ((plain["logits"].argmax(dim=-1) == targets) & real[..., 0]).sum() / real.sum()
            losses = {
                "loss": float(plain["loss"]),
                "loss_ctc": float(plain["loss_ctc"]) if "loss_ctc" in plain else None,
                "loss_decoder": float(plain["loss_att"]),
                "loss_quantity": float(plain["loss_length"]),
                "loss_quantity_tp": float(plain["loss_timestamp_length"]),
                "th_accuracy": float(right),
            }
            case.compare_value(f"decodes/{name}", losses, case.decodes[name])

    def train(self, sampling_ratio: float, draws: Any, backward: bool = False) -> dict[str, Tensor]:
        """One training step with the recorded firing: losses, logits, and what the decoder saw."""
        model, inputs = self.model, []
        predictor = model.model.predictor
        own, ratio = predictor._towards, model.config.sampling_ratio
        predictor._towards = recorded_firing(model.config, self.case.tensors["train_alphas"])
        model.config.sampling_ratio = sampling_ratio
        handle = model.model.decoder.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        with torch.set_grad_enabled(backward):
            output = model(
                self.features, self.mask, labels=self.labels, sampler_permutations=NextDraw(draws), return_dict=True
            )
        if backward:
            output.loss.backward()
        handle.remove()
        predictor._towards, model.config.sampling_ratio = own, ratio
        return {name: value for name, value in output.items() if isinstance(value, Tensor)} | {
            "embeddings": inputs[-1]
        }

    def check_gradients(self) -> None:
        expected = self.case.facts.get("gradients")
        if expected is None:
            return
        self.model.zero_grad()
        self.train(0.0, iter(()), backward=True)
        gradients = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in self.model.named_parameters()
        }
        upstream = upstream_state_dict(gradients, self.model.config, "wenet")
        for name, norm in expected["norms"].items():
            self.compare_norm(f"gradients/{name}", float(upstream[name].norm()) if name in upstream else None, norm)
        total = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
        self.compare_norm("gradients/total_norm", total, expected["total_norm"])

    def compare_norm(self, name: str, actual: float | None, expected: float) -> None:
        if actual is None:
            self.case.record(name, None, "missing", expected == 0.0)
            return
        allowed = self.case.atol + 1e-3 * expected
        self.case.record(name, abs(actual - expected), allowed, abs(actual - expected) <= allowed)

    def check_state_dict(self) -> None:
        """Every tensor of the pack is in the model with its shape, or in the feature extractor (CMVN)."""
        found = {
            name: list(tensor.shape)
            for name, tensor in upstream_state_dict(self.model.state_dict(), self.model.config, "wenet").items()
        }
        mean = self.processor.feature_extractor.cmvn_mean
        if mean is not None:
            found |= dict.fromkeys(("encoder.global_cmvn.mean", "encoder.global_cmvn.istd"), [len(mean)])
        for name, (shape, _) in self.case.facts.get("state_dict", {}).items():
            ignored = name.endswith(".pe")
            self.case.record(
                f"state_dict/{name}", None, "shape", ignored or found.get(name) == shape, shape=found.get(name)
            )


class NextDraw(list):
    """Gives the recorded permutations in the order in which the sampler asks, whatever row it asks for."""

    def __init__(self, draws: Any) -> None:
        super().__init__()
        self.draws = draws

    def __getitem__(self, row: int) -> Tensor:
        return next(self.draws)
