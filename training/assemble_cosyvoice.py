"""One CosyVoice folder out of parts that were trained each by itself.

    python training/assemble_cosyvoice.py OUT --lm LM --flow FLOW --vocoder VOCODER --speech_tokenizer S3 \\
        --speaker_encoder CAMPPLUS [--voices TOKENS/voices.parquet] [--facts FACTS.yaml] [--results RESULTS.json]
    python training/assemble_cosyvoice.py OUT --base COSYVOICE --lm RUN/merged

`--base` is a complete model of which only the given parts are replaced, as after fine-tuning one of them. The text
tokenizer is that of the language model's folder, the mel spectrogram that of the vocoder's. `--voices` holds rows of
`extract_speech_tokens.py`: of every speaker in it the row with the most tokens becomes a known voice, with the
speaker's mean embedding. The folder is checked in a clean process before it appears.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from hf_speechllm.models.processing_cosyvoice import CosyVoiceProcessor


PARTS = {
    "lm": "lm_config",
    "flow": "flow_config",
    "vocoder": "vocoder_config",
    "speech_tokenizer": "speech_tokenizer_config",
    "speaker_encoder": "speaker_encoder_config",
}


def add_voices(processor: "CosyVoiceProcessor", rows: Sequence[dict], ratio: int | None, with_texts: bool) -> None:
    """A known voice for each speaker: its longest recording as prompt.

    Args:
        ratio: frames of a token (versions 2 and 3), to which recording and tokens are cut.
        with_texts: keep what the recording says, which makes `zero_shot` the voice's mode.
    """
    import torch

    from hf_speechllm.models.modeling_cosyvoice import CosyVoicePrompt

    longest: dict[str, dict] = {}
    for row in rows:
        if row["spk"] and len(row["speech_token"]) > len(
            longest.get(row["spk"], {"speech_token": []})["speech_token"]
        ):
            longest[row["spk"]] = row
    for name, row in sorted(longest.items()):
        mel = processor.prompt_features([row["audio"]])["prompt_mel"][0]
        tokens = torch.tensor(row["speech_token"])
        if ratio is not None:
            count = min(len(tokens), len(mel) // ratio)
            tokens, mel = tokens[:count], mel[: ratio * count]
        prompt = CosyVoicePrompt(
            speech_ids=tokens[None],
            speech_mask=torch.ones(1, len(tokens), dtype=torch.long),
            mel=mel[None],
            mel_mask=torch.ones(1, len(mel), dtype=torch.long),
            speaker_embedding=torch.tensor(row["spk_embedding"])[None],
        )
        processor.add_speaker(name, prompt, row["text"] if with_texts else None)


def main(argv: Sequence[str]) -> None:
    """Assemble; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to create")
    parser.add_argument("--base", help="complete model whose other parts are kept")
    for name in PARTS:
        parser.add_argument(f"--{name}", help=f"folder or Hub id of the {name.replace('_', ' ')}")
    parser.add_argument("--voices", type=Path, help="parquet of extract_speech_tokens.py")
    parser.add_argument(
        "--voices_without_text", action="store_true", help="for a language model that saw no prompt in training"
    )
    parser.add_argument("--facts", type=Path, help="YAML facts for the card")
    parser.add_argument("--results", type=Path, help="JSON results for the card")
    parser.add_argument("--half_precision_file", action="store_true", help="store the weights as float16")
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args(argv)
    given = {name: getattr(arguments, name) for name in PARTS if getattr(arguments, name) is not None}
    if arguments.base is None and len(given) < len(PARTS):
        parser.error(f"without --base: expected all of {', '.join(PARTS)}, got {', '.join(given) or 'none'}")

    from transformers import AutoFeatureExtractor, AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

    import hf_speechllm  # noqa: F401  registers the model families
    from hf_speechllm.hub.export import export_model
    from hf_speechllm.models.configuration_cosyvoice import CosyVoiceConfig
    from hf_speechllm.models.feature_extraction_cosyvoice import CosyVoiceFeatureExtractor
    from hf_speechllm.models.modeling_cosyvoice import CosyVoiceForTextToWaveform
    from hf_speechllm.models.processing_cosyvoice import CosyVoiceProcessor
    from hf_speechllm.train.unit_lm_run import read_rows

    def load(name: str):
        for auto_class in (AutoModelForCausalLM, AutoModel) if name == "lm" else (AutoModel,):
            try:
                return auto_class.from_pretrained(given[name]).eval()
            except ValueError:  # version 1's language model is no causal LM of text
                if auto_class is AutoModel:
                    raise
        raise AssertionError

    parts = {name: load(name) for name in given}
    if arguments.base is not None:
        model = AutoModel.from_pretrained(arguments.base).eval()
        processor = AutoProcessor.from_pretrained(arguments.base)
        configs = {PARTS[name]: part.config for name, part in parts.items()}
        fields = {key: getattr(model.config, key) for key in PARTS.values()} | configs
        whole = CosyVoiceForTextToWaveform(CosyVoiceConfig(version=model.config.version, **fields)).eval()
        for name in PARTS:
            getattr(whole, name).load_state_dict((parts.get(name) or getattr(model, name)).state_dict())
        if "lm" in given:
            processor.tokenizer = AutoTokenizer.from_pretrained(given["lm"])
    else:
        version = {"cosyvoice_flow": 1, "cosyvoice2_flow": 2, "cosyvoice3_flow": 3}[parts["flow"].config.model_type]
        config = CosyVoiceConfig(version=version, **{PARTS[name]: part.config for name, part in parts.items()})
        whole = CosyVoiceForTextToWaveform(config).eval()
        for name, part in parts.items():
            getattr(whole, name).load_state_dict(part.state_dict())
        mel = AutoFeatureExtractor.from_pretrained(given["vocoder"])
        extractor = CosyVoiceFeatureExtractor(
            feature_size=mel.feature_size,
            sampling_rate=mel.sampling_rate,
            fft_length=mel.fft_length,
            hop_length=mel.hop_length,
            high_freq=mel.high_freq,
            tokenizer_mel_bins=config.speech_tokenizer_config.num_mel_bins,
            speaker_mel_bins=config.speaker_encoder_config.num_mel_bins,
        )
        processor = CosyVoiceProcessor(extractor, AutoTokenizer.from_pretrained(given["lm"]), version=version)
    if arguments.voices is not None:
        ratio = whole.config.flow_config.token_mel_ratio if whole.config.aligns_prompts else None
        add_voices(processor, read_rows([str(arguments.voices)], None), ratio, not arguments.voices_without_text)
    report = export_model(
        whole,
        processor,
        arguments.output,
        facts=arguments.facts,
        results=arguments.results,
        overwrite=arguments.overwrite,
        half_precision_file=arguments.half_precision_file,
    )
    print({**report, "speakers": sorted(processor.speakers)})


if __name__ == "__main__":
    main(sys.argv[1:])
