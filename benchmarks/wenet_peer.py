"""WeNet from a checkout that the caller names, as the peer to measure against. Nothing of it is part of this project.

WeNet imports packages that its recogniser never calls here (torchaudio, librosa, whisper, ...). Those that are missing
are replaced by empty modules, so that torch and the checkout suffice.
"""

import copy
import importlib.machinery
import importlib.util
import sys
import tempfile
import types
import typing
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import yaml


_UNUSED = (
    "torchaudio",
    "torchaudio.functional",
    "torchaudio.transforms",
    "torchaudio.compliance",
    "torchaudio.compliance.kaldi",
    "librosa",
    "whisper",
    "whisper.tokenizer",
    "langid",
    "deepspeed",
)


class _EmptyModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(typing, name, type(name, (), {}))


def import_wenet(checkout: Path) -> types.ModuleType:
    """Make `wenet.*` importable from `checkout` without running the package's `__init__`.

    Call it after transformers has been imported: the empty modules would look to it like installed packages.
    """
    if not (checkout / "wenet" / "utils" / "init_model.py").is_file():
        raise SystemExit(f"{checkout}: not a checkout of wenet-e2e/wenet (no wenet/utils/init_model.py)")
    for name in _UNUSED:
        root = name.split(".")[0]
        if name not in sys.modules and (root in sys.modules or importlib.util.find_spec(root) is None):
            module = _EmptyModule(name)
            module.__path__ = []
            module.__spec__ = importlib.machinery.ModuleSpec(name, None)
            sys.modules[name] = module
    languages = sys.modules["whisper.tokenizer"]
    if isinstance(languages, _EmptyModule):
        languages.LANGUAGES = {}
    # Old WeNet files import typing names from torch's convolution module, which newer torch no longer re-exports.
    for name in ("Union", "Optional"):
        setattr(torch.nn.modules.conv, name, getattr(typing, name))
    torch.nn.modules.conv.Tensor = torch.Tensor
    package = types.ModuleType("wenet")
    package.__path__ = [str(checkout / "wenet")]
    sys.modules["wenet"] = package
    return importlib.import_module("wenet.utils.init_model")


def build_pair(checkout: Path, **encoder_options: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same random weights as a WeNet model and as ours, through our converter.

    AISHELL's U2++ shape by default: conformer 12 x 256, 4 heads, feed-forward 2048, kernel 8, bitransformer 3 + 3 and
    4233 units; `encoder_options` override keys of `encoder_conf`.
    """
    from convert_wenet import convert_wenet_pack

    from hf_speechllm.models.modeling_wenet_u2pp import WenetU2ppForSpeechRecognition

    init_model = import_wenet(checkout).init_model
    settings = aishell_settings(encoder_options)
    torch.manual_seed(0)
    peer, _ = init_model(Namespace(jit=False), copy.deepcopy(settings))
    with tempfile.TemporaryDirectory(prefix="benchmark-") as work:
        pack = Path(work) / "pack"
        pack.mkdir()
        torch.save(peer.state_dict(), pack / "final.pt")
        (pack / "train.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        units = ["<blank>", "<unk>", "<sos/eos>", *(chr(0x4E00 + i) for i in range(settings["output_dim"] - 3))]
        (pack / "units.txt").write_text("".join(f"{u} {i}\n" for i, u in enumerate(units)), encoding="utf-8")
        convert_wenet_pack(pack, Path(work) / "model")
        ours = WenetU2ppForSpeechRecognition.from_pretrained(Path(work) / "model")
    return peer.eval(), ours.eval()


def aishell_settings(encoder_options: dict[str, Any]) -> dict[str, Any]:
    """A new-style `train.yaml` of AISHELL's U2++ recipe."""
    return {
        "input_dim": 80,
        "output_dim": 4233,
        "vocab_size": 4233,
        "encoder": "conformer",
        "encoder_conf": {
            "output_size": 256,
            "attention_heads": 4,
            "linear_units": 2048,
            "num_blocks": 12,
            "dropout_rate": 0.1,
            "positional_dropout_rate": 0.1,
            "attention_dropout_rate": 0.1,
            "input_layer": "conv2d",
            "normalize_before": True,
            "cnn_module_kernel": 8,
            "use_cnn_module": True,
            "activation_type": "swish",
            "pos_enc_layer_type": "rel_pos",
            "selfattention_layer_type": "rel_selfattn",
            "causal": True,
            "use_dynamic_chunk": True,
            "cnn_module_norm": "layer_norm",
            "use_dynamic_left_chunk": False,
            **encoder_options,
        },
        "decoder": "bitransformer",
        "decoder_conf": {
            "attention_heads": 4,
            "linear_units": 2048,
            "num_blocks": 3,
            "r_num_blocks": 3,
            "dropout_rate": 0.1,
            "positional_dropout_rate": 0.1,
            "self_attention_dropout_rate": 0.1,
            "src_attention_dropout_rate": 0.1,
        },
        "tokenizer": "char",
        "tokenizer_conf": {
            "symbol_table_path": "units.txt",
            "split_with_space": False,
            "bpe_path": None,
            "non_lang_syms_path": None,
            "is_multilingual": False,
            "num_languages": 1,
            "special_tokens": {"<blank>": 0, "<unk>": 1, "<sos>": 2, "<eos>": 2},
        },
        "ctc": "ctc",
        "ctc_conf": {"ctc_blank_id": 0},
        "model": "asr_model",
        "model_conf": {"ctc_weight": 0.3, "lsm_weight": 0.1, "length_normalized_loss": False, "reverse_weight": 0.3},
        "dataset": "asr",
        "dataset_conf": {"fbank_conf": {"num_mel_bins": 80, "frame_length": 25, "frame_shift": 10, "dither": 0.1}},
    }
