"""Every stage of SpeechTokenizer against upstream: frames, codes, waveforms, training losses, gradients, codebooks."""

from pathlib import Path

import torch
from convert_speechtokenizer import convert_speechtokenizer_pack
from torch import Tensor

from hf_speechllm.models.modeling_speechtokenizer import SpeechTokenizerModel
from hf_speechllm.train.distillation import d_axis_loss
from hf_speechllm.train.mel_loss import MultiScaleMelLoss
from hf_speechllm.train.speechtokenizer_step import waveform_distance
from hf_speechllm.upstream.json_config import read_json_mapping

from .case import Case, as_float


# "1e-4 relative" for losses, "1e-3 relative" for gradients.
_LOSS_RTOL, _GRADIENT_RTOL = 1e-4, 1e-3
_MARGIN = "min_squared_distance_margin_between_best_and_second_codeword"
_GRADIENTS = {
    "grad_encoder_first_weight_v": "encoder.input_conv.conv.parametrizations.weight.original1",
    "grad_decoder_last_weight_v": "decoder.output_conv.conv.parametrizations.weight.original1",
}


def check_speechtokenizer(case: Case, work: Path) -> None:
    """Convert the pack of `case` into `work` and check every expected value."""
    convert_speechtokenizer_pack(case.directory, work / "model")
    model = SpeechTokenizerModel.from_pretrained(work / "model").eval()
    SpeechTokenizerChecks(case, model).run()


class SpeechTokenizerChecks:
    """The stages, in the order in which a failure of one explains those after it."""

    def __init__(self, case: Case, model: SpeechTokenizerModel) -> None:
        self.case, self.model = case, model
        self.waveform = case.tensors["wav"]
        case.use("wav", "semantic_target")

    def run(self) -> None:
        with torch.no_grad():
            self.check_codes()
            if _MARGIN in self.case.facts:
                self.check_margin()
            self.check_decoding()
            self.check_forward()
            self.check_stream()
        self.check_training()

    def compare_relative(self, name: str, actual: Tensor, rtol: float) -> None:
        """Compare with a tolerance relative to the largest expected value."""
        expected = self.case.tensors[name]
        scale = float(expected.abs().max())
        if actual.shape != expected.shape:
            self.case.compare(name, actual)
            return
        difference = float((actual.detach().double() - expected.double()).abs().max())
        self.case.record(name, difference, f"{rtol} relative", difference <= rtol * max(scale, 1e-12))

    # -- encoder and quantizer ---------------------------------------------------------------------------------------
    def codes(self, **options: object) -> Tensor:
        """Codes as upstream orders them, `(q, b, frames)`."""
        return self.model.encode(self.waveform, **options).audio_codes.transpose(0, 1)

    def check_codes(self) -> None:
        case = self.case
        case.compare("encoder_output", self.model.encoder(self.waveform))
        case.compare("codes", self.codes())
        case.compare("codes_nq2", self.codes(num_quantizers=2))
        case.compare("codes_st1", self.codes(first_quantizer=1, first_quantizer_from="input"))

    def check_margin(self) -> None:
        """How far the second codeword is behind the nearest, at the closest: what the codes rest on."""
        residual = self.model.encoder(self.waveform).transpose(1, 2).flatten(0, 1)
        smallest = float("inf")
        for level in self.model.quantizer.levels:
            distances = torch.cdist(residual.double(), level.embed.double()).square()
            first, second = distances.topk(2, largest=False).values.unbind(dim=1)
            smallest = min(smallest, float((second - first).min()))
            residual = residual - level.decode(level.encode(residual))
        self.case.compare_value(_MARGIN, smallest, self.case.facts[_MARGIN], atol=self.case.atol)

    # -- decoder -----------------------------------------------------------------------------------------------------
    def check_decoding(self) -> None:
        case, model = self.case, self.model
        codes = case.tensors["codes"].transpose(0, 1)
        case.compare("quantized_all", model.get_quantized(codes).transpose(1, 2))
        case.compare("quantized_rvq1", model.get_quantized(codes[:, :1]).transpose(1, 2))
        case.compare("wav_decoded", model.decode(codes).audio_values)
        case.compare("wav_decoded_rvq1", model.decode(codes[:, :1]).audio_values)
        case.compare("wav_decoded_from_st1", model.decode(codes[:, 1:], first_quantizer=1).audio_values)

    def check_stream(self) -> None:
        """Frame by frame, the decoder gives upstream's waveform too."""
        codes, state, pieces = self.case.tensors["codes"].transpose(0, 1), None, []
        for index in range(codes.shape[-1]):
            is_last = index == codes.shape[-1] - 1
            audio, state = self.model.decode_stream(codes[..., index : index + 1], state, is_last=is_last)
            pieces.append(audio)
        self.case.compare("wav_decoded (frame by frame)", torch.cat(pieces, dim=-1), self.case.tensors["wav_decoded"])

    def check_forward(self) -> None:
        case = self.case
        output = self.model(self.waveform)
        second_level = self.model.get_quantized(output.audio_codes[:, 1:2], first_quantizer=1)
        case.compare("forward_feature_layer1", second_level.transpose(1, 2))
        case.compare("forward_wav", output.audio_values)
        case.compare("forward_commit_loss_eval", output.commitment_loss)
        case.compare("forward_feature", output.semantic_features)

    # -- training ----------------------------------------------------------------------------------------------------
    def check_training(self) -> None:
        """One pass in training mode: losses with the weights of the pack's `config.json`, gradients, codebooks."""
        case, model = self.case, self.model
        settings = read_json_mapping(case.directory / "config.json")
        mel_loss = MultiScaleMelLoss(
            sampling_rate=model.config.sampling_rate,
            weights=settings["mel_loss_lambdas"],
            n_fft=settings["n_fft"],
            hop_length=settings["hop_size"],
            win_length=settings["win_size"],
            num_mels=settings["num_mels"],
            f_min=settings["fmin"],
            f_max=settings["fmax_for_loss"],
        )
        model.train()
        output = model(self.waveform)
        model.eval()
        case.compare("train_wav", output.audio_values)
        case.compare("train_feature", output.semantic_features)
        self.compare_relative("train_commit_loss", output.commitment_loss, _LOSS_RTOL)
        reconstruction = waveform_distance(self.waveform, output.audio_values)
        mel = mel_loss(self.waveform, output.audio_values)
        distillation = d_axis_loss(output.semantic_features, case.tensors["semantic_target"])
        total = (
            mel
            + settings["commitment_loss_lambda"] * output.commitment_loss
            + settings["recon_loss_lambda"] * reconstruction
            + settings["distill_loss_lambda"] * distillation
        )
        for name, value in (
            ("loss_recon", reconstruction),
            ("loss_mel_scales", mel_loss.scales(self.waveform, output.audio_values)),
            ("loss_mel", mel),
            ("loss_distill_d_axis", distillation),
            ("loss_generator_without_gan", total),
        ):
            self.compare_relative(name, as_float(value), _LOSS_RTOL)
        case.compare("mel_scale0", mel_loss.spectrograms[0](self.waveform))
        total.backward()
        parameters = dict(model.named_parameters())
        for name, ours in _GRADIENTS.items():
            self.compare_relative(name, parameters[ours].grad, _GRADIENT_RTOL)
        self.check_codebooks()

    def check_codebooks(self) -> None:
        for level, codebook in enumerate(self.model.quantizer.levels):
            self.case.compare(f"ema_after_{level}_embed", codebook.embed)
            self.case.compare(f"ema_after_{level}_cluster_size", codebook.cluster_size)
