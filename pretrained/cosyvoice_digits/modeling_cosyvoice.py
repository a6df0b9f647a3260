"""CosyVoice 1, 2 and 3: text and a voice prompt to a waveform (`cosyvoice`).

Papers: https://arxiv.org/abs/2407.05407 (1), https://arxiv.org/abs/2412.10117 (2),
https://arxiv.org/abs/2505.17589 (3).
Upstream: FunAudioLLM/CosyVoice, `cosyvoice/cli/{cosyvoice,frontend,model}.py`.

A language model turns text into speech tokens, a flow turns those into a mel spectrogram in the voice of a prompt, a
vocoder turns that into a waveform. What a prompt says to which of them is the *mode*, see [`CosyVoiceProcessor`]; here
a mode is nothing but which inputs a row has, so that a batch may mix them.

Shape legend: `b` batch, `n` tokens, `t` frames, `m` mel bins. In every mask 1 = real; real entries come first, except
for `attention_mask`, which the language model reads wherever it is 1.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_cosyvoice import PARTS, CosyVoiceConfig
from .modeling_campplus import CampplusModel
from .modeling_cosyvoice2_flow import CosyVoice2FlowModel
from .modeling_cosyvoice3_flow import CosyVoice3FlowModel
from .modeling_cosyvoice3_hift import CosyVoice3HiftModel
from .modeling_cosyvoice_flow import CosyVoiceFlowModel
from .modeling_cosyvoice_hift import CosyVoiceHiftModel
from .modeling_cosyvoice_lm import CosyVoiceLmForCausalLM
from .modeling_cosyvoice_transformer_lm import CosyVoiceTransformerLm
from .modeling_s3_tokenizer import S3TokenizerModel
from .row_noise import Generators, draw_rows, split_generators
from .silent_tokens import drop_long_silences
from .speech_token_generation import CosyVoiceSpeechTokens


if TYPE_CHECKING:
    # Never imported here; the loader reads this line and copies the file beside this one.
    from .pipeline_cosyvoice import CosyVoiceTextToSpeechPipeline  # noqa: F401


_LMS = {model.config_class.model_type: model for model in (CosyVoiceLmForCausalLM, CosyVoiceTransformerLm)}
_FLOWS = {
    model.config_class.model_type: model for model in (CosyVoiceFlowModel, CosyVoice2FlowModel, CosyVoice3FlowModel)
}
_VOCODERS = {model.config_class.model_type: model for model in (CosyVoiceHiftModel, CosyVoice3HiftModel)}


@dataclass
class CosyVoicePrompt(ModelOutput):
    """What the models read of voice prompts; a row without a prompt has empty tokens and frames.

    Args:
        speech_ids (`(b, n)`, int64), speech_mask: tokens of the recordings, from 0.
        mel (`(b, t, m)`, float32), mel_mask: their spectrograms.
        speaker_embedding (`(b, size)`, float32): of the speaker encoder, not normalised.
    """

    speech_ids: Tensor | None = None
    speech_mask: Tensor | None = None
    mel: Tensor | None = None
    mel_mask: Tensor | None = None
    speaker_embedding: Tensor | None = None


@dataclass
class CosyVoiceOutput(ModelOutput):
    """
    Args:
        waveform (`(b, samples)`, float32): 0 after the end of each item.
        waveform_mask (`(b, samples)`, int64): 1 = real sample.
        speech_ids (`(b, n)`, int64), speech_mask: tokens that were spoken, from 0.
        mel (`(b, t, m)`, float32), mel_mask: the spectrogram, after a change of speed.
    """

    waveform: Tensor | None = None
    waveform_mask: Tensor | None = None
    speech_ids: Tensor | None = None
    speech_mask: Tensor | None = None
    mel: Tensor | None = None
    mel_mask: Tensor | None = None


class CosyVoiceForTextToWaveform(PreTrainedModel):
    """Language model, flow and vocoder, and the two encoders of a voice prompt."""

    config_class = CosyVoiceConfig
    config: CosyVoiceConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("text", "audio")
    output_modalities = ("audio",)
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules: list[str] = []

    def __init__(self, config: CosyVoiceConfig) -> None:
        super().__init__(config)
        self.lm = _LMS[config.lm_config.model_type](config.lm_config)
        self.flow = _FLOWS[config.flow_config.model_type](config.flow_config)
        self.vocoder = _VOCODERS[config.vocoder_config.model_type](config.vocoder_config)
        self.speech_tokenizer = S3TokenizerModel(config.speech_tokenizer_config)
        self.speaker_encoder = CampplusModel(config.speaker_encoder_config)
        for name in PARTS:
            # As loading sets it, so that a model saved, loaded and saved again has the same configuration.
            getattr(config, name).dtype = self.dtype
        self.post_init()

    def can_generate(self) -> bool:
        """It has its own `generate`."""
        return True

    # -- prompts -----------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def encode_speech(self, features: Tensor, features_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Speech tokens `(b, n)` and their mask of `CosyVoiceFeatureExtractor`'s log-mel frames `(b, t, bins)`."""
        output = self.speech_tokenizer(features.to(self.device), features_mask.to(self.device))
        return output.token_ids, output.token_mask.long()

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt_features: Tensor,
        prompt_features_mask: Tensor,
        prompt_fbank: Tensor,
        prompt_fbank_mask: Tensor,
        prompt_mel: Tensor,
        prompt_mel_mask: Tensor,
    ) -> CosyVoicePrompt:
        """Prompts out of recordings; the arguments are what `CosyVoiceFeatureExtractor` gives.

        In versions 2 and 3 tokens and frames are cut to the same length, two frames for each token.
        """
        speech_ids, speech_mask = self.encode_speech(prompt_features, prompt_features_mask)
        embedding = self.speaker_encoder(prompt_fbank.to(self.device), prompt_fbank_mask.to(self.device)).embeddings
        mel, mel_mask = prompt_mel.to(self.device), prompt_mel_mask.to(self.device)
        if self.config.aligns_prompts:
            ratio = self.config.flow_config.token_mel_ratio
            tokens = torch.minimum(speech_mask.sum(1), mel_mask.sum(1) // ratio)
            speech_mask = (torch.arange(speech_ids.shape[1], device=self.device) < tokens[:, None]).long()
            mel_mask = (torch.arange(mel.shape[1], device=self.device) < ratio * tokens[:, None]).long()
        speech_ids, speech_mask = _trim(speech_ids * speech_mask, speech_mask)
        mel, mel_mask = _trim(mel * mel_mask[..., None], mel_mask)
        return CosyVoicePrompt(speech_ids, speech_mask, mel, mel_mask, embedding.float())

    # -- text to waveform --------------------------------------------------------------------------------------------
    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        prompt_input_ids: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        prompt_features: Tensor | None = None,
        prompt_features_mask: Tensor | None = None,
        prompt_fbank: Tensor | None = None,
        prompt_fbank_mask: Tensor | None = None,
        prompt_mel: Tensor | None = None,
        prompt_mel_mask: Tensor | None = None,
        prompt_speech_ids: Tensor | None = None,
        prompt_speech_mask: Tensor | None = None,
        speaker_embedding: Tensor | None = None,
        lm_reads_prompt_speech: Tensor | None = None,
        lm_reads_speaker: Tensor | None = None,
        source_features: Tensor | None = None,
        source_features_mask: Tensor | None = None,
        speed: float = 1.0,
        num_steps: int = 10,
        streaming: bool = False,
        generator: Generators = None,
        compatibility: str | None = None,
        num_left_chunks: int = -1,
        **lm_kwargs,
    ) -> CosyVoiceOutput:
        """Waveforms of texts, or of the speech of others in the voice of a prompt; inputs as [`CosyVoiceProcessor`]
        makes them.

        Args:
            input_ids (`(b, n)`, int64), attention_mask: the text. Not with `source_features`.
            prompt_input_ids, prompt_attention_mask: the prompt's text, or an instruction.
            prompt_features, prompt_fbank, prompt_mel with their masks: recordings as the feature extractor gives them,
                of which [`encode_prompt`] makes the next three.
            prompt_speech_ids, prompt_mel, speaker_embedding: prompts that are encoded already (a row that has both
                takes the recording).
            lm_reads_prompt_speech (`(b,)`, 1 = yes): whether the language model continues the prompt's speech.
            lm_reads_speaker (`(b,)`, 1 = yes): whether it is told the speaker (version 1).
            source_features, source_features_mask: speech whose words are kept (voice conversion).
            speed (`float`): 2 is twice as fast; the spectrogram is interpolated.
            num_steps (`int`): Euler steps of the flow.
            streaming (`bool`): compute the flow as a stream does, with chunked attention (versions 2 and 3).
            generator: source of all that is random, or one for each row, with which a row is the same in every batch.
            compatibility (`"upstream"`, *optional*): reproduce named differences of upstream, see each part.
            num_left_chunks (`int`): with `streaming`, chunks that the flow sees before its own; negative = all.
            lm_kwargs: of [`generate_speech_tokens`], as `sampling`, `temperature`, `do_sample` or the length ratios.

        Raises:
            ValueError: no or two kinds of input, no voice, or a speed that is not positive.
        """
        if (input_ids is None) == (source_features is None):
            raise ValueError("input: expected either input_ids or source_features")
        if not speed > 0:
            raise ValueError(f"speed: expected a positive number, got {speed}")
        prompt = self.read_prompt(
            len(input_ids if input_ids is not None else source_features),
            prompt_features,
            prompt_features_mask,
            prompt_fbank,
            prompt_fbank_mask,
            prompt_mel,
            prompt_mel_mask,
            prompt_speech_ids,
            prompt_speech_mask,
            speaker_embedding,
        )
        for_lm, for_flow, for_vocoder = split_generators(generator, 3)
        if source_features is not None:
            speech_ids, speech_mask = self.encode_speech(source_features, source_features_mask)
        else:
            tokens = self.speak(
                input_ids,
                attention_mask,
                prompt_input_ids,
                prompt_attention_mask,
                prompt,
                lm_reads_prompt_speech,
                lm_reads_speaker,
                generator=for_lm,
                compatibility=compatibility,
                **lm_kwargs,
            )
            speech_ids, speech_mask = tokens.token_ids, tokens.token_mask
        mel, mel_mask = self.token_to_mel(
            speech_ids, speech_mask, prompt, num_steps, streaming, for_flow, num_left_chunks
        )
        if speed != 1.0:
            mel, mel_mask = change_speed(mel, mel_mask, speed)
        waveform, waveform_mask = self.mel_to_waveform(mel, mel_mask, for_vocoder, compatibility)
        return CosyVoiceOutput(waveform, waveform_mask, speech_ids, speech_mask, mel, mel_mask)

    def read_prompt(
        self,
        batch_size: int,
        prompt_features: Tensor | None,
        prompt_features_mask: Tensor | None,
        prompt_fbank: Tensor | None,
        prompt_fbank_mask: Tensor | None,
        prompt_mel: Tensor | None,
        prompt_mel_mask: Tensor | None,
        prompt_speech_ids: Tensor | None,
        prompt_speech_mask: Tensor | None,
        speaker_embedding: Tensor | None,
    ) -> CosyVoicePrompt:
        """The prompts of a batch, encoded where they are recordings; the arguments are those of [`generate`].

        Raises:
            ValueError: a row without a voice.
        """
        config, device = self.config, self.device
        if prompt_mel is None:
            prompt_mel = torch.zeros(batch_size, 0, config.flow_config.num_mel_bins)
        if prompt_mel_mask is None:
            prompt_mel_mask = torch.ones(prompt_mel.shape[:2], dtype=torch.long)
        if prompt_speech_ids is None:
            prompt_speech_ids = torch.zeros(batch_size, 0, dtype=torch.long)
        if prompt_speech_mask is None:
            prompt_speech_mask = torch.ones_like(prompt_speech_ids)
        if speaker_embedding is None:
            speaker_embedding = torch.zeros(batch_size, config.speaker_encoder_config.embedding_size)
        given = CosyVoicePrompt(
            prompt_speech_ids.to(device),
            prompt_speech_mask.to(device),
            prompt_mel.to(device),
            prompt_mel_mask.to(device),
            speaker_embedding.to(device),
        )
        recorded = torch.zeros(batch_size, dtype=torch.bool)
        if prompt_features is not None:
            recorded = prompt_features_mask.sum(1).cpu() > 0
        if not bool((recorded | (speaker_embedding.cpu() != 0).any(1)).all()):
            raise ValueError("speaker_embedding: expected a voice: a recording, or an encoded prompt or speaker")
        if not bool(recorded.any()):
            return given
        inputs = (prompt_features, prompt_features_mask, prompt_fbank, prompt_fbank_mask, prompt_mel, prompt_mel_mask)
        encoded = self.encode_prompt(*(value[recorded.to(value.device)] for value in inputs))
        return encoded if bool(recorded.all()) else _merge(encoded, given, recorded.tolist())

    def speak(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        prompt_input_ids: Tensor | None,
        prompt_attention_mask: Tensor | None,
        prompt: CosyVoicePrompt,
        lm_reads_prompt_speech: Tensor | None = None,
        lm_reads_speaker: Tensor | None = None,
        **lm_kwargs,
    ) -> CosyVoiceSpeechTokens:
        """Speech tokens of texts; the arguments are those of [`generate`]."""
        reads_speech = _flags(lm_reads_prompt_speech, prompt.speech_mask.sum(1) > 0)
        reads_speaker = _flags(lm_reads_speaker, torch.ones_like(reads_speech))
        tokens = self.lm.generate_speech_tokens(
            input_ids,
            attention_mask,
            prompt_input_ids,
            prompt_attention_mask,
            prompt.speech_ids,
            prompt.speech_mask * reads_speech[:, None].to(prompt.speech_mask),
            speaker_embedding=prompt.speaker_embedding,
            speaker_mask=reads_speaker.long(),
            **lm_kwargs,
        )
        silent = self.silent_token_ids
        if silent:
            limit = self.config.lm_config.max_silent_run
            ids, mask = drop_long_silences(tokens.token_ids, tokens.token_mask, silent, limit)
            tokens = CosyVoiceSpeechTokens(ids, mask, tokens.logits)
        return tokens

    @property
    def silent_token_ids(self) -> list[int]:
        """Tokens of which at most a few in a row are spoken; version 3 has some."""
        return self.config.lm_config.silent_token_ids if self.config.version != 1 else []

    @torch.no_grad()
    def token_to_mel(
        self,
        speech_ids: Tensor,
        speech_mask: Tensor,
        prompt: CosyVoicePrompt,
        num_steps: int = 10,
        streaming: bool = False,
        generator: Generators = None,
        num_left_chunks: int = -1,
    ) -> tuple[Tensor, Tensor]:
        """Spectrograms `(b, t, m)`, without the prompts', and their mask, int64.

        Versions 2 and 3 start from the same noise always; only version 1 draws it.

        Raises:
            ValueError: left chunks without `streaming`, or for version 1.
        """
        options: dict[str, object] = {"num_steps": num_steps}
        if self.config.version == 1:
            if num_left_chunks >= 0:
                raise ValueError(f"num_left_chunks: expected -1 for version 1, got {num_left_chunks}")
            options |= self._flow_noise(speech_mask, prompt, generator)
        else:
            options |= {"streaming": streaming, "num_left_chunks": num_left_chunks}
        output = self.flow.generate_mel(
            speech_ids,
            speech_mask,
            prompt.speech_ids,
            prompt.speech_mask,
            prompt.mel,
            prompt.mel_mask,
            prompt.speaker_embedding,
            **options,
        )
        return output.mel, output.mel_mask.long()

    def _flow_noise(self, speech_mask: Tensor, prompt: CosyVoicePrompt, generator: Generators) -> dict[str, object]:
        if generator is None or isinstance(generator, torch.Generator):
            return {"generator": generator}
        frames = [
            int(given) + self.flow.config.num_frames(int(tokens))
            for given, tokens in zip(prompt.mel_mask.sum(1), speech_mask.sum(1), strict=True)
        ]
        bins = self.flow.config.num_mel_bins
        return {"noise": draw_rows(torch.randn, frames, bins, generator, self.device)}

    @torch.no_grad()
    def mel_to_waveform(
        self,
        mel: Tensor,
        mel_mask: Tensor,
        generator: Generators = None,
        compatibility: str | None = None,
        **noise: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Waveforms `(b, samples)`, float32, and their mask, int64; `noise` and `phase` as the vocoder takes them."""
        options: dict[str, object] = {"generator": generator}
        if generator is not None and not isinstance(generator, torch.Generator):
            sines, options = self.vocoder.source.num_sines, {}
            lengths = (mel_mask.sum(1) * self.vocoder.config.hop_length).tolist()
            # What the vocoder draws for a row alone, in its order: only one kind of phase is drawn.
            if self.vocoder.config.phase_interpolation == "sample":
                turns = draw_rows(torch.rand, [1] * len(lengths), sines, generator, self.device)[:, 0]
                options["phase"] = (2 * turns - 1) * torch.pi
            if self.config.version != 3:  # whose noise is a part of the model
                options["noise"] = draw_rows(torch.randn, lengths, sines, generator, self.device)
        output = self.vocoder(mel, mel_mask, compatibility=compatibility, return_dict=True, **(options | noise))
        return output.waveform.float(), output.waveform_mask


def change_speed(mel: Tensor, mel_mask: Tensor, speed: float) -> tuple[Tensor, Tensor]:
    """Each spectrogram `(t, m)` interpolated to `int(t / speed)` frames, and the mask."""
    rows = []
    for row, frames in zip(mel, mel_mask.sum(1).tolist(), strict=True):
        size = int(frames / speed)
        row = row[:frames].T[None]
        if size and frames:
            row = nn.functional.interpolate(row, size=size, mode="linear")
        rows.append(row[0, :, :size].T)
    changed = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    counts = torch.tensor([len(row) for row in rows], device=mel.device)
    return changed, (torch.arange(changed.shape[1], device=mel.device) < counts[:, None]).long()


def _merge(encoded: CosyVoicePrompt, given: CosyVoicePrompt, recorded: list[bool]) -> CosyVoicePrompt:
    """Row by row the next of `encoded` where there was a recording, else the row of `given`."""
    prompts, rows = [], iter(range(len(recorded)))
    for row, is_recorded in enumerate(recorded):
        prompts.append((encoded, next(rows)) if is_recorded else (given, row))

    def real(values: str, mask: str) -> list[Tensor]:
        return [prompt[values][row][prompt[mask][row].bool()] for prompt, row in prompts]

    speech, mel = real("speech_ids", "speech_mask"), real("mel", "mel_mask")
    speech_mask, mel_mask = (
        [torch.ones_like(row[..., 0] if row.dim() == 2 else row).long() for row in rows] for rows in (speech, mel)
    )
    padded = [nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (speech, speech_mask, mel, mel_mask)]
    return CosyVoicePrompt(*padded, torch.stack([prompt.speaker_embedding[row] for prompt, row in prompts]))


def _flags(given: Tensor | None, default: Tensor) -> Tensor:
    return default if given is None else given.to(default.device).bool()


def _trim(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Both without the columns in which no row is real."""
    width = int(mask.sum(1).max()) if len(mask) else 0
    return values[:, :width], mask[:, :width]


__all__ = ["CosyVoiceForTextToWaveform", "CosyVoiceOutput", "CosyVoicePrompt"]
