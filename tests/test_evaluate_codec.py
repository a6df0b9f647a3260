"""The evaluation of a codec: each figure against the same, computed by hand."""

import json
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from tiny_speechtokenizer import tiny_codec, waves

from hf_speechllm.train.mel_loss import MultiScaleMelLoss


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))
try:
    import evaluate_codec
finally:
    sys.path.remove(str(ROOT / "training"))

RECOGNISER = str(ROOT / "pretrained" / "u2pp_moe_digits")
LENGTHS = (5000, 2500, 900)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A codec, and recordings of noise of which the last has no frame of a spectrogram."""
    root = tmp_path_factory.mktemp("codec")
    tiny_codec().save_pretrained(root / "codec")
    lines = []
    for number, wave in enumerate(waves(*LENGTHS)):
        soundfile.write(root / f"{number}.wav", wave.numpy(), 16000, subtype="FLOAT")
        lines.append(json.dumps({"audio": f"{number}.wav", "text": "one two"}))
    (root / "data.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


def test_figures(folder, capsys):
    output = folder / "out" / "codec.json"
    evaluate_codec.main(
        [
            *(str(folder / "codec"), str(folder / "data.jsonl"), "--recogniser", RECOGNISER),
            *("--trust_remote_code", "--output", str(output)),
        ]
    )
    found = json.loads(output.read_text())
    assert json.loads(capsys.readouterr().out) == found
    assert found["recordings"] == 3 and found["audio_seconds"] == 0.5
    assert found["wer_of_recordings"] > 0 and {f"levels_{number}" for number in (1, 2, 3)} <= found.keys()

    codec, loss, recorded = tiny_codec(), MultiScaleMelLoss(), waves(*LENGTHS)
    for number in (1, 2, 3):
        figures, decoded, used = found[f"levels_{number}"], [], set()
        with torch.no_grad():
            for wave in recorded:
                codes = codec.encode(wave[None]).audio_codes[:, :number]
                decoded.append(codec.decode(codes).audio_values[0, 0, : len(wave)])
                used |= set(codes[0, -1].tolist())
        pairs = list(zip(recorded, decoded, strict=True))[:2]
        distances = [float(loss.scales(real[None], fake[None])[0]) for real, fake in pairs]
        assert figures["mel"] == pytest.approx(sum(distances) / 2, abs=1e-4)
        energies = [float(torch.cat(signals).square().mean()) for signals in (decoded, recorded)]
        assert figures["loudness"] == pytest.approx((energies[0] / energies[1]) ** 0.5, abs=1e-3)
        assert figures["codebook_use"] == pytest.approx(len(used) / 16, abs=1e-3)
        assert figures["bits_per_second"] == 2000 * number * 4 and 0 <= figures["wer"] <= 500


def test_levels_that_are_not_there(folder):
    with pytest.raises(SystemExit):
        evaluate_codec.main(
            [str(folder / "codec"), str(folder / "data.jsonl"), "--recogniser", RECOGNISER, "--levels", "4"]
        )
