"""Tiny complete CosyVoices with random weights, their processors, and recordings."""

import string

import torch
from tiny_cosyvoice_flow import tiny_flow
from tiny_cosyvoice_hift import tiny_hift
from tiny_cosyvoice_lm import build
from tiny_s3_tokenizer import tiny_campplus, tiny_s3_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hf_speechllm.models.configuration_cosyvoice import CosyVoiceConfig
from hf_speechllm.models.feature_extraction_cosyvoice import CosyVoiceFeatureExtractor
from hf_speechllm.models.modeling_cosyvoice import CosyVoiceForTextToWaveform
from hf_speechllm.models.processing_cosyvoice import END_OF_PROMPT, CosyVoiceProcessor


SPEECH_SIZE, MEL_BINS, SPEAKER_SIZE = 27, 20, 192
# 62 is the end of the prompt, as in the language models of the tests.
_CHARACTERS = [*string.ascii_lowercase, *string.digits, *" .,!?", *string.ascii_uppercase[:21]]


def tiny_cosyvoice(version: int, **lm_changes) -> CosyVoiceForTextToWaveform:
    """A model in evaluation mode, whose parts are those of the parts' own tests."""
    lm = build(version, speech_vocab_size=SPEECH_SIZE, **lm_changes)
    changes = {"vocab_size": SPEECH_SIZE, "num_mel_bins": MEL_BINS, "speaker_embedding_size": SPEAKER_SIZE}
    if version == 1:
        changes |= {"input_frame_rate": 25}
    elif version == 3:
        changes |= {"embedding_size": MEL_BINS}
    flow = tiny_flow(version, **changes)
    vocoder = tiny_hift(version)
    kind = "v1_25hz" if version == 1 else "v2"
    tokenizer = tiny_s3_tokenizer(kind, codebook_size=SPEECH_SIZE)
    encoder = tiny_campplus(embedding_size=SPEAKER_SIZE)
    config = CosyVoiceConfig(
        version=version,
        lm_config=lm.config,
        flow_config=flow.config,
        vocoder_config=vocoder.config,
        speech_tokenizer_config=tokenizer.config,
        speaker_encoder_config=encoder.config,
    )
    model = CosyVoiceForTextToWaveform(config).eval()
    for name, part in (
        ("lm", lm),
        ("flow", flow),
        ("vocoder", vocoder),
        ("speech_tokenizer", tokenizer),
        ("speaker_encoder", encoder),
    ):
        getattr(model, name).load_state_dict(part.state_dict())
    return model


def tiny_processor(version: int) -> CosyVoiceProcessor:
    """A processor whose tokens are characters."""
    vocabulary = {character: number for number, character in enumerate(_CHARACTERS)}
    vocabulary[END_OF_PROMPT] = len(_CHARACTERS)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens([END_OF_PROMPT])
    vocoder = tiny_hift(version).config
    extractor = CosyVoiceFeatureExtractor(
        feature_size=MEL_BINS,
        sampling_rate=vocoder.sampling_rate,
        fft_length=4 * vocoder.hop_length,
        hop_length=vocoder.hop_length,
        tokenizer_mel_bins=16,
        speaker_mel_bins=16,
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=" ")
    processor = CosyVoiceProcessor(extractor, wrapped, version=version, system_prompt="ok")
    processor.normalizer = None
    return processor


def recording(seconds: float, seed: int = 0, rate: int = 24000) -> Tensor:
    """A tone with some noise, `(samples,)`."""
    time = torch.arange(int(seconds * rate)) / rate
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(seed))
    return 0.3 * torch.sin(2 * torch.pi * (150 + 40 * seed) * time) + 0.1 * noise


def generators(rows: int, seed: int = 0) -> list[torch.Generator]:
    """One for each row."""
    return [torch.Generator().manual_seed(seed + row) for row in range(rows)]
