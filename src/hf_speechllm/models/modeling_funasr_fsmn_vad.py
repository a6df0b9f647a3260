"""FSMN-VAD: which parts of a recording are speech. A small causal network and a state machine over its output.

Network: https://arxiv.org/abs/1803.05030. Upstream: modelscope/FunASR, `funasr/models/fsmn_vad_streaming`.

Shape legend: `b` batch, `t` frames, `c` classes. What differs from upstream: a silence probability of exactly 0 or 1
is no error, and a recording that ends between two frames still ends its segment.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from .configuration_funasr_fsmn_vad import FunasrFsmnVadConfig
from .feature_extraction_kaldi_fbank import KaldiFbankFeatureExtractor
from .sanm import FsmnMemory
from .streaming_funasr_fsmn_vad import FunasrFsmnVadStreamingMixin


@dataclass
class FunasrFsmnVadOutput(ModelOutput):
    """
    Args:
        loss (scalar): cross-entropy over the frames with a label, with `labels`.
        logits (`(b, t, c)`): of the classes; those of padded frames mean nothing.
        silence_probabilities (`(b, t)`, float32): sum over the classes that are silence; 1 on padded frames.
        past (`list` of `(b, memory_size - 1, projection_size)`): what the layers remember, for the next call.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    silence_probabilities: Tensor | None = None
    past: list[Tensor] | None = None


class FunasrFsmnVadLayer(nn.Module):
    """Down to the memory's width, causal memory, up again, ReLU. No residual."""

    def __init__(self, config: FunasrFsmnVadConfig) -> None:
        super().__init__()
        self.down_proj = nn.Linear(config.hidden_size, config.projection_size, bias=False)
        # The shift makes the window end at the present frame.
        self.memory = FsmnMemory(config.projection_size, config.memory_size, config.memory_size // 2, dropout=0.0)
        self.up_proj = nn.Linear(config.projection_size, config.hidden_size)

    def forward(self, hidden_states: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output `(b, t, hidden_size)`, and what the memory needs next time."""
        hidden_states, past = self.memory(self.down_proj(hidden_states), None, past)
        return nn.functional.relu(self.up_proj(hidden_states)), past


class FunasrFsmnVadPreTrainedModel(PreTrainedModel):
    """Loading and initialisation."""

    config_class = FunasrFsmnVadConfig
    config: FunasrFsmnVadConfig
    base_model_prefix = "model"
    main_input_name = "input_features"
    input_modalities = ("audio",)
    _no_split_modules = ["FunasrFsmnVadLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear | nn.Conv1d):
            # torch's own defaults, as upstream trains from.
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                bound = module.weight[0].numel() ** -0.5
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, FunasrFsmnVadForAudioFrameClassification):
            init.zeros_(module.cmvn_mean)
            init.ones_(module.cmvn_inverse_std)


class FunasrFsmnVadForAudioFrameClassification(FunasrFsmnVadStreamingMixin, FunasrFsmnVadPreTrainedModel):
    """The detector: network with its normalisation of the features, state machine, `speech_segments` and streaming."""

    def __init__(self, config: FunasrFsmnVadConfig) -> None:
        super().__init__(config)
        self.register_buffer("cmvn_mean", torch.zeros(config.input_size))
        self.register_buffer("cmvn_inverse_std", torch.ones(config.input_size))
        self.input_fc1 = nn.Linear(config.input_size, config.input_affine_size)
        self.input_fc2 = nn.Linear(config.input_affine_size, config.hidden_size)
        self.layers = nn.ModuleList(FunasrFsmnVadLayer(config) for _ in range(config.num_hidden_layers))
        self.output_fc = nn.Linear(config.hidden_size, config.output_affine_size)
        self.classifier = nn.Linear(config.output_affine_size, config.num_classes)
        self.post_init()

    def forward(
        self,
        input_features: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past: list[Tensor] | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> FunasrFsmnVadOutput | tuple:
        """
        Args:
            input_features (`(b, t, input_size)`): stacked filter banks before normalisation.
            attention_mask (`(b, t)`): 1 = real frame; padding is on the right, and changes nothing before it.
            labels (`(b, t)`, int64): class of each frame, -100 = none.
            past: of the output for the frames before these; `None` at the start.

        Example:

        ```python
        >>> features = feature_extractor(waveform, sampling_rate=16000)
        >>> speech = 1 - model(**features).silence_probabilities
        ```
        """
        features = (input_features.to(self.cmvn_mean.dtype) - self.cmvn_mean) * self.cmvn_inverse_std
        hidden_states = nn.functional.relu(self.input_fc2(self.input_fc1(features)))
        memories = []
        for index, layer in enumerate(self.layers):
            hidden_states, memory = layer(hidden_states, None if past is None else past[index])
            memories.append(memory)
        logits = self.classifier(self.output_fc(hidden_states))
        probabilities = logits.float().softmax(dim=-1)[..., self.config.silence_ids].sum(dim=-1)
        if attention_mask is not None:
            probabilities = probabilities.masked_fill(~attention_mask.bool(), 1.0)
        output = FunasrFsmnVadOutput(logits=logits, silence_probabilities=probabilities, past=memories)
        if labels is not None:
            summed = nn.functional.cross_entropy(
                logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
            )
            output.loss = summed / (labels != -100).sum().clamp_min(1)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def new_feature_extractor(self) -> KaldiFbankFeatureExtractor:
        """The front end that the configuration describes; the normalisation is the network's own."""
        config = self.config
        return KaldiFbankFeatureExtractor(
            feature_size=config.num_mel_bins,
            sampling_rate=config.sampling_rate,
            frame_length_ms=config.frame_length_ms,
            frame_shift_ms=config.frame_shift_ms,
            window_type=config.window_type,
            lfr_m=config.stacked_frames,
        )


FunasrFsmnVadForAudioFrameClassification.register_for_auto_class("AutoModel")
