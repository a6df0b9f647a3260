"""CosyVoice's flows at their published sizes against upstream's own code, with the same weights.

    python benchmarks/cosyvoice_flow.py --cosyvoice CHECKOUT --matcha CHECKOUT [--versions 1 2 3] [--runs 3] [--tiny]
        [--output benchmarks/RESULTS.md]

The checkouts are FunAudioLLM/CosyVoice and its submodule Matcha-TTS; what they import must be installed beside them.
Measured are a sentence, also with bfloat16 products where the processor has them, and four sentences offline (upstream
takes one at a time), and the whole work of a stream: what upstream computes anew for every piece, with the pieces of
its own loop, against what the caches leave to do. Every comparison checks first that both sides compute the same.
`--tiny` shortens everything to see that it runs.
"""

import argparse
import logging
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from timing import HEADER, Comparison, compare
from torch import Tensor, nn

from hf_speechllm.cpu_inference import has_bfloat16_products, pack_linear_weights, unpack_linear_weights
from hf_speechllm.models.causal_token_to_mel import CausalTokenToMelModel
from hf_speechllm.models.configuration_cosyvoice2_flow import CosyVoice2FlowConfig
from hf_speechllm.models.configuration_cosyvoice3_flow import CosyVoice3FlowConfig
from hf_speechllm.models.configuration_cosyvoice_flow import CosyVoiceFlowConfig
from hf_speechllm.models.modeling_cosyvoice2_flow import CosyVoice2FlowModel
from hf_speechllm.models.modeling_cosyvoice3_flow import CosyVoice3FlowModel
from hf_speechllm.models.modeling_cosyvoice_flow import CosyVoiceFlowModel
from hf_speechllm.models.token_to_mel import TokenToMelModel


CONVERSION = Path(__file__).resolve().parents[1] / "conversion"
CLASSES = {
    1: (CosyVoiceFlowConfig, CosyVoiceFlowModel),
    2: (CosyVoice2FlowConfig, CosyVoice2FlowModel),
    3: (CosyVoice3FlowConfig, CosyVoice3FlowModel),
}
# Seconds of the voice prompt, of a sentence, of four sentences, and of a stream.
SECONDS = {"prompt": 3.0, "sentence": 8.0, "four": (3.0, 5.0, 6.0, 9.0), "stream": 20.0}
TINY_SECONDS = {"prompt": 0.4, "sentence": 0.4, "four": (0.2, 0.4, 0.3, 0.5), "stream": 2.2}
# Upstream's stream: pieces of 25 tokens, then twice as many each time, up to 100.
FIRST_HOP, LONGEST_HOP = 25, 100
TOLERANCE = 1e-3


def import_peer(cosyvoice: Path, matcha: Path) -> None:
    """Put the checkouts on the path. `matcha.utils` imports its trainer, of which only a logger is needed here."""
    for checkout, name in ((cosyvoice, "cosyvoice/flow/flow.py"), (matcha, "matcha/models/components/decoder.py")):
        if not (checkout / name).is_file():
            raise SystemExit(f"{checkout}: not the checkout that is meant (no {name})")
    utils, logger = types.ModuleType("matcha.utils"), types.ModuleType("matcha.utils.pylogger")
    utils.__path__ = []
    logger.get_pylogger = logging.getLogger
    sys.modules |= {"matcha.utils": utils, "matcha.utils.pylogger": logger}
    sys.path[:0] = [str(cosyvoice), str(matcha)]
    logging.disable(logging.INFO)


