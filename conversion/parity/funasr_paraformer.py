"""Every stage of Paraformer, BiCif and SeACo against upstream: features, encoder, predictor, decoder, text and times,
hotwords, training.

Upstream lets padded frames and the other items of a batch leak, so batches run with `padding="upstream"`; single
utterances run with the default, which is the same then. Rows of padded frames and tokens mean nothing and are left out
of comparisons.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from convert_funasr import convert_funasr_pack
from paraformer_names import upstream_state_dict
from torch import Tensor, nn

import hf_speechllm  # noqa: F401  registers the Auto classes
from hf_speechllm.models.cif import Firing, integrate
from hf_speechllm.models.cif_predictor import CifOutput
from hf_speechllm.models.cif_timestamps import firing_segments, integrate_and_fire, milliseconds, segments_text
from hf_speechllm.models.configuration_funasr_paraformer import FunasrParaformerConfig
from hf_speechllm.models.kaldi_fbank import kaldi_fbank, low_frame_rate
from hf_speechllm.models.modeling_funasr_paraformer import FunasrParaformerForSpeechRecognition
from hf_speechllm.models.processing_funasr_paraformer import FunasrParaformerProcessor

from .case import Case, as_float


# "1e-5 relative for losses".
_LOSS_RTOL = 1e-5
# float32 rounding of the power spectrum, relative to the strongest mel band of a frame.
_SPECTRUM_ROUNDING = 4e-6
# float32 rounding of a sum, relative to the largest entry of its tensor: upstream's own logits are 2e-5 away from a
# float64 computation of these cases.
_SUM_ROUNDING = 1e-5
# What the recorder of `train_fire` multiplied the weights with, so that every last token fires.
_FIRE_MARGIN = 1 + 2e-5
# How often upstream's code called what; ours is cut differently.
_BOOK_KEEPING = ("train.n_predictor_calls", "train.n_decoder_calls")


def check_paraformer(case: Case, work: Path) -> None:
    """Convert the pack of `case` into `work` and check every expected value."""
    convert_funasr_pack(case.directory, work / "model")
    model = FunasrParaformerForSpeechRecognition.from_pretrained(work / "model", padding="upstream").eval()
    model.config.cif_training = "upstream"
    processor = FunasrParaformerProcessor.from_pretrained(work / "model")
    ParaformerChecks(case, model, processor).run()


class ParaformerChecks:
    """The stages, in the order in which a failure of one explains those after it."""

    def __init__(
        self, case: Case, model: FunasrParaformerForSpeechRecognition, processor: FunasrParaformerProcessor
    ) -> None:
        self.case, self.model, self.processor = case, model, processor
        self.features = case.tensors["feats"]
        self.lengths = case.tensors["feats_lens"].long()
        self.mask = (torch.arange(self.features.shape[1]) < self.lengths[:, None]).long()

    def run(self) -> None:
        case = self.case
        if "params" in case.facts:
            case.compare_value("params", sum(p.numel() for p in self.model.parameters()), case.facts["params"])
        self.check_front_end()
        with torch.no_grad():
            self.check_network()
            self.check_results("infer", case.facts.get("infer", {}), self.features, self.mask)
            for index, facts in enumerate(case.facts.get("singles", [])):
                self.check_single(index, facts)
            self.check_printed()
            for index, entry in enumerate(case.facts.get("ts_function_cases", [])):
                self.check_times(index, entry)
            for name, run in case.facts.get("hotword_runs", {}).items():
                self.check_hotwords(name, run)
        if "train" in case.facts:
            self.check_training("train")
        if "train_fire" in case.facts.get("train", {}):
            self.check_training("train_fire")

    # -- features ----------------------------------------------------------------------------------------------------
    def check_front_end(self) -> None:
        case, extractor = self.case, self.processor.feature_extractor
        waves = [case.tensors[f"wav.{index}"] for index in range(len(self.lengths))]
        case.use(*(f"wav.{index}" for index in range(len(waves))))
        for name, expected in case.tensors.items():
            if match := re.fullmatch(r"(fbank|lfr)\.(\d+)", name):
                bands = kaldi_fbank(
                    waves[int(match[2])][None] * 32768.0,
                    sampling_rate=extractor.sampling_rate,
                    num_mel_bins=extractor.feature_size,
                    frame_length_ms=extractor.frame_length_ms,
                    frame_shift_ms=extractor.frame_shift_ms,
                    window_type=extractor.window_type,
                )
                if match[1] == "lfr":
                    bands = low_frame_rate(bands, torch.tensor([bands.shape[1]]), extractor.lfr_m, extractor.lfr_n)
                self.compare_bands(name, bands[0], expected, torch.ones(1))
        inputs = self.processor(audio=waves, sampling_rate=extractor.sampling_rate)
        case.compare("feats_lens", inputs["attention_mask"].sum(dim=1))
        scale = torch.ones(1) if extractor.cmvn_mean is None else torch.tensor(extractor.cmvn_inverse_std)
        self.compare_bands("feats", inputs["input_features"], case.tensors["feats"], scale)

    def compare_bands(self, name: str, actual: Tensor, expected: Tensor, scale: Tensor) -> None:
        """Compare features; a quiet band next to a loud one carries the loud one's float32 rounding in its logarithm.

        Args:
            scale: of the normalisation, `(1,)` or per feature.
        """
        case, extractor = self.case, self.processor.feature_extractor
        if actual.shape != expected.shape:
            case.compare(name, actual)
            return
        raw = expected / scale
        if len(scale) > 1:
            raw = raw + torch.tensor(extractor.cmvn_mean)
        bands = raw.unflatten(-1, (-1, extractor.feature_size))
        headroom = (bands.amax(dim=-1, keepdim=True) - bands).exp().flatten(-2) * scale
        allowed = case.atol + case.rtol * expected.abs() + _SPECTRUM_ROUNDING * headroom
        difference = (actual - expected).abs()
        if name == "feats":
            difference = difference * self.mask[..., None]
        passed = bool((difference <= allowed).all())
        case.record(name, float(difference.max()), f"{case.atol} + float32 rounding of the frame", passed)

    # -- network -----------------------------------------------------------------------------------------------------
    def run_network(
        self, features: Tensor, mask: Tensor, hotwords: list[list[int]] | None = None
    ) -> dict[str, Tensor]:
        """One inference, and what it computes on the way, under the names of the case."""
        model, captured = self.model, {}
        network = model.model
        handles = [
            capture(network.encoder.layers[0], captured, "encoder_block0_out"),
            capture(network.decoder.layers[0], captured, "decoder_block0_out"),
            capture(model.lm_head, captured, "decoder_logits"),
            network.register_forward_hook(lambda module, args, output: captured.update(encoded=output)),
            network.predictor.register_forward_hook(lambda module, args, output: captured.update(predicted=output)),
        ]
        output = model.generate(features, mask, hotwords=hotwords, return_dict_in_generate=True)
        for handle in handles:
            handle.remove()
        encoded, predicted = captured.pop("encoded"), captured.pop("predicted")
        real = torch.arange(output.raw_sequences.shape[1]) < output.raw_lengths[:, None]
        captured |= {
            "encoder_out": encoded.last_hidden_state,
            "encoder_out_lens": encoded.attention_mask.sum(dim=1),
            "frame_mask": encoded.attention_mask,
            "token_mask": real,
            "acoustic_embeds": predicted.embeddings,
            "alphas": predicted.alphas,
            "cif_peak": predicted.peaks,
            "token_num": predicted.token_lengths.float(),
            "ids": output.raw_sequences.masked_fill(~real, -1),
            "output": output,
        }
        if model.config.timestamp_head is not None:
            captured |= {"us_alphas": output.alphas, "us_peaks": output.peaks}
            times = model.config.upsample_times
            for kind in ("alphas", "peaks"):
                captured[f"ds_{kind}"] = captured[f"us_{kind}"].unflatten(1, (-1, times)).sum(dim=-1)
            # Upstream's coarse track is integrated from the coarse weights.
            captured["ds_peaks"] = torch.stack([self.coarse_peaks(row) for row in captured["ds_alphas"]])
        return captured

    def coarse_peaks(self, alphas: Tensor) -> Tensor:
        return integrate_and_fire(alphas, self.model.config.cif_threshold - 1e-4)

    def check_network(self) -> None:
        captured = self.run_network(self.features, self.mask)
        frames, tokens = captured["frame_mask"], captured["token_mask"]
        for name in ("encoder_block0_out", "encoder_out"):
            self.compare_if_there(name, captured, frames[..., None])
        self.compare_if_there("encoder_out_lens", captured)
        tail = nn.functional.pad(frames, (1, captured["alphas"].shape[1] - frames.shape[1] - 1), value=True)
        for name in ("alphas", "cif_peak"):
            self.compare_if_there(name, captured, tail)
        self.compare_if_there("token_num", captured)
        self.compare_if_there("acoustic_embeds", captured, tokens[..., None])
        if {"acoustic_embeds", "encoder_out"} <= set(self.case.tensors):
            # From upstream's embeddings: a decoder of random weights enlarges their rounding tenfold.
            self.decode_recorded(captured)
        for name in ("decoder_block0_out", "decoder_logits"):
            self.compare_if_there(name, captured, tokens[..., None])
        fine = frames.repeat_interleave(self.model.config.upsample_times, dim=1)
        for name, where in (("us_alphas", fine), ("us_peaks", fine), ("ds_alphas", frames), ("ds_peaks", frames)):
            self.compare_if_there(name, captured, where)
        self.compare_if_there("ids", captured)

    def decode_recorded(self, captured: dict[str, Any]) -> None:
        """The decoder on the recorded output of the stages before it."""
        model, tensors = self.model, self.case.tensors
        lengths = captured["token_mask"].sum(dim=1)
        handle = capture(model.model.decoder.layers[0], captured, "decoder_block0_out")
        decoded = model.model.decode(
            tensors["acoustic_embeds"], lengths, tensors["encoder_out"], captured["frame_mask"]
        )
        handle.remove()
        captured["decoder_logits"] = model.lm_head(decoded)

    def compare_if_there(self, name: str, captured: dict[str, Any], where: Tensor | None = None) -> None:
        if name in self.case.tensors:
            self.compare(name, captured[name], where)

    def compare(self, name: str, actual: Tensor, where: Tensor | None = None) -> None:
        """Compare an activation, with room for the rounding of large terms that cancel."""
        expected = self.case.tensors[name]
        largest = float(expected.abs().max()) if expected.is_floating_point() and expected.numel() else 0.0
        self.case.compare(name, actual, where=where, atol=self.case.atol + _SUM_ROUNDING * largest)

    def check_single(self, index: int, facts: dict[str, Any]) -> None:
        """One utterance alone."""
        features, mask = self.alone(index)
        captured = self.run_network(features, mask)
        prefix = f"single.{index}."
        for name in self.case.tensors:
            if name.startswith(prefix):
                self.compare(name, captured[name.removeprefix(prefix)])
        self.check_results(f"singles[{index}]", facts, features, mask)

    def alone(self, index: int) -> tuple[Tensor, Tensor]:
        length = int(self.lengths[index])
        return self.features[index : index + 1, :length], self.mask[index : index + 1, :length]

    # -- texts and times ---------------------------------------------------------------------------------------------
    def check_results(self, prefix: str, facts: dict[str, Any], features: Tensor, mask: Tensor) -> None:
        """Ids, tokens, texts, times and scores of a batch."""
        if not facts:
            return
        case, tokenizer = self.case, self.processor.tokenizer
        output = self.model.generate(features, mask, return_dict_in_generate=True)
        raw = [row[:n].tolist() for row, n in zip(output.raw_sequences, output.raw_lengths, strict=True)]
        kept = [row[:n].tolist() for row, n in zip(output.sequences, output.sequences_lengths, strict=True)]
        found: dict[str, Any] = {
            "score": output.scores.tolist(),
            "ids": raw,
            "token_int": kept,
            "tokens": [tokenizer.tokens_of_ids(ids) for ids in kept],
            "text": [self.processor.post_process_upstream(ids)["text"] for ids in kept],
        }
        if "ts_ms" in facts:
            segments = [
                firing_segments(*self.track(output, row), len(ids), self.model.config.upsample_times)
                for row, ids in enumerate(kept)
            ]
            found["ts_ms"] = [milliseconds(item) for item in segments]
            found["ts_str"] = [
                segments_text(item, tokens) for item, tokens in zip(segments, found["tokens"], strict=True)
            ]
            found["postprocessed"] = [
                self.processor.post_process_upstream(ids, *self.track(output, row)) for row, ids in enumerate(kept)
            ]
        for name, expected in facts.items():
            if name in found:
                atol = case.rtol * max(map(abs, expected), default=1.0) if name == "score" else None
                case.compare_value(f"{prefix}.{name}", found[name], expected, atol=atol)

    def track(self, output: Any, row: int) -> tuple[Tensor, Tensor]:
        """Weights and firing track of one utterance."""
        length = int(output.track_lengths[row])
        return output.alphas[row, :length], output.peaks[row, :length]

    def printed(self, index: int, hotwords: list[list[int]] | None = None) -> dict[str, Any]:
        """What upstream prints for one utterance."""
        output = self.model.generate(*self.alone(index), hotwords=hotwords, return_dict_in_generate=True)
        tracks = self.track(output, 0) if self.model.config.timestamp_head is not None else ()
        if not int(output.raw_lengths[0]):
            return {"text": ""}
        return self.processor.post_process_upstream(output.sequences[0].tolist(), *tracks)

    def check_printed(self) -> None:
        case = self.case
        for index, facts in enumerate(case.facts.get("generate_single", [])):
            found = self.printed(index)
            for name, expected in facts.items():
                case.compare_value(f"generate_single[{index}].{name}", found.get(name), expected)
        for index, facts in enumerate(case.facts.get("pred_timestamp", [])):
            case.use(f"pred_timestamp[{index}].key")
            output = self.model.generate(*self.alone(index), return_dict_in_generate=True)
            # Upstream hands weights and track over in the wrong order.
            alphas, peaks = output.alphas[0], output.peaks[0]
            found = self.processor.post_process_upstream(output.sequences[0].tolist(), peaks, alphas, upsample_rate=1)
            for name in ("text", "timestamp"):
                case.compare_value(f"pred_timestamp[{index}].{name}", found[name], facts[name])

    def check_times(self, index: int, entry: dict[str, Any]) -> None:
        """The rules for times by themselves."""
        case, name = self.case, f"ts_function_cases[{index}]"
        alphas, peaks = case.tensors[f"ts.{index}.alphas"], case.tensors[f"ts.{index}.peaks"]
        case.use(f"ts.{index}.alphas", f"ts.{index}.peaks")
        inputs = {"chars", "vad_offset", "upsample_rate", "sil_in_str"} & set(entry)
        case.use(*(f"{name}.{key}" for key in inputs))
        chars = entry["chars"][:-1] if entry["chars"][-1:] == ["</s>"] else entry["chars"]
        segments = firing_segments(
            alphas, peaks, len(chars), entry.get("upsample_rate", 3), entry.get("vad_offset", 0)
        )
        case.compare_value(
            f"{name}.string", segments_text(segments, chars, entry.get("sil_in_str", True)), entry["string"]
        )
        case.compare_value(f"{name}.ms", milliseconds(segments), entry["ms"])

    # -- hotwords ----------------------------------------------------------------------------------------------------
    def check_hotwords(self, name: str, run: dict[str, Any]) -> None:
        case, model, config = self.case, self.model, self.model.config
        hotwords = None if run["hotword"] is None else self.processor.hotword_ids(run["hotword"], upstream=True)
        listed = None if hotwords is None else [*hotwords, [config.bos_token_id]]
        captured: dict[str, Any] = {}
        attended: list[Tensor] = []
        handles = []
        if config.hotword_type == "seaco":
            handles = [
                capture(model.hotword_head, captured, "dha_logits"),
                model.model.seaco_decoder.register_forward_hook(lambda module, args, output: attended.append(output)),
                model.model.seaco_decoder.register_forward_pre_hook(
                    lambda module, args: captured.update(selected_context=args[2])
                ),
            ]
        captured |= self.run_network(self.features, self.mask, hotwords)
        for handle in handles:
            handle.remove()
        output, tokens = captured["output"], captured["token_mask"]
        captured["logp"] = output.log_probs
        if attended:
            captured["cif_attended"], captured["dec_attended"] = attended
        if listed is not None:
            ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in listed], True, -100)
            captured["hotword_embed"] = model.model.encode_hotwords(ids)
        if f"{name}.asf_attn" in case.tensors:
            captured["asf_attn"] = self.hotword_attention(captured)
        plain = {"hotword_embed", "selected_context"}
        for key in case.tensors:
            if key.startswith(f"{name}."):
                what = key.removeprefix(f"{name}.")
                where = None if what in plain else tokens[..., None]
                where = tokens[:, None, :, None] if what == "asf_attn" else where
                self.compare(key, captured[what], where)
        no_bias = None
        if "dha_logits" in captured:
            # Upstream's recorder counts padded positions, too.
            chosen = captured["dha_logits"].argmax(dim=-1) == config.seaco_no_bias_token_id
            no_bias = float(chosen.float().mean())
        found = {
            "hotword": run["hotword"],
            "hotword_ids": listed,
            "ids": [row[:n].tolist() for row, n in zip(output.raw_sequences, output.raw_lengths, strict=True)],
            "no_bias_fraction": no_bias,
            "generate_single": [self.printed(index, hotwords) for index in range(len(self.lengths))],
        }
        case.compare_value(f"hotword_runs.{name}", found, {k: v for k, v in run.items() if not k.endswith("margin")})

    def hotword_attention(self, captured: dict[str, Any]) -> Tensor:
        """How the tokens look at all hotwords in the layer that the filter reads, `(b, heads, n, w)`."""
        network = self.model.model
        embeddings, tokens = captured["acoustic_embeds"], captured["token_mask"]
        decoded = network.decode(embeddings, tokens.sum(dim=1), captured["encoder_out"], captured["frame_mask"])
        hotwords = captured["hotword_embed"][None].expand(len(embeddings), -1, -1)
        return network.seaco_decoder.hotword_attention(decoded, None if bool(tokens.all()) else tokens, hotwords)

    # -- training ----------------------------------------------------------------------------------------------------
    def check_training(self, prefix: str) -> None:
        """One training step without dropout: targets, sampler, losses, gradients.

        Rounding decides upstream whether a last token fires. `train` is therefore fired by the recorded weights, and
        in `train_fire` every weight is a bit larger.
        """
        case, model, config = self.case, self.model, self.model.config
        facts = case.facts["train"] if prefix == "train" else case.facts["train"]["train_fire"]
        labels, lengths = case.tensors["train.text"].long(), case.tensors["train.text_lengths"].long()
        labels = labels.masked_fill(torch.arange(labels.shape[1]) >= lengths[:, None], -100)
        case.use("train.text", "train.text_lengths", *_BOOK_KEEPING)
        options = self.hotword_labels()
        captured: dict[str, Any] = {}
        decoder_inputs: list[Tensor] = []
        logits: list[Tensor] = []
        predictor = model.model.predictor
        handles = [
            model.model.decoder.register_forward_pre_hook(lambda module, args: decoder_inputs.append(args[0])),
            model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output)),
            predictor.register_forward_hook(lambda module, args, output: captured.update(predicted=output)),
        ]
        draws = RecordedDraws(case, prefix)
        own = predictor._towards
        with torch.no_grad():
            encoded = model.model(self.features, self.mask)
            mask = None if bool(encoded.attention_mask.all()) else encoded.attention_mask
            targets, target_lengths = model._targets(labels)
            scaled = predictor(encoded.last_hidden_state, mask, target_lengths)
        margin = 1.0 if prefix == "train" else _FIRE_MARGIN
        predictor._towards = recorded_firing(config, case.tensors["train.alphas_scaled"], margin)
        model.zero_grad()
        output = model(self.features, self.mask, labels=labels, sampler_permutations=draws, **options)
        output.loss.backward()
        predictor._towards = own
        for handle in handles:
            handle.remove()

        predicted: CifOutput = captured["predicted"]
        real, frames = targets != -100, encoded.attention_mask
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        theirs = upstream_state_dict({name: grad for name, grad in gradients.items() if grad is not None}, config)
        found: dict[str, Any] = {
            "ys_out": targets.masked_fill(~real, -1),
            "ys_out_lens": target_lengths,
            "token_num": scaled.token_counts,
            "alphas_scaled": scaled.alphas,
            "cif_peak": predicted.peaks,
            "acoustic_embeds": predicted.embeddings,
            "decoder_logits_1st": logits[0],
            "sematic_embeds": decoder_inputs[-1],
            "decoder_logits": logits[-1],
            "batch_size": as_float(len(labels))[None],
            "weight": as_float(target_lengths.sum() if config.length_normalized_loss else len(labels))[None],
        }
        if config.timestamp_head is not None:
            with torch.no_grad():
                found["token_num2"] = predictor.fine_weights(encoded.last_hidden_state, mask).sum(dim=-1)
        losses = {
            "loss": output.loss,
            "loss_att": output.loss_att,
            "loss_pre": output.loss_length,
            "loss_pre2": output.loss_timestamp_length,
            "loss_ctc": output.loss_ctc,
            "loss_seaco": output.loss_hotword,
        }
        where = {
            "alphas_scaled": frames,
            "cif_peak": frames,
            **dict.fromkeys(
                ("acoustic_embeds", "sematic_embeds", "decoder_logits", "decoder_logits_1st"), real[..., None]
            ),
        }
        for key, expected in case.tensors.items():
            if not key.startswith(f"{prefix}."):
                continue
            what = key.removeprefix(f"{prefix}.")
            if what in found:
                self.compare(key, found[what], where.get(what))
            elif what in losses and losses[what] is not None:
                self.compare_loss(key, losses[what], expected)
            elif what in ("acc", "acc_att"):
                case.compare(key, as_float(output.accuracy)[None])
            elif match := re.fullmatch(r"grad\.(.+)", what):
                # Sums of thousands of terms of both signs: rounding follows the largest entry, not each one.
                case.compare(key, theirs[match[1]], atol=case.rtol * float(expected.abs().max()))
        norm = torch.stack([grad.norm() for grad in gradients.values() if grad is not None]).norm()
        lost = [
            not bool(row[int(length) - 1].any())
            for row, length in zip(predicted.embeddings, target_lengths, strict=True)
        ]
        values = {"loss": float(output.loss.detach()), "grad_norm": float(norm)}
        for name, value in values.items():
            label = f"train.{name}" if prefix == "train" else f"train.train_fire.{name}"
            rtol = _LOSS_RTOL if name == "loss" else case.rtol
            case.compare_value(label, value, facts[name], atol=rtol * abs(facts[name]))
        if prefix == "train":
            case.compare_value("train.last_fire_lost", lost, facts["last_fire_lost"])
            case.compare_value("train.randperm_calls", draws.taken, facts["randperm_calls"])
            # Upstream's recorder lists what is frozen; we have no gradient for what the loss does not use, either.
            moving = [name for name in facts["no_grad_params"] if name in theirs]
            case.compare_value("train.no_grad_params", moving, [])
        else:
            case.compare_value("train.train_fire", {"lost": lost}, {"lost": facts["lost"]})

    def compare_loss(self, name: str, actual: Tensor, expected: Tensor) -> None:
        self.case.compare(name, as_float(actual).view(expected.shape), atol=_LOSS_RTOL * float(expected.abs()))

    def hotword_labels(self) -> dict[str, Tensor]:
        """The recorded hotwords of a training batch and their targets."""
        case = self.case
        if "train.hotword_pad" not in case.tensors:
            return {}
        case.use("train.hotword_pad", "train.hotword_lengths", "train.seaco_label_pad")
        hotwords, lengths = case.tensors["train.hotword_pad"].long(), case.tensors["train.hotword_lengths"].long()
        hotwords = hotwords.masked_fill(torch.arange(hotwords.shape[1]) >= lengths[:, None], -100)
        labels = case.tensors["train.seaco_label_pad"].long()
        return {"hotword_ids": hotwords, "hotword_labels": labels.masked_fill(labels < 0, -100)}


def recorded_firing(
    config: FunasrParaformerConfig, deciding: Tensor, margin: float = 1.0
) -> Callable[[Tensor, Tensor, Tensor, Tensor], CifOutput]:
    """Upstream's training rule for a predictor, with the recorded decisions about knife edges.

    Args:
        deciding (`(b, t)`): upstream's scaled weights, which say where a token fires.
        margin: factor of all weights.
    """

    def fire(hidden_states: Tensor, alphas: Tensor, counts: Tensor, lengths: Tensor) -> CifOutput:
        scaled = alphas * (lengths / counts)[:, None] * margin
        passed = scaled.double().cumsum(dim=1).float()
        if config.cif_integration == "cumulative":
            whole = (deciding * margin).double().cumsum(dim=1).float().floor()
            fires = torch.diff(whole, dim=1, prepend=torch.zeros_like(whole[:, :1])) > 0
            firing = Firing(fires, passed - whole, passed - whole + fires)
        else:
            track = torch.stack([integrate_and_fire(row * margin, config.cif_threshold) for row in deciding])
            fires = track >= config.cif_threshold
            fired = fires.float().cumsum(dim=1)
            firing = Firing(fires, passed - fired, passed - fired + fires)
        embeddings = integrate(hidden_states, scaled, firing, int(lengths.max()))
        return CifOutput(embeddings, lengths, counts, scaled, firing.peaks)

    return fire


class RecordedDraws(list):
    """The recorded permutations, in the order in which the sampler asks; only utterances that show labels do."""

    def __init__(self, case: Case, prefix: str) -> None:
        names = [name for name in case.tensors if name.startswith(f"{prefix}.randperm.")]
        case.use(*names)
        super().__init__(case.tensors[f"{prefix}.randperm.{index}"].long() for index in range(len(names)))
        self.taken = 0

    def __getitem__(self, row: int) -> Tensor:
        self.taken += 1
        return super().__getitem__(self.taken - 1)


def capture(module: nn.Module, captured: dict[str, Any], name: str) -> Any:
    """Keeps the (first) output of `module` under `name`; returns the handle of the hook."""

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        captured[name] = output[0] if isinstance(output, tuple) else output

    return module.register_forward_hook(hook)
