"""Checks of the cases that are texts: SpeechGPT's three stages and its inference, AnyGPT's dialogues.

A text is checked by being taken apart and put together again by our templates from its parts; ids, labels and decoded
texts come from the processor as it is saved and loaded again.
"""

import re
from pathlib import Path
from typing import Any

from convert_speechgpt_lm import GENERATION
from transformers import AutoProcessor

from hf_speechllm.data.unit_lm_examples import IGNORED, instruction_example, pretraining_blocks, tokenize_lines
from hf_speechllm.models.answers_speechgpt_lm import parse_answer, upstream_fields
from hf_speechllm.models.anygpt_dialogue import (
    MODALITIES,
    SPECIAL_TOKENS,
    TEMPLATES,
    dialogue_text,
    parse_reply,
    parse_speech_string,
    recognition_prompt,
    speech_string,
    synthesis_prompt,
    voice_message,
    voice_reply,
)
from hf_speechllm.models.processing_speechgpt_lm import SpeechGptProcessor
from hf_speechllm.models.prompts_speechgpt_lm import (
    INFERENCE_TEMPLATE,
    META_INSTRUCTION,
    SpeechGptTurn,
    chain_text,
    cross_modal_text,
    inference_prompt,
    replace_recordings,
)
from hf_speechllm.models.unit_string import parse_unit_string, unit_string
from hf_speechllm.upstream.speechgpt_tokenizer import build_speechgpt_tokenizer, read_published_tokenizer

from .case import Case


_CROSS_MODAL = re.compile(r"\[Human\]: (.*?) This is input: (.*?)<eoh> \[SpeechGPT\]: (.*?)<eoa> ", re.DOTALL)
_CHAIN = re.compile(r"\[Human\]: (.*?)<eoh>\. \[SpeechGPT\]: (.*?)<eoa>\.", re.DOTALL)
_RECORDING = re.compile(r"\S+\.(?:wav|flac|mp4)")


def check_prompts(case: Case, work: Path) -> None:
    """Every value of a `prompts` case."""
    published = read_published_tokenizer(case.directory)
    SpeechGptProcessor(build_speechgpt_tokenizer(published)).save_pretrained(work)
    processor = AutoProcessor.from_pretrained(work)
    tokenizer, facts = processor.tokenizer, case.facts

    case.compare_value("prefix", META_INSTRUCTION, facts["prefix"])
    case.compare_value("inference_template", INFERENCE_TEMPLATE, facts["inference_template"])
    for token, index in facts["special_ids"].items():
        case.compare_value(f"special_ids/{token}", tokenizer.convert_tokens_to_ids(token), index)
    for text, pieces in facts["not_single_tokens"].items():
        case.compare_value(f"not_single_tokens/{text}", tokenizer.tokenize(text), pieces)
    stages = facts["stages"]
    for stage in stages:
        check = {"1": _check_pretraining, "2": _check_instructions, "3": _check_instructions}[stage[0]]
        check(case, f"stages/{stage}/", stages[stage], processor, len(published.model.pieces))
    _check_inference(case, processor, work)
    for number, entry in enumerate(facts["unit_regex"]):
        case.use(f"unit_regex[{number}]/answer")
        case.compare_value(f"unit_regex[{number}]/units", parse_answer(entry["answer"]).units, entry["units"])
    for key, value in facts["generation_config_used"].items():
        case.compare_value(f"generation_config_used/{key}", GENERATION.get(key), value, atol=0.0)


