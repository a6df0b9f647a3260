"""Reading `spk2info.pt` of CosyVoice: speakers by name, each a mapping of names to tensors."""

from __future__ import annotations

from os import PathLike

import torch
from torch import Tensor

from .checkpoints import check_archive, check_tensor
from .errors import ConversionError, UnsafeArtifactError
from .files import require_regular_file


MAX_FILE_BYTES = 1 << 30
MAX_SPEAKERS = 100_000


def read_speaker_info(path: str | PathLike[str]) -> dict[str, dict[str, Tensor]]:
    """The tensors of every speaker, by name.

    Raises:
        UnsafeArtifactError: not a file of `torch.save`, callables outside of the allow-list, tensors without storage,
            or values that are not finite.
        ConversionError: the file is missing, or something else is in it.
    """
    path = require_regular_file(path, MAX_FILE_BYTES)
    check_archive(path)
    try:
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # as in `read_state_dict`
        reason = str(error).strip().splitlines() or [""]
        raise UnsafeArtifactError(
            "file cannot be read", file=path, actual=f"{type(error).__name__}: {reason[0]}"
        ) from None
    if not isinstance(content, dict) or len(content) > MAX_SPEAKERS:
        raise ConversionError("not a mapping of speakers", file=path, actual=type(content).__name__)
    speakers: dict[str, dict[str, Tensor]] = {}
    for name, entry in content.items():
        if not isinstance(name, str) or not isinstance(entry, dict):
            raise ConversionError("not a name and its tensors", file=path, key=repr(name), actual=type(entry).__name__)
        for key, value in entry.items():
            if not isinstance(key, str) or not isinstance(value, Tensor):
                raise ConversionError("not a tensor", file=path, key=f"{name}.{key}", actual=type(value).__name__)
            check_tensor(value, path, f"{name}.{key}")
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise UnsafeArtifactError("value is not finite", file=path, key=f"{name}.{key}")
        speakers[name] = {key: value.detach().clone() for key, value in entry.items()}
    return speakers
