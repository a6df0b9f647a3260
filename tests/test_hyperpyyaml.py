"""Reading HyperPyYAML: what a file would build is described, and nothing is run."""

from pathlib import Path

import pytest

from hf_speechllm.upstream.errors import ConversionError, UnsafeArtifactError
from hf_speechllm.upstream.hyperpyyaml import Call, read_hyperpyyaml


def read(tmp_path: Path, text: str) -> dict[str, object]:
    path = tmp_path / "pack.yaml"
    path.write_text(text, encoding="utf-8")
    return read_hyperpyyaml(path)


def test_calls_and_references_become_data(tmp_path):
    content = read(
        tmp_path,
        """
rate: 24000
chunk: 25
seed: !apply:torch.manual_seed [1986]
mel: !name:matcha.utils.audio.mel_spectrogram
    sampling_rate: !ref <rate>
    hop_size: !ref <rate> // 50
flow: !new:cosyvoice.flow.Flow
    sigma: 1e-06
    answer: no
    mel: !ref <mel>
    size: !ref <chunk> * (2 + <chunk>) - 1
    half: !ref <rate> / 2
    nested: !ref <inner[deep][value]>
inner: {deep: {value: [3, !ref <chunk>]}}
reader: !name:cosyvoice.dataset.opener
""",
    )
    assert content["seed"] == Call("apply", "torch.manual_seed", [1986])
    mel = Call("name", "matcha.utils.audio.mel_spectrogram", {"sampling_rate": 24000, "hop_size": 480})
    assert content["mel"] == mel and mel.name == "mel_spectrogram"
    assert content["flow"].arguments == {
        # yaml 1.2, as upstream reads it: a number without a point, and no is a word.
        **{"sigma": 1e-6, "answer": "no", "mel": mel, "size": 25 * 27 - 1, "half": 12000.0, "nested": [3, 25]},
    }
    assert content["reader"] == Call("name", "cosyvoice.dataset.opener", {})


def test_a_value_may_refer_to_a_later_one(tmp_path):
    assert read(tmp_path, "a: !ref <b>\nb: !ref <c> + 1\nc: 2\n")["a"] == 3


# Nine levels of twenty aliases each.
BOMB = "x: &x [1, 1]\n" + "".join(
    f"y{level}: &y{level} [{', '.join([f'*y{level - 1}' if level else '*x'] * 20)}]\n" for level in range(9)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!python/object/apply:os.system [ls]", "tag is not plain data"),
        ("a: !include:other.yaml", "tag is not plain data"),
        ("a: !new:os.system; ls", "tag is not plain data"),
        ("a: !new:x.Y 3", "arguments of a tag"),
        ("a: !ref [b]", "reference is not text"),
        ("a: !ref <a>", "contains itself"),
        ("a: !ref <b> + 1\nb: !ref <a>", "contains itself"),
        ("a: 1\na: 2", "key occurs twice"),
        ("a: &x [1, *x]", "contains itself"),
        (BOMB, "expand too far"),
    ],
)
def test_hostile_files_are_refused(tmp_path, text, message):
    with pytest.raises(UnsafeArtifactError, match=message):
        read(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "a: !ref <missing>",
            "a: !ref <b[missing]>\nb: {c: 1}",
            "a: !ref <b> + 1\nb: word",
            "a: !ref <b> ** 9\nb: 9",
        ),
        *("a: !ref __import__('os')", "a: !ref <b>.real\nb: 1", "a: !ref 1 / <b>\nb: 0", "a: !ref <b> * <b>\nb: 1e9"),
        *("[1, 2]", "a: !ref <b> + 1\nb: true"),
    ],
)
def test_contradictions_are_named(tmp_path, text):
    with pytest.raises(ConversionError):
        read(tmp_path, text)


def test_references_do_not_copy(tmp_path):
    """Twelve levels of twenty references each would be 20 ** 12 values if each were a copy."""
    lines = ["v0: [1]"] + [f"v{n}: [{', '.join([f'!ref <v{n - 1}>'] * 20)}]" for n in range(1, 13)]
    content = read(tmp_path, "\n".join(lines))
    assert content["v12"][0] is content["v12"][19]
