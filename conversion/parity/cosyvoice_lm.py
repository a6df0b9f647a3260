"""CosyVoice's language models against upstream: training sequences, logits, losses, DPO, decoding, streamed text."""

from pathlib import Path

import torch
from cosyvoice_lm import convert
from torch import Tensor
from transformers import AutoConfig

from hf_speechllm.data.cosyvoice_lm_examples import (
    LmExample,
    SpeechLmCollator,
    can_interleave,
    one_stream,
    two_streams,
)
from hf_speechllm.models.modeling_cosyvoice_lm import CosyVoiceLmForCausalLM
from hf_speechllm.models.modeling_cosyvoice_transformer_lm import CosyVoiceTransformerLm
from hf_speechllm.models.speech_head_loss import smoothed_cross_entropy, token_accuracy
from hf_speechllm.models.streaming_cosyvoice_lm import finish_text, push_text, start_text_stream
from hf_speechllm.train.preference_log_probs import answer_log_probs, dpo_loss

from .case import Case, as_float


_UPSTREAM_IGNORED = -1
_DECODE_MODES = ("sft", "zero_shot", "cross_lingual", "instruct", "instruct2")


def check_lm(case: Case, work: Path) -> None:
    """Convert the pack of `case` into `work` and check every expected value."""
    convert(case.directory, work / "model")
    config = AutoConfig.from_pretrained(work / "model")
    with torch.no_grad():
        if config.model_type == "cosyvoice_transformer_lm":
            model = CosyVoiceTransformerLm.from_pretrained(work / "model").eval()
            check_transformer_training(case, model)
        else:
            model = CosyVoiceLmForCausalLM.from_pretrained(work / "model").eval()
            check_qwen_training(case, model)
            if "dpo.loss" in case.tensors:
                check_dpo(case, model)
            if "bistream_dec.ids" in case.tensors:
                check_streamed_text(case, model)
        for mode in _DECODE_MODES:
            if f"{mode}.ids" in case.tensors:
                check_decoding(case, model, mode)


def ratio(case: Case, mode: str, name: str) -> float:
    """A ratio of lengths out of the description of a tensor: `… max_token_text_ratio=6, …`."""
    text = case.facts["tensors"][f"{mode}.ids"]["what"]
    return float(text.partition(f"{name}_token_text_ratio=")[2].partition(",")[0].partition(";")[0])


def check_decoding(case: Case, model: CosyVoiceLmForCausalLM | CosyVoiceTransformerLm, mode: str) -> None:
    """Greedy decoding of one sentence in one mode, and its logits at every step."""
    names = {name: f"{mode}.{name}" for name in ("text", "prompt_text", "prompt_speech_token", "embedding")}
    inputs = {name: case.tensors[full] for name, full in names.items() if full in case.tensors}
    case.use(*(names[name] for name in inputs))
    speaker = inputs.get("embedding")
    if isinstance(model, CosyVoiceLmForCausalLM) and model.config.version == 3:
        model.config.end_of_prompt_id = end_of_prompt(case)
    output = model.generate_speech_tokens(
        text_ids=inputs["text"],
        prompt_text_ids=inputs["prompt_text"],
        prompt_speech_ids=inputs["prompt_speech_token"],
        speaker_embedding=speaker if speaker is not None and speaker.shape[0] else None,
        min_token_text_ratio=ratio(case, mode, "min"),
        max_token_text_ratio=ratio(case, mode, "max"),
        do_sample=False,
        compatibility="upstream",
        output_logits=True,
    )
    case.compare(f"{mode}.ids", output.token_ids[0])
    case.compare(f"{mode}.logits", output.logits[0])


