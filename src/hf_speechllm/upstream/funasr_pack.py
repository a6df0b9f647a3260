"""The folder of a FunASR model: which file is which, the token table and the segmentation dictionary.

`configuration.json` maps keys of `config.yaml` to files of the folder under `file_path_metas`; a folder without it, or
an old release, is read by the toolkit's fixed file names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path, PurePosixPath

from .errors import ConversionError, UnsafeArtifactError
from .files import read_utf8, require_regular_file
from .json_config import read_json
from .yaml_config import read_yaml_mapping


MAX_TOKENS_BYTES = 32 << 20
MAX_TOKENS = 1_000_000
MAX_SEG_DICT_BYTES = 64 << 20
MAX_SEG_DICT_LINES = 2_000_000
MAX_PACK_FILE_BYTES = 64 << 30

# What the toolkit looks for where `configuration.json` says nothing; the first name that exists is taken.
_FIXED_NAMES = {
    "init_param": ("model.pt", "model.pb"),
    "config": ("config.yaml",),
    "frontend_conf.cmvn_file": ("am.mvn",),
    "tokenizer_conf.token_list": ("tokens.json", "tokens.txt"),
    "tokenizer_conf.seg_dict_file": ("seg_dict",),
    "tokenizer_conf.bpemodel": ("bpe.model",),
}


@dataclass(frozen=True)
class FunasrPack:
    """An opened folder.

    Args:
        directory: the folder.
        files: dotted key (`"init_param"`, `"frontend_conf.cmvn_file"`, …) → existing regular file of the folder.
        config: `config.yaml` as plain data.
    """

    directory: Path
    files: dict[str, Path]
    config: dict[str, object]

    @property
    def config_path(self) -> Path:
        """`config.yaml`, for messages."""
        return self.files["config"]

    @property
    def model_name(self) -> str:
        """The class that `config.yaml` names under `model`. Names of releases and aliases mean nothing."""
        name = self.config.get("model")
        if not isinstance(name, str):
            raise ConversionError("no model is named", file=self.config_path, key="model", actual=repr(name))
        return name

    def file(self, key: str) -> Path:
        """The file under the dotted `key`.

        Raises:
            ConversionError: the folder has no such file.
        """
        if key not in self.files:
            raise ConversionError(
                "file of the pack is missing", file=self.directory, key=key, expected=" or ".join(_FIXED_NAMES[key])
            )
        return self.files[key]


def open_funasr_pack(directory: str | PathLike[str]) -> FunasrPack:
    """Finds the files of a FunASR model folder and parses its `config.yaml`.

    A file that `configuration.json` names and that does not exist is skipped, as the toolkit does.

    Raises:
        UnsafeArtifactError: `configuration.json` is malformed, or names something outside of the folder or something
            that is not a regular file.
        ConversionError: the folder, `config.yaml` or the weights are missing.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ConversionError("pack is not a directory", file=directory)
    files: dict[str, Path] = {}
    description = directory / "configuration.json"
    if description.exists():
        content = read_json(description)
        metas = content.get("file_path_metas", {}) if isinstance(content, dict) else None
        if not isinstance(metas, dict):
            raise UnsafeArtifactError("not a mapping", file=description, key="file_path_metas", expected="mapping")
        for key, name in _flatten(metas, description):
            path = _file_of_pack(directory, name, description, key)
            if path is not None:
                files[key] = path
    if "tokenizer_conf.seg_dict" in files:  # the tokenizer accepts either key
        files.setdefault("tokenizer_conf.seg_dict_file", files.pop("tokenizer_conf.seg_dict"))
    for key, names in _FIXED_NAMES.items():
        for name in names:
            path = _file_of_pack(directory, name, description, key)
            if path is not None:
                files.setdefault(key, path)
                break
    for key in ("config", "init_param"):
        if key not in files:
            raise ConversionError(
                "file of the pack is missing", file=directory, key=key, expected=" or ".join(_FIXED_NAMES[key])
            )
    return FunasrPack(directory, files, read_yaml_mapping(files["config"]))