def peer_flow(version: int) -> nn.Module:
    """Upstream's flow at its published size, as the recipes' yaml files build it."""
    from cosyvoice.flow.decoder import CausalConditionalDecoder, ConditionalDecoder
    from cosyvoice.flow.DiT.dit import DiT
    from cosyvoice.flow.flow import CausalMaskedDiffWithDiT, CausalMaskedDiffWithXvec, MaskedDiffWithXvec
    from cosyvoice.flow.flow_matching import CausalConditionalCFM, ConditionalCFM
    from cosyvoice.flow.length_regulator import InterpolateRegulator
    from cosyvoice.transformer.encoder import ConformerEncoder
    from cosyvoice.transformer.upsample_encoder import PreLookaheadLayer, UpsampleConformerEncoder
    from omegaconf import DictConfig

    matching = {
        "in_channels": 240,
        "n_spks": 1,
        "spk_emb_dim": 80,
        "cfm_params": DictConfig(
            {
                "sigma_min": 1e-6,
                "solver": "euler",
                "t_scheduler": "cosine",
                "training_cfg_rate": 0.2,
                "inference_cfg_rate": 0.7,
                "reg_loss_type": "l1",
            }
        ),
    }
    encoder = {
        "input_size": 512,
        "output_size": 512,
        "attention_heads": 8,
        "linear_units": 2048,
        "num_blocks": 6,
        "attention_dropout_rate": 0.1,
        "input_layer": "linear",
        "pos_enc_layer_type": "rel_pos_espnet",
        "use_cnn_module": False,
        "macaron_style": False,
    }
    unet = {"in_channels": 320, "out_channels": 80, "n_blocks": 4, "num_mid_blocks": 12, "num_heads": 8}
    unet |= {"dropout": 0.0, "act_fn": "gelu"}
    if version == 1:
        return MaskedDiffWithXvec(
            vocab_size=4096,
            input_frame_rate=50,
            encoder=ConformerEncoder(**encoder),
            length_regulator=InterpolateRegulator(channels=80, sampling_ratios=[1, 1, 1, 1]),
            decoder=ConditionalCFM(**matching, estimator=ConditionalDecoder(**unet, channels=[256, 256])),
        )
    if version == 2:
        return CausalMaskedDiffWithXvec(
            vocab_size=6561,
            input_frame_rate=25,
            encoder=UpsampleConformerEncoder(**encoder, static_chunk_size=25),
            decoder=CausalConditionalCFM(
                **matching,
                estimator=CausalConditionalDecoder(
                    **unet, channels=[256], static_chunk_size=50, num_decoding_left_chunks=-1
                ),
            ),
        )
    dit = {"dim": 1024, "depth": 22, "heads": 16, "dim_head": 64, "ff_mult": 2, "mu_dim": 80, "spk_dim": 80}
    return CausalMaskedDiffWithDiT(
        input_size=80,
        vocab_size=6561,
        input_frame_rate=25,
        pre_lookahead_layer=PreLookaheadLayer(in_channels=80, channels=1024, pre_lookahead_len=3),
        decoder=CausalConditionalCFM(
            **matching,
            estimator=DiT(**dit, out_channels=80, static_chunk_size=50, num_decoding_left_chunks=-1),
        ),
    )


@dataclass
class Sentence:
    """One sentence: tokens `(1, n)`, and the prompt's tokens, mel `(1, t, 80)` and speaker `(1, 192)`."""

    tokens: Tensor
    prompt_tokens: Tensor
    prompt_mel: Tensor
    speaker: Tensor


def make_sentence(model: TokenToMelModel, seconds: float, prompt_seconds: float, seed: int) -> Sentence:
    """Random tokens, and a prompt whose mel is as long as its tokens say."""
    generator, config = torch.Generator().manual_seed(seed), model.config
    counts = [round(value * config.input_frame_rate) for value in (seconds, prompt_seconds)]
    frames = (
        config.num_frames(counts[1]) if isinstance(model, CosyVoiceFlowModel) else config.token_mel_ratio * counts[1]
    )
    tokens, prompt = (torch.randint(config.vocab_size, (1, count), generator=generator) for count in counts)
    return Sentence(
        tokens,
        prompt,
        torch.randn(1, frames, 80, generator=generator),
        torch.randn(1, 192, generator=generator),
    )