def _check_pretraining(case: Case, at: str, stage: dict[str, Any], processor: SpeechGptProcessor, pieces: int) -> None:
    lines, tokenizer = stage["lines"], processor.tokenizer
    case.use(f"{at}block_size")
    case.compare_value(f"{at}base_vocab", pieces, stage["base_vocab"])
    units = tokenizer.convert_tokens_to_ids("<eosp>") + 1
    case.compare_value(f"{at}vocab_after", units, stage["vocab_after"])
    case.compare_value(f"{at}lines", [unit_string(parse_unit_string(line)) for line in lines], lines)
    ids = tokenize_lines(tokenizer, lines)
    case.compare_value(f"{at}line_input_ids", ids, stage["line_input_ids"])
    blocks = pretraining_blocks(tokenizer, lines, stage["block_size"])
    grouped = [block["input_ids"] for block in blocks]
    case.compare_value(f"{at}grouped_input_ids", grouped, stage["grouped_input_ids"])
    alike = [block["labels"] for block in blocks] == grouped
    case.compare_value(f"{at}grouped_labels_equal_input_ids", alike, stage["grouped_labels_equal_input_ids"])
    dropped = sum(map(len, ids)) - sum(map(len, grouped))
    case.compare_value(f"{at}remainder_dropped_tokens", dropped, stage["remainder_dropped_tokens"])


def _check_instructions(
    case: Case, at: str, stage: dict[str, Any], processor: SpeechGptProcessor, pieces: int
) -> None:
    case.use(f"{at}model_max_length")
    for number, expected in enumerate(stage["examples"]):
        here, text = f"{at}examples[{number}]/", expected["plain_text"]
        example = instruction_example(processor.tokenizer, case.facts["prefix"], text, stage["model_max_length"])
        ids, labels = example["input_ids"], example["labels"]
        learnt = [position for position, label in enumerate(labels) if label != IGNORED]
        values = {
            "plain_text": _written_again(text),
            "input_ids": ids,
            "labels": labels,
            "masked_prefix_len": learnt[0] if learnt else len(labels),
            "loss_span": [learnt[0], learnt[-1] + 1] if learnt else [len(labels)] * 2,
            "ends_with_eos": ids[-1] == processor.tokenizer.eos_token_id,
        }
        if match := _CROSS_MODAL.fullmatch(text):
            kind = "asr" if parse_unit_string(match[2]) else "tts"
            cut = len(processor.tokenizer(case.facts["prefix"] + text).input_ids) > stage["model_max_length"]
            values["kind"] = f"{kind}_truncated" if cut else kind
        else:
            asked, answered = _chain_turn(text).modalities
            values["format"] = f"{asked.title()}I-{answered.title()}R"
            values["decoded"] = processor.decode(ids)
        for key, value in expected.items():
            if key == "parsed":
                found = upstream_fields(values["decoded"])
                for field, words in value.items():
                    case.compare_value(f"{here}parsed/{field}", found.get(field), words)
            elif key == "format_source":
                case.use(f"{here}{key}")
            elif key in values:
                case.compare_value(f"{here}{key}", values[key], value)
        _check_nothing_is_lost(case, f"{here}plain_text", text, values.get("decoded"))


def _check_nothing_is_lost(case: Case, name: str, text: str, decoded: str | None) -> None:
    """What upstream's parser loses, ours finds: text and units of the answer, from the text and from its ids."""
    if decoded is None:
        return
    turn = _chain_turn(text)
    wanted = (
        turn.question if turn.question_units else None,
        turn.answer,
        parse_unit_string(turn.answer_units or ""),
        parse_unit_string(turn.question_units or ""),
    )
    for source in (text, decoded):
        found = parse_answer(source)
        values = (found.transcript, found.text, found.units, found.question_units)
        case.compare_value(name, list(values), list(wanted))


def _written_again(text: str) -> str:
    """The text, put together by our templates from its parts."""
    if match := _CROSS_MODAL.fullmatch(text):
        return cross_modal_text(match[1], match[2], match[3])
    return chain_text(_chain_turn(text))


def _chain_turn(text: str) -> SpeechGptTurn:
    """Parts of a text of stage 3, cut by the templates' own marks and not by the parser that is checked."""
    match = _CHAIN.fullmatch(text)
    if match is None:
        raise ValueError(f"expected a text of stage 2 or 3, got {text!r}")
    asked, answer = match[1], match[2]
    rest, _, spoken = answer.partition("; [ua] ")
    question, mark, words = rest.partition("; [ta] ")
    if not mark:
        return SpeechGptTurn(question=asked, answer=rest, answer_units=spoken or None)
    return SpeechGptTurn(question=question, answer=words, question_units=asked, answer_units=spoken or None)