def read_token_list(path: str | PathLike[str]) -> dict[str, int]:
    """Token → id from `tokens.json` (a list of strings) or `tokens.txt` (a token per line).

    Raises:
        UnsafeArtifactError: bad encoding, too large, or not of that form.
        ConversionError: a token is empty or occurs twice.
    """
    path = Path(path)
    if path.suffix == ".json":
        tokens = read_json(path, MAX_TOKENS_BYTES)
        if not isinstance(tokens, list):
            raise UnsafeArtifactError("not a list of tokens", file=path, actual=type(tokens).__name__)
    else:
        tokens = [line.rstrip() for line in read_utf8(path, MAX_TOKENS_BYTES).removesuffix("\n").split("\n")]
    if not 0 < len(tokens) <= MAX_TOKENS:
        raise UnsafeArtifactError("number of tokens", file=path, expected=f"1..{MAX_TOKENS}", actual=len(tokens))
    table: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if not isinstance(token, str):
            raise UnsafeArtifactError("token is not a string", file=path, key=str(index), actual=repr(token))
        if not token or not token.isprintable() and not token.isspace():
            raise ConversionError("token is empty or not printable", file=path, key=str(index), actual=repr(token))
        if token in table:
            raise ConversionError("token occurs twice", file=path, key=token, actual=f"{table[token]}, {index}")
        table[token] = index
    return table


def write_token_list(tokens: dict[str, int]) -> str:
    """The text of a `tokens.json`, tokens in the order of their ids."""
    ordered = sorted(tokens, key=tokens.__getitem__)
    return "[\n" + ",\n".join(json.dumps(token, ensure_ascii=False) for token in ordered) + "\n]"


def read_seg_dict(path: str | PathLike[str]) -> dict[str, tuple[str, ...]]:
    """Word → tokens from lines of `word token token …`. A later line replaces an earlier one, as in the toolkit.

    Raises:
        UnsafeArtifactError: bad encoding, too large, or an empty line.
    """
    table: dict[str, tuple[str, ...]] = {}
    lines = read_utf8(path, MAX_SEG_DICT_BYTES).removesuffix("\n").split("\n")
    if len(lines) > MAX_SEG_DICT_LINES:
        raise UnsafeArtifactError("too many lines", file=path, expected=f"at most {MAX_SEG_DICT_LINES}")
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields:
            raise UnsafeArtifactError("line is empty", file=path, key=f"line {number}", expected="word token token …")
        table[fields[0]] = tuple(fields[1:])
    return table


def write_seg_dict(words: dict[str, tuple[str, ...]]) -> str:
    """The text of a `seg_dict`."""
    return "".join(f"{' '.join((word, *tokens))}\n" for word, tokens in words.items())


def _flatten(metas: dict[str, object], path: Path, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, str]]:
    """(dotted key, file name) of a nested mapping; of a list of names the first is meant."""
    if depth > 4:
        raise UnsafeArtifactError("nested too deeply", file=path, key=prefix)
    for key, value in metas.items():
        if isinstance(value, str):
            yield f"{prefix}{key}", value
        elif isinstance(value, dict):
            yield from _flatten(value, path, f"{prefix}{key}.", depth + 1)
        else:
            raise UnsafeArtifactError(
                "not a file name", file=path, key=f"{prefix}{key}", expected="text", actual=type(value).__name__
            )


def _file_of_pack(directory: Path, name: str, source: Path, key: str) -> Path | None:
    """The regular file `name` of the folder, or `None` when there is none.

    Links may only lead to another file of the folder, or to a blob of the download cache that the folder is a snapshot
    of (`…/snapshots/REVISION` beside `…/blobs`).
    """
    relative = PurePosixPath(name)
    if not name or "\0" in name or "\\" in name or relative.is_absolute() or ".." in relative.parts:
        raise UnsafeArtifactError("file name leads out of the pack", file=source, key=key, actual=repr(name))
    path = directory.joinpath(*relative.parts)
    if not path.exists():
        if path.is_symlink():
            raise UnsafeArtifactError("dangling link", file=path, key=key)
        return None
    root = directory.resolve()
    target = path.resolve()
    blobs = root.parent.parent / "blobs"
    in_cache = root.parent.name == "snapshots" and target.is_relative_to(blobs)
    if not target.is_relative_to(root) and not in_cache:
        raise UnsafeArtifactError("link leads out of the pack", file=path, key=key, actual=target)
    return require_regular_file(path, MAX_PACK_FILE_BYTES)
