"""Every stage of a WeNet CTC/attention model against upstream: features, encoder, streaming, decoders, losses,
searches.

Upstream lets padded frames leak in non-causal models, so the model is loaded with `padding="upstream"`. Rows of padded
frames mean nothing and are left out of comparisons.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from convert_wenet import convert_wenet_pack, to_wenet_state_dict
from torch import Tensor, nn

import hf_speechllm  # noqa: F401  registers the Auto classes
from hf_speechllm.models.conformer import sinusoidal_positions
from hf_speechllm.models.ctc import token_borders
from hf_speechllm.models.feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor
from hf_speechllm.models.modeling_wenet_u2pp import WenetU2ppForSpeechRecognition, frame_labels, reverse_labels
from hf_speechllm.models.processing_wenet_u2pp import WenetU2ppProcessor
from hf_speechllm.models.streaming import EncoderStreamingState
from hf_speechllm.upstream.cmvn import read_cmvn
from hf_speechllm.upstream.yaml_config import read_yaml_mapping

from .case import Case, as_float
from .wenet_paraformer import check_wenet_paraformer


# float32 rounding of the power spectrum, relative to the strongest mel band of a frame.
_SPECTRUM_ROUNDING = 1e-6


def check_wenet(case: Case, work: Path) -> None:
    """Convert the pack of `case` into `work` and check every expected value."""
    if read_yaml_mapping(case.directory / "train.yaml").get("model") == "paraformer":
        check_wenet_paraformer(case, work)
        return
    convert_wenet_pack(case.directory, work / "model")
    model = WenetU2ppForSpeechRecognition.from_pretrained(work / "model", padding="upstream").eval()
    processor = WenetU2ppProcessor.from_pretrained(work / "model")
    WenetChecks(case, model, processor).run()


class WenetChecks:
    """The stages, in the order in which a failure of one explains those after it."""

    def __init__(self, case: Case, model: WenetU2ppForSpeechRecognition, processor: WenetU2ppProcessor) -> None:
        self.case, self.model, self.processor = case, model, processor
        tensors = case.tensors
        feats = [
            tensors[f"feat{i}"] for i in range(sum(name.startswith("feat") and name[4:].isdigit() for name in tensors))
        ]
        self.features = nn.utils.rnn.pad_sequence(feats, batch_first=True)
        self.lengths = torch.tensor([len(feat) for feat in feats])
        self.mask = (torch.arange(self.features.shape[1]) < self.lengths[:, None]).long()
        self.labels = tensors["target"].long().masked_fill(tensors["target"] < 0, -100)
        self.label_lengths = (self.labels >= 0).sum(dim=1)

    def run(self) -> None:
        self.check_front_end()
        with torch.no_grad():
            self.check_encoder()
            self.check_streaming()
            self.check_decoders()
            self.check_searches()
            self.check_text()
        self.check_losses()
        self.check_gradients()
        self.check_batch_norm_training()
        self.check_state_dict()

    # -- features ----------------------------------------------------------------------------------------------------
    def check_front_end(self) -> None:
        case = self.case
        for index in range(len(self.lengths)):
            wave, name = case.tensors[f"wav{index}_int16"], f"feat{index}"
            case.use(f"wav{index}_int16")
            feature_extractor = self.processor.feature_extractor
            assert isinstance(feature_extractor, KaldiFbankFeatureExtractor)
            actual = feature_extractor(wave.numpy(), sampling_rate=16000)["input_features"][0]
            expected = case.tensors[name]
            if actual.shape != expected.shape:
                case.compare(name, actual)
                continue
            # A quiet band next to a loud one carries the loud one's float32 rounding: allow that much in its
            # logarithm.
            headroom = (expected.amax(dim=-1, keepdim=True) - expected).exp()
            allowed = case.atol + case.rtol * expected.abs() + _SPECTRUM_ROUNDING * headroom
            difference = (actual - expected).abs()
            case.record(
                name,
                float(difference.max()),
                f"{case.atol} + float32 rounding of the frame",
                bool((difference <= allowed).all()),
            )
        case.compare("feats_lengths", self.mask.sum(dim=1).to(case.tensors["feats_lengths"].dtype))
        if "cmvn_mean" in case.tensors:
            cmvn = self.model.model.encoder.cmvn
            case.compare("cmvn_mean", cmvn.mean)
            case.compare("cmvn_istd", cmvn.inverse_std)
            path = case.directory / "global_cmvn"
            mean, inverse_std = read_cmvn(path, is_json=path.read_bytes().lstrip().startswith(b"{"))
            case.compare("cmvn_mean", torch.as_tensor(mean))
            case.compare("cmvn_istd", torch.as_tensor(inverse_std))

    # -- encoder -----------------------------------------------------------------------------------------------------
    def check_encoder(self) -> None:
        case, encoder = self.case, self.model.model.encoder
        captured = {}
        handles = [
            encoder.layers[0].register_forward_hook(lambda module, args, output: captured.update(layer0=output[0]))
        ]
        feed_forward = encoder.layers[0].feed_forward
        handles.append(
            feed_forward.register_forward_hook(
                lambda module, args, output: captured.update(moe_in=args[0], moe_out=output)
            )
        )
        encoded = self.encode()
        for handle in handles:
            handle.remove()
        self.hidden, self.frame_mask = encoded.last_hidden_state, encoded.attention_mask
        rows = self.frame_mask[..., None]
        embedded, positions = encoder.embed(self.features)
        case.compare("embed_out", embedded)
        if "pos_emb_first8" in case.tensors:
            case.compare("pos_emb_first8", positions[:, :8])
        case.compare("encoder_layer0_out", captured["layer0"], where=rows)
        case.compare("encoder_out_full", self.hidden, where=rows)
        case.compare("encoder_lens", self.frame_mask.sum(dim=1).to(case.tensors["encoder_lens"].dtype))
        self.log_probs = self.model.ctc_log_probs(self.hidden)
        case.compare("ctc_logprobs_full", self.log_probs, where=rows)
        for name in case.tensors:
            if match := re.fullmatch(r"encoder_out_chunk(-?\d+)_left(-?\d+)", name):
                chunk, left = map(int, match.groups())
                case.compare(name, self.encode(chunk, left).last_hidden_state, where=rows)
        if "moe_layer0_in" in case.tensors:
            self.check_router(captured["moe_in"][:1], captured["moe_out"][:1])

    def encode(self, chunk: int = -1, left: int = -1) -> Any:
        return self.model.model.encoder(self.features, self.mask, decoding_chunk_size=chunk, num_left_chunks=left)

    def check_router(self, inputs: Tensor, outputs: Tensor) -> None:
        case, layer = self.case, self.model.model.encoder.layers[0].feed_forward
        real = self.frame_mask[0]
        case.compare("moe_layer0_in", inputs, where=real[None, :, None])
        case.compare("moe_layer0_out", outputs, where=real[None, :, None])
        flat = inputs[0]
        index, weights = layer.route(flat)
        case.compare("moe_layer0_router_logits", layer.router(flat), where=real[:, None])
        case.compare("moe_layer0_selected", index.to(case.tensors["moe_layer0_selected"].dtype), where=real[:, None])
        case.compare("moe_layer0_weights", weights, where=real[:, None])

    # -- streaming ---------------------------------------------------------------------------------------------------
    def check_streaming(self) -> None:
        names = [name for name in self.case.tensors if re.fullmatch(r"stream_chunk\d+_left-?\d+_utt\d+", name)]
        for name in names:
            chunk, left, item = map(int, re.fullmatch(r"stream_chunk(\d+)_left(-?\d+)_utt(\d+)", name).groups())
            self.check_stream(name, chunk, left, item)

    def check_stream(self, name: str, chunk: int, left: int, item: int) -> None:
        case, encoder, config = self.case, self.model.model.encoder, self.model.config
        features = self.features[item : item + 1, : int(self.lengths[item])]
        context = config.right_context + 1
        window = (chunk - 1) * config.subsampling_rate + context
        state, outputs, trace = encoder.initial_state(), [], []
        for number, first in enumerate(range(0, features.shape[1] - context + 1, chunk * config.subsampling_rate)):
            piece = features[:, first : first + window]
            output, _, state = encoder.forward_chunk(piece, state, max_past_frames=chunk * left)
            outputs.append(output)
            attention, convolution = upstream_caches(self.model, state)
            trace.append(
                {
                    "chunk": number,
                    "first_frame": first,
                    "frames": piece.shape[1],
                    "offset_after": int(state.offsets[0]),
                    "att_cache": list(attention.shape),
                    "cnn_cache": list(convolution.shape),
                }
            )
            if number == 2:
                for suffix, cache in (("att_cache", attention), ("cnn_cache", convolution)):
                    if f"{name}_{suffix}_after3" in case.tensors:
                        case.compare(f"{name}_{suffix}_after3", cache)
        streamed = torch.cat(outputs, dim=1)
        case.compare(name, streamed)
        masked = encoder(features, decoding_chunk_size=chunk, num_left_chunks=left).last_hidden_state
        if f"{name}_vs_mask_max_abs_diff" in case.decodes:
            difference = float((streamed - masked).abs().max())
            upstream = case.decodes[f"{name}_vs_mask_max_abs_diff"]
            case.record(
                f"decodes/{name}_vs_mask_max_abs_diff",
                difference,
                max(upstream, case.atol),
                difference <= max(upstream, case.atol),
            )
        self.check_decode(f"{name}_trace", lambda: trace)
        self.check_decode(f"{name}_lens", lambda: [streamed.shape[1], masked.shape[1]])

    # -- decoders ----------------------------------------------------------------------------------------------------
    def check_decoders(self) -> None:
        case, config = self.case, self.model.config
        width = int(self.label_lengths.max())
        for side, labels in (
            ("", self.labels[:, :width]),
            ("r_", reverse_labels(self.labels, self.label_lengths)[:, :width]),
        ):
            if f"{side}ys_in" in case.tensors:
                inputs, targets = frame_labels(labels, self.label_lengths, config.bos_token_id, config.eos_token_id)
                case.compare(f"{side}ys_in", inputs.to(case.tensors[f"{side}ys_in"].dtype))
                expected = case.tensors[f"{side}ys_out"]
                case.compare(f"{side}ys_out", targets.masked_fill(targets == -100, -1).to(expected.dtype))
        case.use("target")
        case.compare("target_lengths", self.label_lengths.to(case.tensors["target_lengths"].dtype))

    def full_context_loss(self) -> Any:
        return self.model(self.features, self.mask, self.labels, decoding_chunk_size=-1)

    def check_losses(self) -> None:
        case, config = self.case, self.model.config
        with torch.no_grad():
            output = self.full_context_loss()
            _, targets = frame_labels(self.labels, self.label_lengths, config.bos_token_id, config.eos_token_id)
            rows = (targets != -100)[..., None]
            decoder_logits = {
                "decoder_logits_l2r": output.decoder_logits,
                "decoder_logits_r2l": output.right_decoder_logits,
            }
            for name, logits in decoder_logits.items():
                if name in case.tensors:
                    case.compare(name, logits, where=rows)
            parts = {
                "loss": output.loss,
                "loss_ctc": output.loss_ctc,
                "loss_att": output.loss_att,
                "th_accuracy": output.accuracy,
            }
            for name, logits, labels in (
                ("loss_l2r", output.decoder_logits, self.labels),
                ("loss_r2l", output.right_decoder_logits, reverse_labels(self.labels, self.label_lengths)),
            ):
                if name in case.tensors and logits is not None:
                    _, side = frame_labels(labels, self.label_lengths, config.bos_token_id, config.eos_token_id)
                    parts[name] = self.model._label_smoothing_loss(logits, side)
            for name, value in parts.items():
                if name in case.tensors:
                    case.compare(name, as_float(value))
            self.check_decode("training_forward_dynamic_chunk", self.dynamic_chunk_losses)

    def dynamic_chunk_losses(self) -> list[dict]:
        results = []
        for entry in self.case.decodes["training_forward_dynamic_chunk"]:
            generator = torch.Generator().manual_seed(entry["torch_manual_seed"])
            num_frames = self.hidden.shape[1]
            chunk, left = self.model.model.encoder.draw_dynamic_chunk(num_frames, generator)
            generator.manual_seed(entry["torch_manual_seed"])
            output = self.model(self.features, self.mask, self.labels, decoding_chunk_size=0, generator=generator)
            results.append(
                {
                    "torch_manual_seed": entry["torch_manual_seed"],
                    "chunk_size": chunk,
                    "num_left_chunks": left,
                    "max_len": num_frames,
                    "loss": float(output.loss),
                    "loss_att": float(output.loss_att),
                    "loss_ctc": float(output.loss_ctc),
                    "th_accuracy": float(output.accuracy),
                }
            )
        return results

    # -- searches ----------------------------------------------------------------------------------------------------
    def check_decode(self, name: str, compute: Callable[[], Any]) -> None:
        if name in self.case.decodes:
            self.case.compare_value(f"decodes/{name}", compute(), self.case.decodes[name])

    def search(self, decoding: str, like: list[dict], **options: Any) -> list[dict]:
        """Results of `generate` with the keys that `like` has."""
        beam = self.case.decodes.get("beam_size", 10)
        options = {"num_beams": beam, "ctc_weight": 0.0, "reverse_weight": 0.0, "decoding": decoding, **options}
        if "nbest" in like[0]:
            options["num_return_sequences"] = len(like[0]["nbest"])
        returned = options.get("num_return_sequences", 1)
        output = self.model.generate(self.features, self.mask, return_dict_in_generate=True, **options)
        rows = [row[:n] for row, n in zip(output.sequences.tolist(), output.sequences_lengths.tolist(), strict=True)]
        frames = [row[: len(ids)] for row, ids in zip(output.token_frames.tolist(), rows, strict=True)]
        results = []
        for index, wanted in enumerate(like):
            first = index * returned
            found = {
                "tokens": rows[first],
                "score": float(output.scores[first]),
                "times": frames[first],
                "confidence": float(output.confidences[first]),
                "tokens_confidence": output.token_confidences[first, : len(rows[first])].tolist(),
                "nbest": rows[first : first + returned],
                "nbest_scores": output.scores[first : first + returned].tolist(),
                "nbest_times": frames[first : first + returned],
            }
            results.append({key: found[key] for key in wanted})
        return results

    def check_searches(self) -> None:
        methods = {
            "ctc_greedy_search": "ctc_greedy",
            "ctc_prefix_beam_search": "ctc_prefix_beam_search",
            "attention": "attention",
            "attention_rescoring": "attention_rescoring",
        }
        for name, expected in self.case.decodes.items():
            if name in methods:
                self.check_decode(name, lambda n=name, e=expected: self.search(methods[n], e))
            elif match := re.fullmatch(r"attention_rescoring ctc_weight=(\S+) reverse_weight=(\S+)", name):
                weights = {"ctc_weight": float(match[1]), "reverse_weight": float(match[2])}
                self.check_decode(name, lambda e=expected, w=weights: self.search("attention_rescoring", e, **w))
            elif match := re.fullmatch(r"attention beam=(\d+)", name):
                self.check_decode(name, lambda e=expected, b=int(match[1]): self.search("attention", e, num_beams=b))
            elif match := re.fullmatch(r"attention length_penalty=(\S+)", name):
                self.check_decode(
                    name, lambda e=expected, p=float(match[1]): self.search("attention", e, length_penalty=p)
                )
            elif match := re.fullmatch(r"blank_penalty=(\S+)", name):
                options = {"blank_penalty": float(match[1])}
                self.check_decode(
                    name, lambda e=expected, o=options: {k: self.search(methods[k], v, **o) for k, v in e.items()}
                )
            elif match := re.fullmatch(r"decoding_chunk_size=(-?\d+) left=(-?\d+)(.*)", name):
                options = {"decoding_chunk_size": int(match[1]), "num_left_chunks": int(match[2])}
                options |= {key: float(value) for key, value in re.findall(r"(\w+_weight)=(\S+)", match[3])}
                self.check_decode(
                    name, lambda e=expected, o=options: {k: self.search(methods[k], v, **o) for k, v in e.items()}
                )
            elif name == "context":
                self.check_decode(name, lambda e=expected: self.context(e, methods))
        self.check_decode("beam_size", lambda: self.case.decodes["beam_size"])
        self.check_decode("forced_alignment", self.alignment)
        self.case.use("decodes/forced_alignment_note")

    def context(self, expected: dict, methods: dict[str, str]) -> dict:
        phrase_ids = self.processor.hotword_ids(expected["phrases"])
        options = {
            "hotwords": phrase_ids,
            "hotwords_score": expected["context_score"],
            "hotwords_end": "upstream",
            "num_beams": expected["beam_size"],
            "ctc_weight": expected["ctc_weight"],
            "reverse_weight": expected["reverse_weight"],
        }
        found = {
            name: self.search(methods[name], value, **options) for name, value in expected.items() if name in methods
        }
        return {**expected, "phrase_ids": phrase_ids, **found}

    def alignment(self) -> list[dict]:
        results = []
        paths = self.model.align(self.features, self.labels, self.mask).tolist()
        blank, seconds = self.model.config.pad_token_id, self.model.config.seconds_per_frame
        for index, (path, length) in enumerate(zip(paths, self.frame_mask.sum(dim=1).tolist(), strict=True)):
            path = path[:length]
            peaks = [i for i, label in enumerate(path) if label != blank and (i == 0 or path[i - 1] != label)]
            duration = len(self.case.tensors[f"wav{index}_int16"]) / 16000
            borders = [list(border) for border in token_borders(peaks, duration, seconds)]
            results.append({"alignment": path, "peaks": peaks, "timestamps": borders})
        # Upstream's first border is the integer 0.
        for entry, wanted in zip(results, self.case.decodes["forced_alignment"], strict=True):
            for border, reference in zip(entry["timestamps"], wanted["timestamps"], strict=True):
                border[0] = int(border[0]) if reference[0] == 0 and border[0] == 0 else border[0]
        return results

    def upstream_text(self, tokens: list[int]) -> str:
        """Upstream leaves the word mark in the text of character models."""
        tokenizer = self.processor.tokenizer
        delimiter = "\u2581" if tokenizer.unit_kind == "char" else None
        return tokenizer.decode(tokens, group_tokens=False, word_delimiter=delimiter)

    def check_text(self) -> None:
        def texts() -> list[str]:
            greedy = self.case.decodes["ctc_greedy_search"]
            return [self.upstream_text(entry["tokens"]) for entry in greedy]

        self.check_decode("detokenized_greedy", texts)

    # -- training ----------------------------------------------------------------------------------------------------
    def check_gradients(self) -> None:
        if "gradients" not in self.case.facts:
            return
        expected = self.case.facts["gradients"]
        self.model.zero_grad()
        self.full_context_loss().loss.backward()
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        upstream = to_wenet_state_dict(gradients, self.model.config)
        norms = {name: float(gradient.norm()) for name, gradient in upstream.items()}
        for name, norm in expected["norms"].items():
            self.compare_norm(f"gradients/{name}", norms.get(name), norm)
        total = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
        self.compare_norm("gradients/total_norm", total, expected["total_norm"])
        self.model.zero_grad()

    def compare_norm(self, name: str, actual: float | None, expected: float) -> None:
        if actual is None:
            self.case.record(name, None, "missing", expected == 0.0)
            return
        allowed = self.case.atol + 1e-3 * expected
        self.case.record(name, abs(actual - expected), allowed, abs(actual - expected) <= allowed)

    def check_batch_norm_training(self) -> None:
        case = self.case
        if "train_mode_loss" not in case.tensors:
            return
        saved = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0
        self.model.train()
        with torch.no_grad():
            case.compare("train_mode_loss", as_float(self.full_context_loss().loss))
        after = to_wenet_state_dict(self.model.state_dict(), self.model.config)
        for name in case.tensors:
            if name.startswith("train_mode_after/"):
                case.compare(name, after[name.removeprefix("train_mode_after/")])
        self.model.eval()
        self.model.load_state_dict(saved)

    def check_state_dict(self) -> None:
        """Every tensor of the pack is in the exported state dict, with its shape, or on the list of ignored ones."""
        exported = to_wenet_state_dict(self.model.state_dict(), self.model.config)
        for name, (shape, _) in self.case.facts.get("state_dict", {}).items():
            found = list(exported[name].shape) if name in exported else None
            ignored = name.endswith(".pe") or "concat_linear" in name
            self.case.record(
                f"state_dict/{name}", None, "shape", ignored or found == shape, shape=found, ignored=ignored
            )


def upstream_caches(model: WenetU2ppForSpeechRecognition, state: EncoderStreamingState) -> tuple[Tensor, Tensor]:
    """The state in upstream's layout: attention `(layers, heads, t, 2 * d)` and convolution `(layers, 1, c, k - 1)`.

    Our keys carry their position, which is taken out again here.
    """
    attention, convolution = [], []
    cached = state.key_mask.shape[1]
    positions = torch.arange(cached) + int(state.offsets[0]) - cached
    table = sinusoidal_positions(positions, model.config.hidden_size)[None]
    if model.config.position_embedding_type == "no_pos":
        table = torch.zeros_like(table)
    for index, layer in enumerate(model.model.encoder.layers):
        key, value, attn = state.keys[index], state.values[index], layer.self_attn
        if attn.relative:
            key = key - attn.split_heads(attn.pos_proj(table))
            key, value = key[:, :: attn.position_groups], value[:, :: attn.position_groups]
        attention.append(torch.cat([key, value], dim=-1))
        conv = state.convolutions[index]
        convolution.append(torch.zeros(0, 0, 0) if conv is None else conv.transpose(1, 2))
    return torch.cat(attention), torch.stack(convolution)