def check_transformer_training(case: Case, model: CosyVoiceTransformerLm) -> None:
    """Version 1: the text encoder, the decoder's input and output, loss and accuracy."""
    names = ("text_token", "text_token_len", "speech_token", "speech_token_len", "embedding")
    text, text_length, speech, speech_length, embedding = (case.tensors[f"train.{name}"] for name in names)
    case.use(*(f"train.{name}" for name in names))
    text_mask, speech_mask = real(text, text_length), real(speech, speech_length)
    encoded = model.encode_text(text, text_mask)
    case.compare("train.text_encoder_out", encoded)
    case.compare("train.text_affine_out", model.text_proj(encoded))
    embeds, mask = model.prompt_embeds(text, text_mask, embedding, None, speech, speech_mask, pad_left=False)
    where = mask.bool()[..., None]
    case.compare("train.lm_input", embeds, where=where)
    case.compare("train.lm_input_len", mask.sum(dim=1).to(case.tensors["train.lm_input_len"].dtype))
    hidden = model.decoder(embeds, mask)
    case.compare("train.lm_output", hidden, where=where)
    case.compare("train.logits", model.lm_head(hidden), where=where)

    end = model.config.end_token_id
    labels = torch.nn.functional.pad(speech.masked_fill(~speech_mask.bool(), -100), (0, 1), value=-100)
    labels.scatter_(1, speech_length.long()[:, None], end)
    output = model(
        input_ids=speech,
        attention_mask=speech_mask,
        text_ids=text,
        text_mask=text_mask,
        speaker_embedding=embedding,
        labels=labels,
    )
    case.compare("train.loss", as_float(output.loss))
    case.compare("train.acc", as_float(token_accuracy(output.logits, labels)))
    before = 2 + text_length.long()
    target = torch.full_like(case.tensors["train.lm_target"], _UPSTREAM_IGNORED)
    for row, count in enumerate(before.tolist()):
        length = int(speech_length[row]) + 1
        target[row, count : count + length] = labels[row, :length]
    case.compare("train.lm_target", target)


def check_qwen_training(case: Case, model: CosyVoiceLmForCausalLM) -> None:
    """Versions 2 and 3: the sequences of both layouts, hidden states, logits, loss and accuracy."""
    rows = pairs(case)
    config = model.config
    for layout in ("unistream", "bistream"):
        examples = []
        for text, speech, instruct in rows:
            blocks = layout == "bistream" and can_interleave(config, text, speech)
            examples.append((two_streams if blocks else one_stream)(config, text, speech, instruct))
        ids, mask, targets = upstream_batch(examples, config.pad_token_id)
        lengths = case.tensors[f"{layout}.lm_input_len"]
        case.compare(f"{layout}.lm_input_len", mask.sum(dim=1).to(lengths.dtype))
        case.compare(f"{layout}.lm_target", upstream_targets(targets, config.first_speech_token_id))
        where = mask.bool()[..., None]
        case.compare(f"{layout}.lm_input", model.get_input_embeddings()(ids), where=where)
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        case.compare(f"{layout}.lm_output", hidden, where=where)
        output = model(
            input_ids=ids, attention_mask=mask, labels=torch.roll(targets, 1, dims=1), speech_logits_only=True
        )
        case.compare(f"{layout}.logits", output.logits, where=where)
        # The last target of the longest row has no label to its right.
        batch = collate(examples, config.pad_token_id)
        case.compare(f"{layout}.loss", as_float(model(**batch).loss))
        speech_targets = (targets - config.first_speech_token_id).masked_fill(targets == -100, -100)
        case.compare(f"{layout}.acc", as_float(token_accuracy(output.logits, speech_targets)))


def check_dpo(case: Case, model: CosyVoiceLmForCausalLM) -> None:
    """Log-probabilities of chosen and rejected speech, as upstream computes and as it means them, and the losses."""
    config = model.config
    rejected, lengths = case.tensors["dpo.reject_speech_token"], case.tensors["dpo.reject_speech_token_len"]
    case.use("dpo.reject_speech_token", "dpo.reject_speech_token_len", "dpo.ref_chosen", "dpo.ref_rejected")
    rows = pairs(case)
    worse = [row[:length].tolist() for row, length in zip(rejected, lengths.tolist(), strict=True)]
    examples = [one_stream(config, text, speech, instruct) for text, speech, instruct in rows]
    examples += [
        one_stream(config, text, speech, instruct) for (text, _, instruct), speech in zip(rows, worse, strict=True)
    ]
    ids, mask, targets = upstream_batch(examples, config.pad_token_id)
    case.compare("dpo.lm_target", upstream_targets(targets, config.first_speech_token_id))
    logits = model(input_ids=ids, attention_mask=mask, speech_logits_only=True).logits
    targets = (targets - config.first_speech_token_id).masked_fill(targets == -100, -100)
    kinds = {
        "upstream": {"compatibility": "upstream"},
        "mean": {"reduction": "mean"},
        "sum": {"reduction": "sum"},
    }
    means = []
    for name, options in kinds.items():
        halves = answer_log_probs(logits, targets, **options).chunk(2)
        for side, half in zip(("chosen", "rejected"), halves, strict=True):
            if name == "upstream":
                # Upstream also averages over the padding, whose logits are those of embeddings filled with -1.
                half = upstream_padded_log_probs(model, ids, mask, targets).chunk(2)[side == "rejected"]
            case.compare(f"dpo.{side}_logps_{name}", half)
        if name == "mean":
            means = list(halves)
    chosen = len(rows)
    loss = smoothed_cross_entropy(
        logits[:chosen], targets[:chosen], config.label_smoothing, config.length_normalized_loss
    )
    case.compare("dpo.sft_loss", as_float(loss))
    result = dpo_loss(*means, case.tensors["dpo.ref_chosen"], case.tensors["dpo.ref_rejected"], beta=0.01)
    case.compare("dpo.loss", as_float(result.loss))
    case.compare("dpo.chosen_reward", result.chosen_rewards)
    case.compare("dpo.rejected_reward", result.rejected_rewards)


