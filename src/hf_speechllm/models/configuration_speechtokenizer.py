"""Configuration of SpeechTokenizer (https://arxiv.org/abs/2308.16692): a codec whose first codebook is semantic."""

import math
from typing import Any

from transformers import PreTrainedConfig


class SpeechTokenizerConfig(PreTrainedConfig):
    r"""Everything that the codec needs, at the values of the published model.

    Encoder and decoder (see `seanet.py`):
        sampling_rate (`int`): Hz.
        num_filters (`int`): channels at the sampling rate; each ratio doubles them.
        upsampling_ratios (`list[int]`): of the decoder's stages, in order; the encoder has them in reverse.
        hidden_size (`int`): channels of a frame, and size of a codeword.
        num_residual_layers (`int`): residual units before each change of rate.
        residual_kernel_size (`int`): of their first convolution, whose dilation is `dilation_growth_rate ** index`.
        dilation_growth_rate (`int`): see above.
        num_lstm_layers (`int`): of the LSTM at frame rate in the encoder, and of that in the decoder. 0 has none.
        use_bidirectional_lstm (`bool`): the encoder's LSTM reads both ways. The decoder's never does.
        hidden_act (`str`): `"elu"` or `"snake"`.
        use_weight_norm (`bool`): convolutions keep direction and magnitude apart, as in training. `False` after
            `remove_weight_norm()`.

    Quantizer (see `residual_vector_quantizer.py`):
        num_quantizers, codebook_size (`int`): levels, and codewords of each.
        codebook_decay (`float`): of the moving averages that the codewords are.
        dead_code_threshold (`float`): a codeword with fewer frames per step, averaged, is replaced while training; 0
            never. The even share is the frames of a step (of all processes) over `codebook_size`: stay well below.
        kmeans_iterations (`int`): of the k-means on the first training batch that the codewords start from.

    Distillation:
        semantic_hidden_size (`int`): channels of the teacher that the first level imitates.

    All integers above are at least 1 except `num_lstm_layers`; `num_filters` is at least 2.
    """

    model_type = "speechtokenizer"
    keys_to_ignore_at_inference = ["commitment_loss", "semantic_features"]

    sampling_rate: int = 16000
    num_filters: int = 64
    upsampling_ratios: list[int] | None = None
    hidden_size: int = 1024
    num_residual_layers: int = 1
    residual_kernel_size: int = 3
    dilation_growth_rate: int = 2
    num_lstm_layers: int = 2
    use_bidirectional_lstm: bool = True
    hidden_act: str = "elu"
    use_weight_norm: bool = True

    num_quantizers: int = 8
    codebook_size: int = 1024
    codebook_decay: float = 0.99
    dead_code_threshold: float = 2.0
    kmeans_iterations: int = 50

    semantic_hidden_size: int = 768

    def __post_init__(self, **kwargs) -> None:
        self.upsampling_ratios = list(self.upsampling_ratios or [8, 5, 4, 2])
        # Which Auto classes answer; fixed facts of the family, written into every config.json.
        model = "modeling_speechtokenizer.SpeechTokenizerModel"
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_speechtokenizer.SpeechTokenizerConfig",
                "AutoModel": model,
                "AutoModelForAudioTokenization": model,
            },
        )
        super().__post_init__(**kwargs)
        self.validate_architecture_choices()

    def validate_architecture_choices(self) -> None:
        """Refuse values that no codec has.

        Raises:
            ValueError: names the field, the expected and the actual value.
        """
        at_least = {
            **dict.fromkeys(("sampling_rate", "hidden_size", "num_residual_layers", "residual_kernel_size"), 1),
            **dict.fromkeys(("dilation_growth_rate", "num_quantizers", "codebook_size", "kmeans_iterations"), 1),
            **{"semantic_hidden_size": 1, "num_filters": 2, "num_lstm_layers": 0, "dead_code_threshold": 0},
        }
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not all(isinstance(ratio, int) and ratio >= 1 for ratio in self.upsampling_ratios):
            raise ValueError(f"upsampling_ratios: expected integers of at least 1, got {self.upsampling_ratios}")
        if self.hidden_act not in ("elu", "snake"):
            raise ValueError(f"hidden_act: expected 'elu' or 'snake', got {self.hidden_act!r}")
        if self.use_bidirectional_lstm and not self.num_lstm_layers:
            raise ValueError("use_bidirectional_lstm: expected false without LSTM (num_lstm_layers 0), got true")
        if not 0.0 <= self.codebook_decay <= 1.0:
            raise ValueError(f"codebook_decay: expected 0..1, got {self.codebook_decay}")

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with names of classes in `auto_map`.

        Saving takes every class with "Tokenizer" in its name for a text tokenizer, writes a pair (slow, fast) in place
        of the name, and no Auto class can load that.
        """
        output = super().to_dict()
        if "auto_map" in output:
            output["auto_map"] = {
                auto: name if isinstance(name, str) else name[0] for auto, name in output["auto_map"].items()
            }
        return output

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return math.prod(self.upsampling_ratios)

    @property
    def frame_rate(self) -> float:
        """Frames per second; each has `num_quantizers` codes."""
        return self.sampling_rate / self.hop_length


SpeechTokenizerConfig.register_for_auto_class()