def run_peer(peer: nn.Module, sentence: Sentence, streaming: bool = False, finalize: bool = True) -> Tensor:
    """Upstream's inference, `(1, t, 80)`. Version 1 draws its noise from torch's global generator."""
    ours_like = (sentence.tokens, sentence.prompt_tokens, sentence.prompt_mel)
    inputs = [part for value in ours_like for part in (value, torch.tensor([value.shape[1]]))]
    if hasattr(peer, "length_regulator"):
        torch.manual_seed(0)
        mel, _ = peer.inference(*inputs, sentence.speaker, torch.zeros(1, 80, 0, 2))
    else:
        mel, _ = peer.inference(*inputs, sentence.speaker, streaming, finalize)
    return mel.transpose(1, 2)


def peer_noise(model: TokenToMelModel, sentence: Sentence) -> dict[str, Tensor]:
    """The noise that [`run_peer`] draws for version 1."""
    if not isinstance(model, CosyVoiceFlowModel):
        return {}
    frames = sentence.prompt_mel.shape[1] + model.config.num_frames(sentence.tokens.shape[1])
    torch.manual_seed(0)
    return {"noise": torch.randn(1, 80, frames).transpose(1, 2)}


def run_ours(model: TokenToMelModel, sentences: list[Sentence]) -> tuple[Tensor, Tensor]:
    """All sentences in one call: `(b, t, 80)` and its mask."""

    def padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        lengths = torch.tensor([row.shape[1] for row in rows])
        batch = nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)
        return batch, torch.arange(batch.shape[1]) < lengths[:, None]

    tokens, mask = padded([item.tokens for item in sentences])
    prompt_tokens, prompt_mask = padded([item.prompt_tokens for item in sentences])
    prompt_mel, prompt_mel_mask = padded([item.prompt_mel for item in sentences])
    noise = {}
    if isinstance(model, CosyVoiceFlowModel):
        noise = {"noise": padded([peer_noise(model, item)["noise"] for item in sentences])[0]}
    output = model.generate_mel(
        tokens,
        mask,
        prompt_tokens,
        prompt_mask,
        prompt_mel,
        prompt_mel_mask,
        torch.cat([item.speaker for item in sentences]),
        **noise,
    )
    return output.mel, output.mel_mask


def hops(num_tokens: int, num_prompt_tokens: int, lookahead: int) -> list[int]:
    """Tokens that have come at each piece of upstream's loop; the last is all of them."""
    hop, done, ends = FIRST_HOP, 0, []
    padding = -num_prompt_tokens % FIRST_HOP
    while True:
        wanted = hop + (padding if done == 0 else 0)
        if num_tokens - done < wanted + lookahead:
            return [*ends, num_tokens]
        done += wanted
        ends.append(done + lookahead)
        hop = min(LONGEST_HOP, 2 * hop)


def stream_peer(peer: nn.Module, sentence: Sentence, ends: list[int]) -> Tensor:
    """Upstream's loop: everything so far again at each piece, of which the new frames are kept.

    Upstream computes the last piece without chunks, which costs the same; here it has them, so that the pieces are
    those of one network.
    """
    pieces, done = [], 0
    for number, end in enumerate(ends):
        part = Sentence(sentence.tokens[:, :end], sentence.prompt_tokens, sentence.prompt_mel, sentence.speaker)
        mel = run_peer(peer, part, streaming=True, finalize=number == len(ends) - 1)
        pieces.append(mel[:, done:])
        done = mel.shape[1]
    return torch.cat(pieces, dim=1)


def stream_ours(model: CausalTokenToMelModel, sentence: Sentence, ends: list[int]) -> Tensor:
    """The same pieces from the caches."""
    state = model.start_stream(sentence.speaker, sentence.prompt_tokens, None, sentence.prompt_mel)
    pieces, done = [], 0
    for end in ends:
        piece, state = model.stream_mel(state, sentence.tokens[:, done:end], is_last=end == ends[-1])
        pieces.append(piece.mel)
        done = end
    return torch.cat(pieces, dim=1)


