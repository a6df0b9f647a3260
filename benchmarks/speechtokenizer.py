"""SpeechTokenizer at its published size against upstream's own code: encoding and decoding with the same weights."""

import importlib
import json
import sys
import tempfile
import types
from pathlib import Path

import torch
from timing import Comparison, compare
from torch import Tensor, nn

from hf_speechllm.models.modeling_speechtokenizer import SpeechTokenizerModel


SECONDS, RATE = 2, 16000
# What upstream's `config/spt_base_cfg.json` says of the model.
SETTINGS = {
    "n_filters": 64,
    "strides": [8, 5, 4, 2],
    "dimension": 1024,
    "semantic_dimension": 768,
    "bidirectional": True,
    "dilation_base": 2,
    "residual_kernel_size": 3,
    "n_residual_layers": 1,
    "lstm_layers": 2,
    "activation": "ELU",
    "codebook_size": 1024,
    "n_q": 8,
    "sample_rate": RATE,
}


def import_speechtokenizer(checkout: Path) -> type[nn.Module]:
    """`SpeechTokenizer` of the package in `checkout`, whose `__init__` would import the trainer and all it needs."""
    package = checkout / "speechtokenizer"
    if not (package / "model.py").is_file():
        raise SystemExit(f"{checkout}: not a checkout of SpeechTokenizer (no speechtokenizer/model.py)")
    module = types.ModuleType("speechtokenizer")
    module.__path__ = [str(package)]
    sys.modules["speechtokenizer"] = module
    return importlib.import_module("speechtokenizer.model").SpeechTokenizer


def build_pair(checkout: Path) -> tuple[nn.Module, SpeechTokenizerModel]:
    """The same random weights upstream and, through our converter, as our model."""
    from convert_speechtokenizer import convert_speechtokenizer_pack

    torch.manual_seed(0)
    peer = import_speechtokenizer(checkout)(SETTINGS).eval()
    for layer in peer.quantizer.vq.layers:
        layer._codebook.inited.fill_(1)
        layer._codebook.embed.normal_(std=0.05)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as work:
        pack = Path(work) / "pack"
        pack.mkdir()
        (pack / "config.json").write_text(json.dumps(SETTINGS), encoding="utf-8")
        torch.save(peer.state_dict(), pack / "SpeechTokenizer.pt")
        convert_speechtokenizer_pack(pack, Path(work) / "model")
        ours = SpeechTokenizerModel.from_pretrained(Path(work) / "model").eval()
    return peer, ours


def speechtokenizer(checkout: Path) -> list[Comparison]:
    """Encode and decode, as loaded and with folded weight norm; decoding a stream of 200 ms pieces."""
    peer, ours = build_pair(checkout)
    results = []
    with torch.inference_mode():
        inputs = {}
        for batch in (1, 8):
            audio = 0.1 * torch.randn(batch, 1, SECONDS * RATE, generator=torch.Generator().manual_seed(0))
            codes = peer.encode(audio)
            assert torch.equal(ours.encode(audio).audio_codes.transpose(0, 1), codes)
            difference = ours.decode(codes.transpose(0, 1)).audio_values - peer.decode(codes)
            assert difference.abs().max() < 1e-4
            inputs[batch] = (audio, codes)
        for folded in (False, True):
            if folded:
                ours.remove_weight_norm()
            for batch, (audio, codes) in inputs.items():
                name = f"SpeechTokenizer, {SECONDS} s, batch {batch}{', folded' if folded else ''}"
                rows: Tensor = codes.transpose(0, 1)
                results.append(
                    compare(
                        f"{name}, encode", "", lambda a=audio: peer.encode(a), lambda a=audio: ours.encode(a), runs=3
                    )
                )
                results.append(
                    compare(
                        f"{name}, decode", "", lambda c=codes: peer.decode(c), lambda r=rows: ours.decode(r), runs=3
                    )
                )

        rows = inputs[1][1].transpose(0, 1)

        def decode_by_pieces() -> Tensor:
            """Upstream decodes only wholes: a stream means to decode all codes so far, every 200 ms."""
            for end in range(10, rows.shape[-1] + 1, 10):
                audio = peer.decode(inputs[1][1][..., :end])
            return audio

        def stream() -> Tensor:
            state, pieces = None, []
            for start in range(0, rows.shape[-1], 10):
                is_last = start + 10 >= rows.shape[-1]
                piece, state = ours.decode_stream(rows[..., start : start + 10], state, is_last=is_last)
                pieces.append(piece)
            return torch.cat(pieces, dim=-1)

        assert (stream() - decode_by_pieces()).abs().max() < 1e-4
        name = f"SpeechTokenizer, {SECONDS} s in pieces of 200 ms, streamed decoding (upstream: all so far, again)"
        results.append(compare(name, "", decode_by_pieces, stream, runs=3))
    return results
