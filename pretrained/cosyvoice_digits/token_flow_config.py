"""What the flows of the three versions of CosyVoice have in common: sizes, schedule, guidance, training draws."""

from transformers import PreTrainedConfig


class TokenFlowConfig(PreTrainedConfig):
    r"""Fields of every flow from speech tokens to a mel spectrogram.

    Sizes:
        vocab_size (`int`): speech tokens. embedding_size (`int`): channels of their embedding.
        num_mel_bins (`int`): of the spectrogram; also the size of the projected speaker.
        speaker_embedding_size (`int`): of the speaker vector.
        input_frame_rate (`int`): speech tokens per second.

    From noise to mel (see `flow_matching.py`):
        time_schedule (`str`): `"cosine"` or `"linear"`.
        guidance_scale (`float`): weight of the step away from the velocity without conditions; 0 computes only one.

    Training:
        sigma_min (`float`): what is left of the noise at time 1.
        condition_dropout (`float`): share of rows that are trained without conditions.
        prompt_probability, longest_prompt (`float`): how often a row gets the beginning of its own target as a prompt,
            and the largest part of it.

    padding (`str`): `"invariant"`: an item of a batch equals the item alone. `"upstream"` lets padding leak into an
        item as upstream does: its regulator (in training), its group norms and its look-ahead see padded frames.
    """

    keys_to_ignore_at_inference = ["velocity", "target_velocity", "noisy", "conditions", "prompt", "mel_mask"]

    vocab_size: int = 6561
    embedding_size: int = 512
    num_mel_bins: int = 80
    speaker_embedding_size: int = 192
    input_frame_rate: int = 25
    time_schedule: str = "cosine"
    guidance_scale: float = 0.7
    sigma_min: float = 1e-6
    condition_dropout: float = 0.2
    prompt_probability: float = 0.5
    longest_prompt: float = 0.3
    padding: str = "invariant"

    def validate_flow(self, at_least: dict[str, int]) -> None:
        """Refuse values that no flow has; `at_least` has the least value of each further field.

        Raises:
            ValueError: names the field, the expected and the actual value.
        """
        counts = ("vocab_size", "embedding_size", "num_mel_bins", "speaker_embedding_size", "input_frame_rate")
        for name, least in {**dict.fromkeys(counts, 1), **at_least}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name in ("condition_dropout", "prompt_probability", "longest_prompt"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}: expected 0..1, got {getattr(self, name)}")
        for name in ("guidance_scale", "sigma_min"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name, known in (("time_schedule", ("cosine", "linear")), ("padding", ("invariant", "upstream"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {known}, got {getattr(self, name)!r}")


def validate_encoder(config) -> None:
    """Refuse sizes of a [`RelativePositionEncoder`] that contradict each other.

    Raises:
        ValueError: names the field, the expected and the actual value.
    """
    if config.hidden_size % config.num_attention_heads or config.hidden_size % 2:
        raise ValueError(
            f"hidden_size: expected an even number and a multiple of num_attention_heads "
            f"{config.num_attention_heads}, got {config.hidden_size}"
        )
    if config.hidden_act not in ("silu", "relu", "gelu", "tanh", "hardtanh", "selu"):
        raise ValueError(f"hidden_act: expected an activation of the encoder, got {config.hidden_act!r}")


def validate_unet(config, groups: int) -> None:
    """Refuse a U-Net without stages, or with channels that its norms cannot group.

    Raises:
        ValueError: names the field, the expected and the actual value.
    """
    channels = config.estimator_channels
    if not channels or any(not isinstance(size, int) or size < 1 or size % groups for size in channels):
        raise ValueError(f"estimator_channels: expected positive multiples of {groups}, got {channels}")
    if config.estimator_hidden_act not in ("gelu", "gelu_pytorch_tanh"):
        raise ValueError(
            f"estimator_hidden_act: expected 'gelu' or 'gelu_pytorch_tanh', got {config.estimator_hidden_act!r}"
        )