def check_equal(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Stop where the two sides differ by more than rounding."""
    difference = float((ours - theirs).abs().max() / (1 + theirs.abs().max()))
    if ours.shape != theirs.shape or not difference <= TOLERANCE:
        raise SystemExit(f"{what}: expected equal spectrograms, got {difference} apart")


def compare_flow(version: int, seconds: dict, runs: int, report: Callable[[Comparison], None]) -> None:
    """All comparisons of one version."""
    # In front of this folder, where a file of the same name lies.
    sys.path.insert(0, str(CONVERSION))
    from cosyvoice_flow import convert_weights

    torch.manual_seed(0)
    peer = peer_flow(version).eval()
    config_class, model_class = CLASSES[version]
    model = model_class(config_class()).eval()
    model.load_state_dict(convert_weights(peer.state_dict(), model.config, Path("peer")))
    prompt = seconds["prompt"]
    one = make_sentence(model, seconds["sentence"], prompt, seed=0)
    check_equal(run_ours(model, [one])[0], run_peer(peer, one), f"version {version}")
    name = f"CosyVoice {version} flow"
    report(
        compare(
            f"{name}, {seconds['sentence']:g} s",
            ">= 1.1",
            lambda: run_peer(peer, one),
            lambda: run_ours(model, [one]),
            runs=runs,
        )
    )
    if has_bfloat16_products():
        exact = run_ours(model, [one])[0]
        pack_linear_weights(model, torch.bfloat16)
        error = float((run_ours(model, [one])[0] - exact).norm() / exact.norm())
        report(
            compare(
                f"{name}, {seconds['sentence']:g} s, ours packed in bfloat16 (mel {100 * error:.1f} % off)",
                "",
                lambda: run_peer(peer, one),
                lambda: run_ours(model, [one]),
                runs=runs,
            )
        )
        unpack_linear_weights(model)
    four = [make_sentence(model, length, prompt, seed=index) for index, length in enumerate(seconds["four"])]
    mels, mask = run_ours(model, four)
    for mel, real, item in zip(mels, mask, four, strict=True):
        check_equal(mel[real][None], run_peer(peer, item), f"version {version}, four sentences")
    report(
        compare(
            f"{name}, 4 sentences, {sum(seconds['four']):g} s",
            ">= 2",
            lambda: [run_peer(peer, item) for item in four],
            lambda: run_ours(model, four),
            runs=runs,
        )
    )
    if not isinstance(model, CausalTokenToMelModel):
        return
    long = make_sentence(model, seconds["stream"], prompt, seed=9)
    ends = hops(long.tokens.shape[1], long.prompt_tokens.shape[1], model.config.num_lookahead_tokens)
    check_equal(stream_ours(model, long, ends), stream_peer(peer, long, ends), f"version {version}, stream")
    report(
        compare(
            f"{name}, stream of {seconds['stream']:g} s in {len(ends)} pieces, all work",
            ">= 2",
            lambda: stream_peer(peer, long, ends),
            lambda: stream_ours(model, long, ends),
            runs=runs,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cosyvoice", type=Path, required=True, help="checkout of FunAudioLLM/CosyVoice")
    parser.add_argument("--matcha", type=Path, required=True, help="checkout of shivammehta25/Matcha-TTS")
    parser.add_argument("--versions", type=int, nargs="+", choices=sorted(CLASSES), default=sorted(CLASSES))
    parser.add_argument("--runs", type=int, default=3, help="of both sides, after one to warm up")
    parser.add_argument("--tiny", action="store_true", help="seconds of audio, to see that it runs")
    parser.add_argument("--output", type=Path, help="append the table to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    import_peer(arguments.cosyvoice, arguments.matcha)

    def report(text: str) -> None:
        print(text, flush=True)
        if arguments.output is not None:
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(text + "\n")

    report(HEADER)
    seconds = TINY_SECONDS if arguments.tiny else SECONDS
    with torch.inference_mode():
        for version in arguments.versions:
            compare_flow(version, seconds, arguments.runs, lambda comparison: report(comparison.row()))


if __name__ == "__main__":
    main()
