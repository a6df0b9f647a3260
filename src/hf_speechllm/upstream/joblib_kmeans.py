"""Reading the centres of a k-means model of scikit-learn that `joblib.dump` wrote, without either and without pickle.

A joblib file is a pickle with the raw bytes of each array behind the object that describes it. It is followed without
running anything, see `inert_pickle.py`. zlib-compressed files (`joblib.dump(..., compress=n)`) are read too.
"""

from __future__ import annotations

import io
import math
import reprlib
import zlib
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from .errors import ConversionError, UnsafeArtifactError
from .files import read_bytes
from .inert_pickle import InertObject, read_inert_pickle


MAX_FILE_BYTES = 256 << 20
MAX_CONTENT_BYTES = 512 << 20

_WRAPPER = "joblib.numpy_pickle.NumpyArrayWrapper"
_DTYPES = {
    *("f2", "f4", "f8", "b1"),
    *("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"),
}
_MAX_DIMENSIONS = 8


def read_kmeans_centres(path: str | PathLike[str]) -> torch.Tensor:
    """`cluster_centers_` of a `KMeans` or `MiniBatchKMeans`, float32 `(clusters, width)`.

    Raises:
        UnsafeArtifactError: damaged, of another format, or with numbers that are not finite.
        ConversionError: the file is missing, or holds something else than k-means.
    """
    path = Path(path)
    data = read_bytes(path, MAX_FILE_BYTES)
    if data[:1] == b"\x78":
        data = _inflate(data, path)
    stream = io.BytesIO(data)

    def array_behind(value: InertObject, stream: BinaryIO) -> object:
        return _read_array(value, stream, path) if value.kind == _WRAPPER else value

    content = read_inert_pickle(stream, path, after_build=array_behind)
    kind = content.kind if isinstance(content, InertObject) else type(content).__name__
    if not kind.startswith("sklearn.cluster.") or not kind.endswith("KMeans"):
        raise ConversionError("not a k-means model", file=path, expected="sklearn.cluster …KMeans", actual=kind)
    state = content.state if isinstance(content.state, dict) else {}
    centres = state.get("cluster_centers_")
    if not isinstance(centres, np.ndarray) or centres.ndim != 2 or centres.dtype.kind != "f" or not centres.size:
        raise ConversionError(
            "no centres",
            file=path,
            key="cluster_centers_",
            expected="floats (clusters, width)",
            actual=f"{centres.dtype} {centres.shape}" if isinstance(centres, np.ndarray) else type(centres).__name__,
        )
    centres = torch.from_numpy(np.array(centres, dtype=np.float32))
    if not bool(torch.isfinite(centres).all()):
        raise UnsafeArtifactError("centre is not finite", file=path, key="cluster_centers_", actual="NaN or infinity")
    return centres


def _inflate(data: bytes, path: Path) -> bytes:
    inflater = zlib.decompressobj()
    try:
        content = inflater.decompress(data, MAX_CONTENT_BYTES + 1)
    except zlib.error as error:
        raise UnsafeArtifactError("damaged zlib data", file=path, actual=str(error)) from None
    if len(content) > MAX_CONTENT_BYTES:
        raise UnsafeArtifactError("content is too large", file=path, expected=f"at most {MAX_CONTENT_BYTES} bytes")
    if not inflater.eof:
        raise UnsafeArtifactError("zlib data ends early", file=path)
    return content


def _read_array(wrapper: InertObject, stream: BinaryIO, path: Path) -> np.ndarray:
    """The array that the wrapper describes, from the bytes behind it."""
    state = wrapper.state if isinstance(wrapper.state, dict) else {}
    shape, order = state.get("shape"), state.get("order")
    dtype = _dtype(state.get("dtype"), path)
    if (
        not isinstance(shape, tuple)
        or len(shape) > _MAX_DIMENSIONS
        or not all(type(size) is int and 0 <= size <= MAX_CONTENT_BYTES for size in shape)
        or order not in ("C", "F")
    ):
        raise UnsafeArtifactError(
            "malformed array", file=path, actual=f"shape {reprlib.repr(shape)}, order {reprlib.repr(order)}"
        )
    if state.get("numpy_array_alignment_bytes") is not None:
        padding = stream.read(1)
        stream.seek(padding[0] if padding else 0, io.SEEK_CUR)
    count = math.prod(shape) * dtype.itemsize
    data = stream.read(count) if count <= MAX_CONTENT_BYTES else b""
    if len(data) != count:
        raise UnsafeArtifactError("array ends early", file=path, expected=f"{count} bytes", actual=len(data))
    return np.frombuffer(data, dtype=dtype).reshape(shape, order=order)


def _dtype(value: object, path: Path) -> np.dtype:
    """A plain numeric type from `numpy.dtype('f4', …)` with the state `(3, '<', …)`."""
    if isinstance(value, InertObject) and value.kind == "numpy.dtype" and value.arguments:
        code = value.arguments[0]
        order = value.state[1] if isinstance(value.state, tuple) and len(value.state) > 1 else None
        if isinstance(code, str) and code in _DTYPES and isinstance(order, str) and order in ("<", ">", "|", "="):
            return np.dtype(code).newbyteorder("<" if order == "=" else order)
    raise UnsafeArtifactError("array is not of plain numbers", file=path, expected=sorted(_DTYPES))