def _check_inference(case: Case, processor: SpeechGptProcessor, work: Path) -> None:
    """Prompts, with a file of our own in place of the recording that the case names."""
    prompts = []
    for number, entry in enumerate(case.facts["inference"]):
        here, units = f"inference[{number}]/", entry["units_of_audio"]
        case.use(f"{here}input", f"{here}units_of_audio")
        question = entry["input"]
        if units is not None:
            recording = work / f"{number}.wav"
            recording.touch()
            question = _RECORDING.sub(lambda _, path=recording: str(path), question)
            question = replace_recordings(question, lambda _, units=units: unit_string(units))
        prompts.append(inference_prompt(question))
        case.compare_value(f"{here}prompt", prompts[-1], entry["prompt"])
        ids = processor(text=question, padding=False, return_tensors=None)["input_ids"][0]
        case.compare_value(f"{here}input_ids", ids, entry["input_ids"])
    batch = processor.tokenizer(prompts, padding=True)
    case.use("inference_batch/padding")
    for key in ("input_ids", "attention_mask"):
        case.compare_value(f"inference_batch/{key}", batch[key], case.facts["inference_batch"][key])


def check_anygpt_prompts(case: Case, work: Path) -> None:
    """Every value of a `prompts_anygpt_speech` case."""
    facts = case.facts
    for number, entry in enumerate(facts["dialogues"]):
        here, template = f"dialogues[{number}]/", TEMPLATES[entry["template"]]
        case.compare_value(f"{here}template", template.name, entry["template"])
        text = entry.get("full_training_text", entry.get("prompt"))
        written = dialogue_text(_anygpt_turns(text, template), template)
        values = {
            "stop_role": template.role,
            "sep": template.end_of_question,
            "sep2": template.end_of_answer,
            "prompt": written,
            "full_training_text": written,
        }
        if "semantic_tokens" in entry:
            units = entry["semantic_tokens"]
            values |= {"speech_string": speech_string(units), "user_message": voice_message(units)}
            values["semantic_tokens"] = parse_speech_string(entry["speech_string"])
        for key, value in entry.items():
            if key != "template" and key in values:
                case.compare_value(f"{here}{key}", values[key], value)
    for number, entry in enumerate(facts["base_model"]):
        here = f"base_model[{number}]/"
        case.use(f"{here}random_seed")
        # The instruction is drawn from a list of dozens; it is an input here.
        asked = re.fullmatch(r"\[Human\]: (.*) (<sosp>.*<eosp>)<eoh> \[MMGPT\]:", entry["asr_prompt"])
        units = parse_speech_string(asked[2])
        case.compare_value(
            f"{here}asr_prompt", recognition_prompt(asked[1], speech_string(units)), entry["asr_prompt"]
        )
        asked = re.fullmatch(r"\[Human\]: (.*) This is input: (.*)<eoh> \[MMGPT\]:", entry["tts_prompt"])
        case.compare_value(f"{here}tts_prompt", synthesis_prompt(asked[1], asked[2]), entry["tts_prompt"])
    for name, tokens in facts["modal_tokens"].items():
        ours = MODALITIES[name]
        values = {"prefix": ours.marker, "sos": ours.start, "eos": ours.end, "vocab_size": ours.vocab_size}
        for key, value in tokens.items():
            case.compare_value(f"modal_tokens/{name}/{key}", values.get(key), value)
    case.compare_value("special_tokens", list(SPECIAL_TOKENS), facts["special_tokens"])


def _anygpt_turns(text: str, template: Any) -> list[tuple[str, str | None]]:
    """Turns of a dialogue, each message and reply put together again from its parts."""
    role, end = re.escape(template.role), re.escape(template.end_of_answer)
    turns: list[tuple[str, str | None]] = []
    for message, reply in re.findall(rf"\[Human\]: (.*?)<eoh>\n{role}:(?: (.*?){end})?", text, re.DOTALL):
        answer = parse_reply(reply)
        units = parse_speech_string(message)
        written = voice_reply(answer.transcript or "", answer.text or "", answer.units) if reply else None
        turns.append((voice_message(units) if units else message, written))
    return turns
