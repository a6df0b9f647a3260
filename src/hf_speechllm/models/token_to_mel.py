"""What all flows from speech tokens to a mel spectrogram share: inputs, the guided velocity, the training loss.

Upstream: `cosyvoice/flow/flow.py` and `flow_matching.py`.

Shape legend: `b` batch, `n` tokens, `t` frames, `m` mel bins. In every mask 1 = real; real entries come first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .causal_cache import CausalCache
from .flow_matching import (
    FlowMatchingDraws,
    euler_solve,
    interpolate_to_target,
    prompt_frames_of,
    time_steps,
    velocity_loss,
)
from .ragged_rows import length_mask, row_lengths
from .relative_position_encoder import RelativePositionAttention


@dataclass
class TokenToMelTrainingOutput(ModelOutput):
    """
    Args:
        loss (scalar): squared error of the velocity, averaged over real frames and bins.
        velocity, target_velocity, noisy (`(b, t, m)`): what the network said, what it should, and for which point.
        conditions, prompt (`(b, t, m)`): encoded tokens and the given beginning, before rows lose them for guidance.
        mel_mask (`(b, t)`, bool): frames that count.
    """

    loss: Tensor | None = None
    velocity: Tensor | None = None
    target_velocity: Tensor | None = None
    noisy: Tensor | None = None
    conditions: Tensor | None = None
    prompt: Tensor | None = None
    mel_mask: Tensor | None = None


@dataclass
class TokenToMelOutput(ModelOutput):
    """
    Args:
        mel (`(b, t, m)`, float32): without the frames of the prompt, zero where padded.
        mel_mask (`(b, t)`, bool).
    """

    mel: Tensor | None = None
    mel_mask: Tensor | None = None


@dataclass
class TokenToMelInputs:
    """Checked inputs of a generation, of `b` rows each.

    Args:
        token_ids (`(b, n)`), token_lengths (`(b,)`): new tokens, without the prompt.
        prompt_ids (`(b, n')`), prompt_lengths (`(b,)`): tokens of the prompt.
        prompt_mel (`(b, t', m)`), prompt_frames (`(b,)`): its spectrogram.
        speaker (`(b, m)`): projected.
    """

    token_ids: Tensor
    token_lengths: Tensor
    prompt_ids: Tensor
    prompt_lengths: Tensor
    prompt_mel: Tensor
    prompt_frames: Tensor
    speaker: Tensor

    def row(self, index: int) -> "TokenToMelInputs":
        """One row without its padding."""
        rows = slice(index, index + 1)
        return TokenToMelInputs(
            self.token_ids[rows, : int(self.token_lengths[index])],
            self.token_lengths[rows],
            self.prompt_ids[rows, : int(self.prompt_lengths[index])],
            self.prompt_lengths[rows],
            self.prompt_mel[rows, : int(self.prompt_frames[index])],
            self.prompt_frames[rows],
            self.speaker[rows],
        )


class TokenToMelModel(PreTrainedModel):
    """Embedding of tokens and speaker; a subclass adds its encoder and `estimator`, the velocity network."""

    base_model_prefix = "model"
    main_input_name = "speech_token_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.embedding_size)
        self.speaker_proj = nn.Linear(config.speaker_embedding_size, config.num_mel_bins)

    def _init_weights(self, module: nn.Module) -> None:
        """Upstream's: Kaiming for the U-Net, Xavier for position biases, torch's own defaults for the rest."""
        if isinstance(module, nn.Linear | nn.Conv1d | nn.ConvTranspose1d):
            if self._in_kaiming_part(module):
                init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    init.zeros_(module.bias)
                return
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            if module.weight is not None:
                init.ones_(module.weight)
                init.zeros_(module.bias)
        elif isinstance(module, RelativePositionAttention):
            init.xavier_uniform_(module.pos_bias_u)
            init.xavier_uniform_(module.pos_bias_v)

    def _in_kaiming_part(self, module: nn.Module) -> bool:
        return False

    # -- inputs ------------------------------------------------------------------------------------------------------
    def project_speaker(self, speaker_embedding: Tensor) -> Tensor:
        """Speaker vectors of any length, `(b, speaker_embedding_size)`, normalised and projected to `(b, m)`.

        Raises:
            ValueError: another shape.
        """
        size = self.config.speaker_embedding_size
        if speaker_embedding.dim() != 2 or speaker_embedding.shape[1] != size:
            raise ValueError(f"speaker_embedding: expected (batch, {size}), got {tuple(speaker_embedding.shape)}")
        vectors = speaker_embedding.to(self.device, self.dtype)
        return self.speaker_proj(nn.functional.normalize(vectors, dim=1))

    def embed_speech(self, token_ids: Tensor, mask: Tensor | None) -> Tensor:
        """`(b, n)` ids → `(b, n, c)`, zero where padded. Negative ids are read as 0, as upstream does.

        Raises:
            ValueError: an id that the model does not have.
        """
        self.check_token_ids(token_ids)
        embedded = self.embed_tokens(token_ids.clamp(min=0))
        return embedded if mask is None else embedded * mask[..., None].to(embedded.dtype)

    def check_token_ids(self, token_ids: Tensor) -> None:
        """Raises `ValueError` for an id that the model does not have."""
        if token_ids.numel() and int(token_ids.max()) >= self.config.vocab_size:
            raise ValueError(f"speech token ids: expected below {self.config.vocab_size}, got {int(token_ids.max())}")

    def read_inputs(
        self,
        token_ids: Tensor,
        token_mask: Tensor | None,
        prompt_token_ids: Tensor | None,
        prompt_token_mask: Tensor | None,
        prompt_mel: Tensor | None,
        prompt_mel_mask: Tensor | None,
        speaker_embedding: Tensor,
    ) -> TokenToMelInputs:
        """Inputs on the device of the model, with lengths in place of masks.

        Raises:
            ValueError: a shape, a mask or a number of rows that does not fit.
        """
        batch, bins = token_ids.shape[0], self.config.num_mel_bins
        token_ids = token_ids.to(self.device)
        if token_ids.dim() != 2:
            raise ValueError(f"token_ids: expected (batch, tokens), got {tuple(token_ids.shape)}")
        if prompt_token_ids is None:
            prompt_token_ids = token_ids.new_zeros(batch, 0)
        if prompt_mel is None:
            prompt_mel = torch.zeros(batch, 0, bins, device=self.device)
        if prompt_mel.dim() != 3 or prompt_mel.shape[2] != bins:
            raise ValueError(f"prompt_mel: expected (batch, frames, {bins}), got {tuple(prompt_mel.shape)}")
        prompt_ids, prompt_mel = prompt_token_ids.to(self.device), prompt_mel.to(self.device, self.dtype)
        for name, value in (
            ("prompt_token_ids", prompt_ids),
            ("prompt_mel", prompt_mel),
            ("speaker_embedding", speaker_embedding),
        ):
            if value.shape[0] != batch:
                raise ValueError(f"{name}: expected {batch} rows, got {value.shape[0]}")

        def lengths(name: str, mask: Tensor | None, values: Tensor) -> Tensor:
            return row_lengths(name, None if mask is None else mask.to(self.device), values)

        return TokenToMelInputs(
            token_ids,
            lengths("token", token_mask, token_ids),
            prompt_ids,
            lengths("prompt_token", prompt_token_mask, prompt_ids),
            prompt_mel,
            lengths("prompt_mel", prompt_mel_mask, prompt_mel),
            self.project_speaker(speaker_embedding),
        )

    # -- velocity ----------------------------------------------------------------------------------------------------
    def solve(
        self,
        noise: Tensor,
        conditions: Tensor,
        speaker: Tensor,
        prompt: Tensor,
        mask: Tensor | None,
        num_steps: int,
        streaming: bool = False,
        caches: list[CausalCache] | None = None,
        times: list[Tensor] | None = None,
        num_left_chunks: int = -1,
    ) -> Tensor:
        """From noise to mel with guidance, `(b, t, m)` float32.

        Args:
            noise, conditions, prompt (`(b, t, m)`), speaker (`(b, m)`), mask (`(b, t)` or `None`).
            streaming: the attention sees chunks, `num_left_chunks` before its own (negative: all).
            caches: of every Euler step, for a piece of a stream.
            times: what [`embed_schedule`] gives for `num_steps`, if it is at hand.
        """
        guidance = self.config.guidance_scale
        steps = time_steps(num_steps, self.config.time_schedule)
        times = self.embed_schedule(num_steps) if times is None else times

        def doubled(condition: Tensor) -> Tensor:
            return torch.cat([condition, torch.zeros_like(condition)]) if guidance else condition

        conditions, speaker, prompt = (doubled(value.to(self.dtype)) for value in (conditions, speaker, prompt))
        if mask is not None and guidance:
            mask = torch.cat([mask, mask])

        def velocity(sample: Tensor, number: int) -> Tensor:
            sample = sample.to(self.dtype)
            if guidance:
                sample = torch.cat([sample, sample])
            at_time = [layer[number : number + 1] for layer in times]
            cache = None if caches is None else caches[number]
            return self.estimator(
                sample, conditions, speaker, prompt, at_time, mask, streaming, cache, num_left_chunks
            )

        return euler_solve(velocity, noise, steps, guidance)

    def embed_schedule(self, num_steps: int) -> list[Tensor]:
        """What the velocity network makes of all times of a solution, once instead of once per step."""
        steps = time_steps(num_steps, self.config.time_schedule)
        return self.estimator.embed_times(torch.tensor([time for time, _ in steps], device=self.device))

    # -- training ----------------------------------------------------------------------------------------------------
    def flow_matching_output(
        self,
        mel: Tensor,
        mel_lengths: Tensor,
        conditions: Tensor,
        speaker_embedding: Tensor,
        draws: FlowMatchingDraws,
    ) -> TokenToMelTrainingOutput:
        """Loss for targets `(b, t, m)` of which `mel_lengths (b,)` frames are real, given `conditions (b, t, m)`."""
        mel = mel.to(conditions.dtype)
        mask = length_mask(mel_lengths, mel.shape[1])
        prompt = prompt_frames_of(mel, draws.prompt_frames)
        noisy, target = interpolate_to_target(mel, draws, self.config.sigma_min)
        keep = draws.keep_conditions.to(conditions.dtype)
        padded = None if bool(mask.all()) else mask
        velocity = self.estimator(
            noisy,
            conditions * keep[:, None, None],
            self.project_speaker(speaker_embedding) * keep[:, None],
            prompt * keep[:, None, None],
            self.estimator.embed_times(draws.times),
            padded,
            draws.streaming,
        )
        return TokenToMelTrainingOutput(
            loss=velocity_loss(velocity, target, mask),
            velocity=velocity,
            target_velocity=target,
            noisy=noisy,
            conditions=conditions,
            prompt=prompt,
            mel_mask=mask,
        )
