"""Every stage of SenseVoice against upstream: features, prompts, encoder, answers, texts, times, emoji, losses.

Rows of padded frames mean nothing and are left out of comparisons.
"""

import re
from pathlib import Path
from typing import Any

import torch
from convert_sensevoice import convert_sensevoice_pack, to_upstream_state_dict
from torch import Tensor, nn

import hf_speechllm  # noqa: F401  registers the Auto classes
from hf_speechllm.models.modeling_funasr_sensevoice import FunasrSenseVoiceForSpeechRecognition
from hf_speechllm.models.processing_funasr_sensevoice import FunasrSenseVoiceProcessor, emoji_text

from .case import Case, as_float


# "1e-5 relative for losses".
_LOSS_RTOL = 1e-5
# float32 rounding of the power spectrum, relative to the strongest mel band of a frame.
_SPECTRUM_ROUNDING = 1e-6


def check_sensevoice(case: Case, work: Path) -> None:
    """Convert the pack of `case` into `work` and check every expected value."""
    convert_sensevoice_pack(case.directory, work / "model")
    model = FunasrSenseVoiceForSpeechRecognition.from_pretrained(work / "model").eval()
    processor = FunasrSenseVoiceProcessor.from_pretrained(work / "model")
    SenseVoiceChecks(case, model, processor).run()


