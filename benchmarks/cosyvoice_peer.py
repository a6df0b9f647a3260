"""CosyVoice from a checkout that the caller names, as the peer to measure against. Nothing of it is shipped here.

Both sides have the published shapes and the same random weights.
"""

import importlib.util
import logging
import sys
import types
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from hf_speechllm.models.configuration_cosyvoice2_flow import CosyVoice2FlowConfig
from hf_speechllm.models.configuration_cosyvoice3_flow import CosyVoice3FlowConfig
from hf_speechllm.models.configuration_cosyvoice3_hift import CosyVoice3HiftConfig
from hf_speechllm.models.configuration_cosyvoice_flow import CosyVoiceFlowConfig
from hf_speechllm.models.configuration_cosyvoice_hift import CosyVoiceHiftConfig
from hf_speechllm.models.configuration_cosyvoice_lm import CosyVoiceLmConfig
from hf_speechllm.models.modeling_cosyvoice2_flow import CosyVoice2FlowModel
from hf_speechllm.models.modeling_cosyvoice3_flow import CosyVoice3FlowModel
from hf_speechllm.models.modeling_cosyvoice3_hift import CosyVoice3HiftModel
from hf_speechllm.models.modeling_cosyvoice_flow import CosyVoiceFlowModel
from hf_speechllm.models.modeling_cosyvoice_hift import CosyVoiceHiftModel
from hf_speechllm.models.modeling_cosyvoice_lm import CosyVoiceLmForCausalLM
from hf_speechllm.models.token_to_mel import TokenToMelModel


# In front of this folder, where files of the same names lie.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "conversion"))

import cosyvoice_flow as flow_weights  # noqa: E402
import cosyvoice_hift as vocoder_weights  # noqa: E402
import cosyvoice_lm as lm_weights  # noqa: E402


FLOWS = {
    1: (CosyVoiceFlowConfig, CosyVoiceFlowModel),
    2: (CosyVoice2FlowConfig, CosyVoice2FlowModel),
    3: (CosyVoice3FlowConfig, CosyVoice3FlowModel),
}
TINY_LM = {
    "vocab_size": 640,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PUBLISHED_LM = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
VOCODERS: dict[int, dict] = {
    1: {
        "sampling_rate": 22050,
        "phase_interpolation": "sample",
        "upsample_rates": [8, 8],
        "upsample_kernel_sizes": [16, 16],
        "source_resblock_kernel_sizes": [7, 11],
        "source_resblock_dilation_sizes": [[1, 3, 5]] * 2,
        "overlap_frames": 20,
    },
    2: {},
    3: {},
}


def import_peer(cosyvoice: Path, matcha: Path | None, dependencies: Path | None = None) -> None:
    """Put the checkouts on the path, and a folder with what they import. The language model needs no Matcha-TTS.

    `matcha.utils` imports its trainer, of which only a logger is needed here. Whisper imports numba for timestamps of
    words, which nothing here asks for.
    """
    for checkout, name in ((cosyvoice, "cosyvoice/flow/flow.py"), (matcha, "matcha/models/components/decoder.py")):
        if checkout is not None and not (checkout / name).is_file():
            raise SystemExit(f"{checkout}: not the checkout that is meant (no {name})")
    sys.path[:0] = [str(path) for path in (dependencies, cosyvoice, matcha) if path is not None]
    utils, logger = types.ModuleType("matcha.utils"), types.ModuleType("matcha.utils.pylogger")
    utils.__path__ = []
    logger.get_pylogger = logging.getLogger
    sys.modules |= {"matcha.utils": utils, "matcha.utils.pylogger": logger}
    if importlib.util.find_spec("numba") is None:
        numba = types.ModuleType("numba")
        numba.jit = lambda *arguments, **options: lambda function: function
        sys.modules["numba"] = numba
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


def build_flow(version: int) -> tuple[nn.Module, TokenToMelModel]:
    """Upstream's flow, and ours with its weights."""
    torch.manual_seed(0)
    peer = peer_flow(version).eval()
    config_class, model_class = FLOWS[version]
    model = model_class(config_class()).eval()
    model.load_state_dict(flow_weights.convert_weights(peer.state_dict(), model.config, Path("peer")))
    return peer, model


def build_vocoder(version: int) -> tuple[nn.Module, CosyVoiceHiftModel]:
    """Upstream's vocoder at its published size, and ours with its weights."""
    from cosyvoice.hifigan.f0_predictor import CausalConvRNNF0Predictor, ConvRNNF0Predictor
    from cosyvoice.hifigan.generator import CausalHiFTGenerator, HiFTGenerator

    causal = version == 3
    config = (CosyVoice3HiftConfig if causal else CosyVoiceHiftConfig)(**VOCODERS[version])
    torch.manual_seed(0)
    predictor = (CausalConvRNNF0Predictor if causal else ConvRNNF0Predictor)(1, 80, config.f0_hidden_size)
    peer = (CausalHiFTGenerator if causal else HiFTGenerator)(
        sampling_rate=config.sampling_rate,
        upsample_rates=config.upsample_rates,
        upsample_kernel_sizes=config.upsample_kernel_sizes,
        source_resblock_kernel_sizes=config.source_resblock_kernel_sizes,
        source_resblock_dilation_sizes=config.source_resblock_dilation_sizes,
        f0_predictor=predictor,
    ).eval()
    with torch.no_grad():
        # A voice about 200 Hz.
        predictor.classifier.bias.fill_(200.0)
        predictor.classifier.weight.mul_(100.0)
    ours = (CosyVoice3HiftModel if causal else CosyVoiceHiftModel)(config).eval()
    ours.load_state_dict(vocoder_weights.convert_weights(peer.state_dict(), config, Path("hift.pt")))
    return peer, ours


def peer_lm(version: int, sizes: dict[str, int], speech_size: int) -> nn.Module:
    """Upstream's `Qwen2LM` or `CosyVoice3LM` with random weights."""
    import cosyvoice.llm.llm as upstream
    from cosyvoice.utils.common import ras_sampling

    config = Qwen2Config(
        **sizes,
        tie_word_embeddings=True,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )

    class Encoder(upstream.Qwen2Encoder):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.model = Qwen2ForCausalLM(config)

        def forward_one_step(self, xs, masks, cache=None):
            outputs = self.model(inputs_embeds=xs, output_hidden_states=True, use_cache=True, past_key_values=cache)
            return outputs.hidden_states[-1], outputs.past_key_values

    size = sizes["hidden_size"]
    torch.manual_seed(0)
    kind = upstream.Qwen2LM if version == 2 else upstream.CosyVoice3LM
    return kind(size, size, speech_size, Encoder(), ras_sampling).eval()


def ours_lm(version: int, peer: nn.Module, sizes: dict[str, int], speech_size: int) -> CosyVoiceLmForCausalLM:
    """Our model with the peer's weights, shared as far as their layout is the same."""
    fields = {name: value for name, value in sizes.items() if name != "vocab_size"}
    config = CosyVoiceLmConfig(
        version=version,
        text_vocab_size=sizes["vocab_size"],
        speech_vocab_size=speech_size,
        max_position_embeddings=32768,
        pad_token_id=0,
        **fields,
    )
    weights = lm_weights.convert_weights(dict(peer.state_dict()), config, Path("the peer's weights"))
    with torch.device("meta"):
        model = CosyVoiceLmForCausalLM(config)
    model.load_state_dict(weights, assign=True)
    # Inverse frequencies are no weights.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()