def upstream_padded_log_probs(model: CosyVoiceLmForCausalLM, ids: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
    """Upstream's mean with the inverted mask, which includes the logits at padding: embeddings of -1 there."""
    embeds = model.get_input_embeddings()(ids).masked_fill(~mask.bool()[..., None], -1.0)
    logits = model(inputs_embeds=embeds, attention_mask=mask, speech_logits_only=True).logits
    return answer_log_probs(logits, targets, compatibility="upstream")


def check_streamed_text(case: Case, model: CosyVoiceLmForCausalLM) -> None:
    """Text token by token: the speech that is given out, and the logits of every step."""
    names = [f"bistream_dec.{name}" for name in ("text", "prompt_text", "prompt_speech_token")]
    text, prompt_text, prompt_speech = (case.tensors[name][0].tolist() for name in names)
    case.use(*names)
    if model.config.version == 3:
        model.config.end_of_prompt_id = end_of_prompt(case)
    stream = start_text_stream(
        model,
        prompt_text,
        prompt_speech,
        do_sample=False,
        max_token_text_ratio=None,
        compatibility="upstream",
        output_logits=True,
    )
    expected = case.tensors["bistream_dec.ids"]
    spoken: list[int] = []
    # Upstream's endless answers were cut after so many tokens.
    cut = int(case.facts["tensors"]["bistream_dec.ids"]["what"].partition("cut at ")[2].partition(" ")[0] or 1 << 30)
    for token in text:
        spoken.extend(push_text(model, stream, [token]))
    for token in finish_text(model, stream):
        spoken.append(token)
        if len(spoken) >= cut:
            break
    case.compare("bistream_dec.ids", torch.tensor(spoken[: max(cut, expected.shape[0])]))
    case.compare("bistream_dec.logits", torch.stack(stream.logits))


def end_of_prompt(case: Case) -> int:
    """The id that every instruction of the case ends with."""
    return int(case.tensors["train.instruct_token"][0, int(case.tensors["train.instruct_token_len"][0]) - 1])


def pairs(case: Case) -> list[tuple[list[int], list[int], list[int]]]:
    """Text, speech and instruction of every training row."""
    columns = []
    for name in ("text", "speech", "instruct"):
        full = f"train.{name}_token"
        if full in case.tensors:
            lengths = case.tensors[f"{full}_len"].tolist()
            columns.append([row[:length].tolist() for row, length in zip(case.tensors[full], lengths, strict=True)])
            case.use(full, f"{full}_len")
        else:
            columns.append([[] for _ in columns[0]])
    return list(zip(*columns, strict=True))


def upstream_batch(examples: list[LmExample], pad_token_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and targets without the end that our examples have as their last input."""
    width = max(len(example.input_ids) for example in examples) - 1
    ids = torch.full((len(examples), width), pad_token_id)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        length = len(example.input_ids) - 1
        ids[row, :length] = torch.tensor(example.input_ids[:-1])
        mask[row, :length] = 1
        targets[row, :length] = torch.tensor(example.labels[1:])
    return ids, mask, targets


def collate(examples: list[LmExample], pad_token_id: int) -> dict[str, Tensor]:
    """A training batch as our collator makes it."""
    rows = [{"input_ids": example.input_ids, "labels": example.labels} for example in examples]
    return SpeechLmCollator(pad_token_id)(rows)


def upstream_targets(targets: Tensor, first: int) -> Tensor:
    """Rows of the head, -1 where nothing is learnt."""
    return (targets - first).masked_fill(targets == -100, _UPSTREAM_IGNORED)


def real(ids: Tensor, lengths: Tensor) -> Tensor:
    """Mask (1 = real) of a batch padded on the right."""
    return (torch.arange(ids.shape[1]) < lengths.long()[:, None]).long()
