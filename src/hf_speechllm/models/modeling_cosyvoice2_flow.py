"""CosyVoice 2's flow (`cosyvoice2_flow`): speech tokens to a mel spectrogram, whole or in a stream.

Paper: https://arxiv.org/abs/2412.10117. Upstream: `CausalMaskedDiffWithXvec` in `cosyvoice/flow/flow.py`.

Shape legend: `b` batch, `n` tokens, `t` frames, `m` mel bins, `c` channels. In every mask 1 = real.
"""

import torch
from torch import Tensor, nn

from .causal_cache import CausalCache
from .causal_token_to_mel import CausalTokenToMelModel
from .configuration_cosyvoice2_flow import CosyVoice2FlowConfig
from .unet_1d import UNet1d
from .upsampling_encoder import UpsamplingEncoder


class CosyVoice2FlowModel(CausalTokenToMelModel):
    """Encoder that doubles the rate of the tokens, and a causal U-Net. See [`CausalTokenToMelModel`] for its use:
    `forward` (training loss), `generate_mel`, `start_stream` and `stream_mel`."""

    config_class = CosyVoice2FlowConfig
    config: CosyVoice2FlowConfig
    _no_split_modules = ["RelativePositionLayer", "UNet1dLayer"]

    def __init__(self, config: CosyVoice2FlowConfig) -> None:
        super().__init__(config)
        self.encoder = UpsamplingEncoder(config)
        self.encoder_proj = nn.Linear(config.hidden_size, config.num_mel_bins)
        self.estimator = UNet1d(config)
        self.post_init()

    def _in_kaiming_part(self, module: nn.Module) -> bool:
        return any(module is part for part in self.estimator.modules())

    def encode(
        self,
        token_ids: Tensor,
        mask: Tensor | None,
        streaming: bool = False,
        num_following: int = 0,
        num_left_chunks: int = -1,
    ) -> tuple[Tensor, Tensor | None]:
        """`(b, n)` ids → what the encoder says, `(b, t, c)`, and its mask. See [`UpsamplingEncoder.forward`]."""
        return self.encoder(self.embed_speech(token_ids, mask), mask, streaming, num_following, num_left_chunks)

    def encode_tokens(
        self, token_ids: Tensor, mask: Tensor | None, streaming: bool, num_following: int, num_left_chunks: int = -1
    ) -> tuple[Tensor, Tensor | None]:
        hidden, mask = self.encode(token_ids, mask, streaming, num_following, num_left_chunks)
        return self.encoder_proj(hidden), mask

    @property
    def chunk_tokens(self) -> int:
        config = self.config
        if len(config.estimator_channels) != 1:
            raise ValueError(
                f"estimator_channels: expected one rate for a stream, got {len(config.estimator_channels)}"
            )
        if config.estimator_chunk_size != config.token_mel_ratio * config.encoder_chunk_size:
            raise ValueError(
                f"estimator_chunk_size: expected {config.token_mel_ratio * config.encoder_chunk_size} for a stream, "
                f"the chunk of the encoder in frames, got {config.estimator_chunk_size}"
            )
        return config.encoder_chunk_size

    def new_encoder_caches(
        self, batch_size: int, num_left_chunks: int = -1, cache_dtype: torch.dtype | None = None
    ) -> tuple[CausalCache, ...]:
        return self.encoder.new_caches(batch_size, num_left_chunks, cache_dtype)

    def encode_step(
        self, token_ids: Tensor, available: Tensor, counts: list[int], caches: tuple[CausalCache, ...]
    ) -> Tensor:
        hidden = self.encoder.embed_step(self.embed_speech(token_ids, available), available)
        return self.encoder_proj(self.encoder.step(hidden, counts, caches))


CosyVoice2FlowModel.register_for_auto_class("AutoModel")
