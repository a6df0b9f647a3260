"""Measure a unit language model on held-out speech: perplexity, recognition, synthesis, and spoken dialogue.

    python training/evaluate_unit_lm.py MODEL --speech SPEECH.parquet --dialogues DIALOGUES.parquet \
        --vocoder VOCODER --recogniser RECOGNISER --output OUT.json

Parquet files are those of `training/extract_units.py`; dialogues also have `answer_text`. Any stage can be measured,
also one that has not yet learned the task. VOCODER is a unit vocoder, or a CosyVoice for units of its tokenizer.
Figures:

* `unit_perplexity`: of `<sosp>...<eosp>` lines, over units and `<eosp>`;
* `spoken_text_perplexity`: the same where the model is asked to speak the transcript, and the recording is the answer;
* `recognition_wer`: the text that the model writes for units, against the transcript;
* `synthesis_wer`: the model speaks the transcript (units, vocoder), the recogniser writes down what it hears;
* `resynthesis_wer`: the same for the recording's own units, which bounds the synthesis from below;
* `transcript_wer`, `answer_wer`, `spoken_answer_wer`: of spoken dialogues, the question as the model understood it,
  its answer in text, and what the recogniser hears of its spoken answer, against the transcript and the right answer.

An answer without the part that is measured counts as an empty text, all words deleted. Word error rates in percent.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(argv: Sequence[str]) -> None:
    """Run the evaluation; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a unit LM")
    parser.add_argument("--speech", type=Path, required=True, help="parquet with text and units")
    parser.add_argument(
        "--where", nargs="*", default=[], metavar="COLUMN=VALUE[,VALUE]", help="keep these speech rows"
    )
    parser.add_argument("--dialogues", type=Path, help="parquet with text, units and answer_text")
    parser.add_argument("--vocoder", help="folder of a unit vocoder or a CosyVoice; without it nothing is spoken")
    parser.add_argument("--recogniser", help="folder of the recogniser that listens")
    parser.add_argument("--speaker", help="voice of the vocoder, by name")
    parser.add_argument("--style", choices=("released", "paper"), default="released")
    parser.add_argument("--limit", type=int, default=200, help="rows of each file")
    parser.add_argument("--max_new_tokens", type=int, default=300)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the most likely token")
    parser.add_argument("--top_k", type=int, default=50)
    parser.add_argument("--top_p", type=float, default=1.0)
    parser.add_argument(
        "--greedy_text", action="store_true", help="with a temperature: draw the units alone, keep the likeliest text"
    )
    parser.add_argument(
        "--ras_threshold",
        type=float,
        help="with --greedy_text: repetition-aware sampling, share of the last ten units that a unit may not reach",
    )
    parser.add_argument("--batch_size", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--trust_remote_code", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args(argv)
    if arguments.ras_threshold is not None and not (arguments.greedy_text and arguments.temperature > 0):
        parser.error("--ras_threshold: expected --greedy_text and a temperature as well")

    import evaluate
    import torch
    from datasets import Dataset
    from tqdm import tqdm
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoTokenizer,
        LogitsProcessorList,
        pipeline,
        set_seed,
    )

    import hf_speechllm  # noqa: F401  registers the model families
    from hf_speechllm.cosyvoice_units import CosyVoiceUnits
    from hf_speechllm.data.manifests import parse_filters
    from hf_speechllm.data.task_descriptions import RECOGNITION_DESCRIPTIONS, SYNTHESIS_DESCRIPTIONS
    from hf_speechllm.eval.report import write_report
    from hf_speechllm.models.answers_speechgpt_lm import parse_answer
    from hf_speechllm.models.greedy_text import GreedyText
    from hf_speechllm.models.prompts_speechgpt_lm import META_INSTRUCTION, cross_modal_text, inference_prompt
    from hf_speechllm.models.ras_sampling import RasSettings, RepetitionAwareSampling
    from hf_speechllm.models.unit_string import END_OF_SPEECH, parse_unit_string, unit_string
    from hf_speechllm.models.unit_tokens import unit_token
    from hf_speechllm.train.metrics import metric_path

    set_seed(arguments.seed)
    trust = {"trust_remote_code": arguments.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, **trust)
    tokenizer.padding_side = "left"
    model = AutoModelForCausalLM.from_pretrained(arguments.model, **trust).eval().to(arguments.device)
    vocoder = recognise = None
    if arguments.vocoder is not None:
        if AutoConfig.from_pretrained(arguments.vocoder, **trust).model_type == "cosyvoice":
            vocoder = CosyVoiceUnits.from_pretrained(arguments.vocoder, **trust)
            vocoder.model.to(arguments.device)
        else:
            vocoder = AutoModel.from_pretrained(arguments.vocoder, **trust).eval().to(arguments.device)
        if arguments.recogniser is None:
            parser.error("--vocoder: expected --recogniser as well")
        recognise = pipeline("automatic-speech-recognition", model=arguments.recogniser, trust_remote_code=True)
    wer = evaluate.load(metric_path("wer"))

    def rows_of(path: Path, where: dict[str, list[str]]) -> list[dict[str, Any]]:
        rows = [row for row in Dataset.from_parquet(str(path)) if all(row[name] in where[name] for name in where)]
        return rows[: arguments.limit]

    def error_rate(texts: Sequence[str], references: Sequence[str]) -> float:
        return round(100.0 * wer.compute(predictions=list(texts), references=list(references))["wer"], 2)

    @torch.no_grad()
    def perplexity(texts: Sequence[str], name: str) -> float:
        """Of the units, and the end behind them, of texts that end with units."""
        total = count = 0.0
        for text in tqdm(texts, desc=name):
            ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
            scores = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            losses = -scores.gather(-1, ids[0, 1:, None])[:, 0]
            # What comes before the first unit is given: the beginning of the text and <sosp>.
            losses = losses[len(losses) - len(parse_unit_string(text)) - 1 :]
            total, count = total + float(losses.sum()), count + len(losses)
        return round(math.exp(total / count), 3)

    @torch.no_grad()
    def continue_texts(prompts: Sequence[str], name: str) -> list[str]:
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        answers = [""] * len(prompts)
        sampling = {"do_sample": False}
        if arguments.temperature > 0:
            names = ("temperature", "top_k", "top_p")
            sampling = {"do_sample": True, **{name: getattr(arguments, name) for name in names}}
        if arguments.ras_threshold is not None:
            settings = RasSettings(arguments.top_p, arguments.top_k, threshold=arguments.ras_threshold)
            # The units, <sosp> and <eosp> stand side by side.
            first, last = tokenizer.convert_tokens_to_ids([unit_token(0), END_OF_SPEECH])
            units = RepetitionAwareSampling(settings, 0, first, last - first + 1, arguments.temperature)
            sampling = {"do_sample": True, "top_k": 0}
            sampling["logits_processor"] = LogitsProcessorList([GreedyText.of(tokenizer, units)])
        elif arguments.greedy_text:
            sampling["logits_processor"] = LogitsProcessorList([GreedyText.of(tokenizer)])
        for start in tqdm(range(0, len(order), arguments.batch_size), desc=name):
            batch = order[start : start + arguments.batch_size]
            inputs = tokenizer([prompts[index] for index in batch], padding=True, return_tensors="pt").to(model.device)
            found = model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                max_new_tokens=arguments.max_new_tokens,
                **sampling,
            )
            for index, ids in zip(batch, found[:, inputs.input_ids.shape[1] :], strict=True):
                answers[index] = tokenizer.decode(ids[ids != tokenizer.pad_token_id])
        return answers

    @torch.no_grad()
    def listen(units: Sequence[Sequence[int]], name: str) -> list[str]:
        texts = []
        for row in tqdm(units, desc=name):
            if not len(row):
                texts.append("")
                continue
            waveform = vocoder.synthesize(list(row), speaker=arguments.speaker)
            audio = {"array": waveform.cpu().numpy(), "sampling_rate": vocoder.config.sampling_rate}
            texts.append(recognise(audio)["text"])
        return texts

    rng = torch.Generator().manual_seed(arguments.seed)

    def task(descriptions: Sequence[str], source: str, answer: str = "") -> str:
        """A request, ready to be answered, or with a given answer behind it."""
        description = descriptions[int(torch.randint(len(descriptions), (), generator=rng))]
        asked = cross_modal_text(description, source, answer, arguments.style)
        end = asked.index(answer) + len(answer) if answer else asked.index("[SpeechGPT]:") + len("[SpeechGPT]:")
        return META_INSTRUCTION + asked[:end]

    def before_end(text: str) -> str:
        return text.split("<eoa>")[0].split(tokenizer.eos_token)[0].strip()

    speech = rows_of(arguments.speech, parse_filters(arguments.where))
    if not speech:
        parser.error(f"--where: {arguments.speech}: expected rows with {arguments.where}, found none")
    texts = [row["text"] for row in speech]
    result: dict[str, Any] = {"model": Path(arguments.model).name, "rows": len(speech)}
    recorded = [unit_string(row["units"]) for row in speech]
    result["unit_perplexity"] = perplexity(recorded, "perplexity")
    spoken = [task(SYNTHESIS_DESCRIPTIONS, text, units) for text, units in zip(texts, recorded, strict=True)]
    result["spoken_text_perplexity"] = perplexity(spoken, "perplexity of spoken texts")
    rng.manual_seed(arguments.seed)  # the requests below are those of a run that measures nothing else
    prompts = [task(RECOGNITION_DESCRIPTIONS, units) for units in recorded]
    written = [before_end(text) for text in continue_texts(prompts, "recognition")]
    result["recognition_wer"] = error_rate(written, texts)
    if vocoder is not None:
        prompts = [task(SYNTHESIS_DESCRIPTIONS, text) for text in texts]
        spoken = [parse_unit_string(before_end(text)) for text in continue_texts(prompts, "synthesis")]
        result["synthesis_wer"] = error_rate(listen(spoken, "listening"), texts)
        result["resynthesis_wer"] = error_rate(listen([row["units"] for row in speech], "listening"), texts)
    if arguments.dialogues is not None:
        dialogues = rows_of(arguments.dialogues, {})
        questions = [unit_string(row["units"]) for row in dialogues]
        prompts = [
            inference_prompt(question, style=arguments.style, modalities=("speech", "speech")).rstrip(" ")
            for question in questions
        ]
        answers = [parse_answer(text) for text in continue_texts(prompts, "dialogue")]
        right = [row["answer_text"] for row in dialogues]
        result["dialogues"] = len(dialogues)
        asked = [row["text"] for row in dialogues]
        result["transcript_wer"] = error_rate([a.transcript or "" for a in answers], asked)
        result["answer_wer"] = error_rate([a.text or "" for a in answers], right)
        if vocoder is not None:
            result["spoken_answer_wer"] = error_rate(listen([a.units for a in answers], "listening"), right)
    write_report(result, arguments.output)


if __name__ == "__main__":
    main(sys.argv[1:])
