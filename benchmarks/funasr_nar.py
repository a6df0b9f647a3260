"""One pass instead of one token after the other: our Paraformer against our U2++ with its attention beam of 10.

Both have the same conformer (12 x 256, the same weights) and a transformer decoder of six layers, and both write the
same number of tokens, four a second. The texts differ: the weights are random and the methods are different ones.
"""

import math
from collections.abc import Callable

import torch
from timing import Comparison, compare
from torch import Tensor, nn

from hf_speechllm.models.configuration_funasr_paraformer import FunasrParaformerConfig
from hf_speechllm.models.configuration_wenet_u2pp import WenetU2ppConfig
from hf_speechllm.models.modeling_funasr_paraformer import FunasrParaformerForSpeechRecognition
from hf_speechllm.models.modeling_wenet_u2pp import WenetU2ppForSpeechRecognition


SECONDS, TOKENS, BEAM = 10, 40, 10


class EndMarkAfter:
    """A hook of the decoder's head: the end mark wins after `tokens` steps and never before."""

    def __init__(self, tokens: int, eos: int) -> None:
        self.tokens, self.eos, self.step = tokens, eos, 0

    def __call__(self, module: nn.Module, inputs: tuple, logits: Tensor) -> Tensor:
        logits = logits.clone()
        logits[..., self.eos] = 1e4 if self.step == self.tokens else -1e4
        self.step = 0 if self.step == self.tokens else self.step + 1
        return logits


def build_models() -> tuple[WenetU2ppForSpeechRecognition, FunasrParaformerForSpeechRecognition]:
    torch.manual_seed(0)
    shape = {"vocab_size": 4233, "input_size": 80, "encoder_type": "conformer", "decoder_layers": 6}
    beam = WenetU2ppForSpeechRecognition(WenetU2ppConfig(**shape, has_cmvn=False)).eval()
    sizes = {"hidden_size": 256, "num_hidden_layers": 12, "stacked_frames": 1, "decoder_type": "transformer"}
    one_pass = FunasrParaformerForSpeechRecognition(FunasrParaformerConfig(**shape, **sizes)).eval()
    one_pass.model.encoder.load_state_dict(beam.model.encoder.state_dict())
    beam.decoder_head.register_forward_hook(EndMarkAfter(TOKENS, beam.config.eos_token_id))
    # Equal weights of all frames, so many that TOKENS tokens fire.
    frames = (100 * SECONDS - 3) // 4
    weight = (TOKENS + 0.5 - one_pass.config.cif_tail_threshold) / frames
    with torch.no_grad():
        one_pass.model.predictor.alpha_proj.weight.zero_()
        one_pass.model.predictor.alpha_proj.bias.fill_(math.log(weight / (1 - weight)))
    return beam, one_pass


def nar() -> list[Comparison]:
    """The decoding alone, given the encoder's frames, and features to token ids."""
    beam, one_pass = build_models()
    results = []
    with torch.inference_mode():
        for batch in (1, 8):
            features = torch.randn(batch, 100 * SECONDS, 80, generator=torch.Generator().manual_seed(0))
            encoded = beam.model.encoder(features)
            hidden, mask = encoded.last_hidden_state, encoded.attention_mask
            assert (one_pass.model(features).last_hidden_state - hidden).abs().max() < 1e-4

            def decode_beam(hidden=hidden, mask=mask) -> Tensor:
                found = beam._attention_beam_search(hidden, mask, BEAM, 0.0, 1, False)
                return torch.tensor([result.tokens[0] for result in found])

            def decode_one_pass(hidden=hidden, mask=mask) -> Tensor:
                predicted = one_pass.model.predictor(hidden, None)
                decoded = one_pass.model.decode(predicted.embeddings, predicted.token_lengths, hidden, mask)
                return one_pass.lm_head(decoded).argmax(dim=-1)

            whole_beam = lambda f=features: beam.generate(f, decoding="attention", num_beams=BEAM)  # noqa: E731
            whole_one_pass = lambda f=features: one_pass.generate(f)  # noqa: E731
            name = f"one pass against beam {BEAM}, {SECONDS} s, {TOKENS} tokens, batch {batch}"
            pairs: list[tuple[str, str, Callable, Callable]] = [
                ("decoding alone", "> 10", decode_beam, decode_one_pass),
                ("features to tokens", "", whole_beam, whole_one_pass),
            ]
            for what, goal, slow, fast in pairs:
                assert slow().shape == fast().shape == (batch, TOKENS), (slow().shape, fast().shape)
                results.append(compare(f"{name}, {what}", goal, slow, fast, runs=3))
    return results
