"""Configuration of FSMN-VAD, FunASR's voice activity detector (network: https://arxiv.org/abs/1803.05030)."""

from transformers import PreTrainedConfig


class FunasrFsmnVadConfig(PreTrainedConfig):
    r"""Network, front end and state machine; see `speech_detector.py` for the last. Times are in milliseconds.

    Network:
        input_size (`int`): features per frame, `num_mel_bins * stacked_frames`.
        input_affine_size, hidden_size, projection_size, output_affine_size (`int`): widths, in layer order.
        num_hidden_layers (`int`): memory layers.
        memory_size (`int`): frames that a memory spans, the present one included.
        num_classes (`int`): classes of a frame, which are states of phones.
        silence_ids (`list[int]`, *optional*, defaults to `[0]`): the classes that are silence.

    Front end:
        num_mel_bins, stacked_frames (`int`): filter banks, and how many neighbouring frames the network sees at once.
        frame_length_ms, frame_shift_ms, window_type, sampling_rate: of the filter banks.

    State machine: the other fields, with the meanings of `SpeechDetectorOptions`.
    """

    model_type = "funasr_fsmn_vad"
    keys_to_ignore_at_inference = ["past"]

    input_size: int = 400
    input_affine_size: int = 140
    hidden_size: int = 250
    projection_size: int = 128
    num_hidden_layers: int = 4
    memory_size: int = 20
    output_affine_size: int = 140
    num_classes: int = 248
    silence_ids: list[int] | None = None

    num_mel_bins: int = 80
    stacked_frames: int = 5
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    window_type: str = "hamming"
    sampling_rate: int = 16000

    window_ms: int = 200
    silence_to_speech_ms: int = 150
    speech_to_silence_ms: int = 150
    max_end_silence_ms: int = 800
    max_start_silence_ms: int = 3000
    lookback_ms: int = 200
    lookahead_ms: int = 100
    extend: bool = True
    max_segment_ms: int = 60000
    single_utterance: bool = False
    speech_noise_threshold: float = 0.6
    speech_noise_ratio: float = 1.0
    decibel_threshold: float = -100.0
    snr_threshold: float = -100.0
    num_noise_frames: int = 100

    initializer_range: float = 0.02

    def __post_init__(self, **kwargs) -> None:
        if self.silence_ids is None:
            self.silence_ids = [0]
        kwargs.setdefault(
            "auto_map",
            {
                "AutoConfig": "configuration_funasr_fsmn_vad.FunasrFsmnVadConfig",
                "AutoModel": "modeling_funasr_fsmn_vad.FunasrFsmnVadForAudioFrameClassification",
                "AutoModelForAudioFrameClassification": (
                    "modeling_funasr_fsmn_vad.FunasrFsmnVadForAudioFrameClassification"
                ),
            },
        )
        super().__post_init__(**kwargs)
        self.validate_architecture_choices()

    def validate_architecture_choices(self) -> None:
        """Refuse contradictory values.

        Raises:
            ValueError: names the field, the expected and the actual value.
        """
        if self.input_size != self.num_mel_bins * self.stacked_frames:
            raise ValueError(
                f"input_size: expected num_mel_bins * stacked_frames = {self.num_mel_bins * self.stacked_frames}, "
                f"got {self.input_size}"
            )
        for name in ("memory_size", "num_hidden_layers", "stacked_frames", "num_mel_bins", "num_noise_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("frame_shift_ms", "frame_length_ms", "window_ms", "max_segment_ms"):
            if getattr(self, name) < self.frame_shift_ms or self.frame_shift_ms <= 0:
                raise ValueError(f"{name}: expected at least one frame of {self.frame_shift_ms} ms")
        for index in self.silence_ids:
            if not 0 <= index < self.num_classes:
                raise ValueError(f"silence_ids: expected 0..{self.num_classes - 1}, got {index}")

    @property
    def window_length(self) -> int:
        """Samples in one analysis window."""
        return int(self.sampling_rate * self.frame_length_ms * 0.001)

    @property
    def hop_length(self) -> int:
        """Samples between two frames."""
        return int(self.sampling_rate * self.frame_shift_ms * 0.001)


FunasrFsmnVadConfig.register_for_auto_class()