class SenseVoiceChecks:
    """The stages, in the order in which a failure of one explains those after it."""

    def __init__(
        self, case: Case, model: FunasrSenseVoiceForSpeechRecognition, processor: FunasrSenseVoiceProcessor
    ) -> None:
        self.case, self.model, self.processor = case, model, processor
        self.features = case.tensors["feats"]
        self.lengths = case.tensors["feats_lens"]
        self.mask = (torch.arange(self.features.shape[1]) < self.lengths[:, None]).long()

    def run(self) -> None:
        self.check_front_end()
        with torch.no_grad():
            for index, combo in enumerate(self.case.facts["combos"]):
                self.check_combination(index, combo)
            for index, entry in enumerate(self.case.facts["timestamps"]):
                self.check_timestamps(index, entry)
        self.check_emoji()
        self.check_losses()

    # -- features ----------------------------------------------------------------------------------------------------
    def check_front_end(self) -> None:
        case = self.case
        waves = [case.tensors[f"wav.{index}"] for index in range(len(self.lengths))]
        case.use(*(f"wav.{index}" for index in range(len(waves))))
        inputs = self.processor(audio=waves, sampling_rate=16000)
        # A quiet band next to a loud one carries the loud one's float32 rounding: allow that much in its logarithm.
        extractor, expected = self.processor.feature_extractor, case.tensors["feats"]
        mean, scale = torch.tensor(extractor.cmvn_mean), torch.tensor(extractor.cmvn_inverse_std)
        bands = (expected / scale + mean).unflatten(-1, (extractor.lfr_m, extractor.feature_size))
        headroom = (bands.amax(dim=-1, keepdim=True) - bands).exp().flatten(2) * scale
        allowed = case.atol + case.rtol * expected.abs() + _SPECTRUM_ROUNDING * headroom
        difference = (inputs["input_features"] - expected).abs() * self.mask[..., None]
        passed = bool((difference <= allowed).all())
        case.record("feats", float(difference.max()), f"{case.atol} + float32 rounding of the frame", passed)
        case.compare("feats_lens", inputs["attention_mask"].sum(dim=1))

    # -- languages and text normalisation ----------------------------------------------------------------------------
    def check_combination(self, index: int, combo: dict[str, Any]) -> None:
        """One language and text normalisation: prompts, log-probabilities, labels of frames, ids, texts."""
        case, model, processor, name = self.case, self.model, self.processor, f"combos[{index}]"
        options = {"language": combo["language"], "use_itn": combo["use_itn"]}
        case.use(f"{name}.language", f"{name}.use_itn")
        batch = {"input_features": self.features, "attention_mask": self.mask}
        prompt_ids = model.prompt_ids(len(self.lengths), **options)
        case.compare_value(f"{name}.query_ids", prompt_ids[0].tolist(), combo["query_ids"])

        captured = self.run_encoder(prompt_ids)
        rows = captured["mask"][..., None]
        for entry, tensor in captured.items():
            if f"c{index}.{entry}" in case.tensors:
                where = None if entry == "encoder_input_first4" else rows
                case.compare(f"c{index}.{entry}", tensor, where=where)
        case.compare(f"c{index}.out_lens", captured["mask"].sum(dim=1))
        frame_ids = [
            row[:length].tolist()
            for row, length in zip(captured["logp"].argmax(dim=-1), captured["mask"].sum(dim=1), strict=True)
        ]
        case.compare_value(f"{name}.frame_ids", frame_ids, combo["frame_ids"])

        output = model.generate(**batch, **options, return_dict_in_generate=True)
        ids = [row[:n].tolist() for row, n in zip(output.sequences, output.sequences_lengths, strict=True)]
        case.compare_value(f"{name}.ids", ids, combo["ids"])
        case.compare_value(f"{name}.text", processor.batch_decode(ids, skip_special_tokens=False), combo["text"])
        case.compare_value(f"{name}.rich", processor.batch_decode(ids, emoji=True), combo["rich"])
        banned = model.generate(**batch, **options, ban_emo_unk=True)
        texts = processor.batch_decode(banned, skip_special_tokens=False)
        case.compare_value(f"{name}.text_ban_emo_unk", texts, combo["text_ban_emo_unk"])
        alone = [
            processor.decode(
                model.generate(self.features[row : row + 1, :length], **options)[0], skip_special_tokens=False
            )
            for row, length in enumerate(self.lengths.tolist())
        ]
        case.compare_value(f"{name}.text_batch1", alone, combo["text_batch1"])

    def run_encoder(self, prompt_ids: Tensor) -> dict[str, Tensor]:
        """What the model computes on the way, under the names of the case."""
        encoder, config = self.model.model.encoder, self.model.config
        captured: dict[str, Tensor] = {}
        last = config.num_hidden_layers - config.num_timestamp_prediction_layers - 1
        handles = [
            encoder.register_forward_pre_hook(
                lambda module, args: captured.update(encoder_input_first4=args[0][:, : config.num_prompt_frames])
            ),
            encoder.layers[last].register_forward_hook(
                lambda module, args, output: captured.update(after_norm_out=output[0])
            ),
        ]
        encoded = self.model.model(self.features, self.mask, prompt_ids)
        for handle in handles:
            handle.remove()
        hidden = encoded.last_hidden_state
        captured |= {"encoder_out": hidden, "logp": self.model.ctc_head(hidden).log_softmax(dim=-1)}
        return captured | {"mask": encoded.attention_mask}

    # -- times -------------------------------------------------------------------------------------------------------
    def check_timestamps(self, index: int, entry: dict[str, Any]) -> None:
        """Times of one utterance. Upstream aligns what the text's pieces encode to: here, the same ids."""
        case, name, row = self.case, f"timestamps[{index}]", entry["utt"]
        case.use(f"{name}.utt", f"{name}.language", f"{name}.use_itn")
        output = self.model.generate(
            self.features[row : row + 1, : self.lengths[row]],
            language=entry["language"],
            use_itn=entry["use_itn"],
            return_timestamps=True,
        )
        ids, prompts = output.sequences[0].tolist(), int(output.prompt_lengths[0])
        tokenizer = self.processor.tokenizer
        text = self.processor.decode(ids, skip_special_tokens=False)
        case.compare_value(f"{name}.text", text, entry["text"])
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
        case.compare_value(f"{name}.pieces", pieces, entry["pieces"])
        case.compare_value(f"{name}.reencoded", [[unit] for unit in ids[prompts:]], entry["reencoded"])
        times = output.token_timestamps[0, prompts:].tolist()
        words = self.processor.word_timestamps(ids[prompts:], times, upstream=True)
        result = {
            "text": text,
            "timestamp": [[round(1000 * word["start"]), round(1000 * word["end"])] for word in words],
            "words": [word["word"] for word in words],
        }
        case.compare_value(f"{name}.result", result, entry["result"])

    def check_emoji(self) -> None:
        for index, entry in enumerate(self.case.facts["rich_cases"]):
            self.case.use(f"rich_cases[{index}].raw")
            self.case.compare_value(f"rich_cases[{index}].out", emoji_text(entry["raw"]), entry["out"])

    # -- training ----------------------------------------------------------------------------------------------------
    def check_losses(self) -> None:
        """Upstream draws one number per utterance in evaluation, too: a generator with its seed draws the same."""
        case, model, facts = self.case, self.model, self.case.facts["train"]
        labels, lengths = case.tensors["train.text"].long(), case.tensors["train.text_lengths"]
        case.use("train.text", "train.text_lengths")
        labels = labels.masked_fill(torch.arange(labels.shape[1]) >= lengths[:, None], -100)
        drawn = torch.rand(len(labels), generator=torch.Generator().manual_seed(facts["seed"]))
        case.compare_value("train.rand_values", drawn.tolist(), facts["rand_values"], atol=0.0)
        config = model.config
        rows = {str(unit): config.language_prompt_ids[name] for name, unit in config.language_token_ids.items()}
        case.compare_value("train.lid_int_dict", rows, facts["lid_int_dict"])
        rows = {str(unit): config.textnorm_prompt_ids[name] for name, unit in config.textnorm_token_ids.items()}
        case.compare_value("train.textnorm_int_dict", rows, facts["textnorm_int_dict"])

        captured: dict[str, Tensor] = {}
        handle = model.model.encoder.register_forward_pre_hook(
            lambda module, args: captured.update(first=args[0][:, : config.num_prompt_frames])
        )
        model.zero_grad()
        generator = torch.Generator().manual_seed(facts["seed"])
        output = model(self.features, self.mask, labels=labels, generator=generator)
        handle.remove()
        output.loss.backward()
        case.compare("train.encoder_input_first4", captured["first"])
        for name, loss in (("loss", output.loss), ("loss_ctc", output.loss_ctc), ("loss_rich", output.loss_rich)):
            expected = case.tensors[f"train.{name}"]
            case.compare(f"train.{name}", as_float(loss)[None], atol=_LOSS_RTOL * float(expected.abs()))
        case.compare("train.acc_rich", as_float(output.accuracy)[None])
        # Upstream weighs a batch in its log by the labels and one more per utterance.
        case.compare("train.weight", as_float((lengths + 1).sum())[None])
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        theirs = to_upstream_state_dict(gradients, config)
        for name in case.tensors:
            if match := re.fullmatch(r"train\.grad\.(.+)", name):
                # Sums of thousands of terms of both signs: rounding follows the largest entry, not each one.
                case.compare(name, theirs[match[1]], atol=case.rtol * float(case.tensors[name].abs().max()))
        norm = nn.utils.get_total_norm(list(gradients.values()))
        case.compare_value("train.grad_norm", float(norm), facts["grad_norm"], atol=case.rtol * facts["grad_norm"])
        model.zero_grad()
