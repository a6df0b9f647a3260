"""CosyVoice 3's flow (`cosyvoice3_flow`): speech tokens to a mel spectrogram, whole or in a stream.

Paper: https://arxiv.org/abs/2505.17589. Upstream: `CausalMaskedDiffWithDiT` in `cosyvoice/flow/flow.py`.

Shape legend: `b` batch, `n` tokens, `t` frames, `m` mel bins. In every mask 1 = real.
"""

import torch
from torch import Tensor

from .causal_cache import CausalCache, number_layers
from .causal_token_to_mel import CausalTokenToMelModel
from .configuration_cosyvoice3_flow import CosyVoice3FlowConfig
from .diffusion_transformer import DiffusionTransformer
from .frame_convolution import FrameConv1d
from .lookahead_convolution import LookaheadConvolution


class CosyVoice3FlowModel(CausalTokenToMelModel):
    """Look-ahead over the embedded tokens and a diffusion transformer. See [`CausalTokenToMelModel`] for its use:
    `forward` (training loss), `generate_mel`, `start_stream` and `stream_mel`."""

    config_class = CosyVoice3FlowConfig
    config: CosyVoice3FlowConfig
    _no_split_modules = ["DiffusionTransformerLayer"]

    def __init__(self, config: CosyVoice3FlowConfig) -> None:
        super().__init__(config)
        self.lookahead = LookaheadConvolution(
            config.embedding_size, config.lookahead_channels, config.num_lookahead_tokens
        )
        self.estimator = DiffusionTransformer(config)
        number_layers(self.lookahead, FrameConv1d)
        self.post_init()

    def encode(self, token_ids: Tensor, mask: Tensor | None, num_following: int = 0) -> Tensor:
        """`(b, n)` ids → embedded tokens that have seen those after them, `(b, n - num_following, m)`."""
        hidden = self.lookahead(self.embed_speech(token_ids, mask))
        return hidden[:, : hidden.shape[1] - num_following]

    def encode_tokens(
        self, token_ids: Tensor, mask: Tensor | None, streaming: bool, num_following: int, num_left_chunks: int = -1
    ) -> tuple[Tensor, Tensor | None]:
        ratio = self.config.token_mel_ratio
        conditions = self.encode(token_ids, mask, num_following).repeat_interleave(ratio, dim=1)
        if mask is not None:
            mask = mask[:, num_following:].repeat_interleave(ratio, dim=1)  # real ones first
        return conditions, mask

    @property
    def chunk_tokens(self) -> int:
        tokens, rest = divmod(self.config.estimator_chunk_size, self.config.token_mel_ratio)
        if rest:
            raise ValueError(
                f"estimator_chunk_size: expected whole tokens of {self.config.token_mel_ratio} frames for a stream, "
                f"got {self.config.estimator_chunk_size}"
            )
        return tokens

    def new_encoder_caches(
        self, batch_size: int, num_left_chunks: int = -1, cache_dtype: torch.dtype | None = None
    ) -> tuple[CausalCache, ...]:
        # Convolutions only: what they remember does not grow.
        return (CausalCache([0] * batch_size, 0),)

    def encode_step(
        self, token_ids: Tensor, available: Tensor, counts: list[int], caches: tuple[CausalCache, ...]
    ) -> Tensor:
        (cache,) = caches
        cache.begin(counts, token_ids.device)
        hidden = self.lookahead.step(self.embed_speech(token_ids, available), cache)
        cache.end()
        return hidden.repeat_interleave(self.config.token_mel_ratio, dim=1)


CosyVoice3FlowModel.register_for_auto_class("AutoModel")
