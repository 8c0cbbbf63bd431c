"""Codecs: named arrays to bytes and back, without pickle.

| codec   | numbers                                                  | bytes per number | error           |
| float32 | as they are                                              | 4                | none            |
| float16 | rounded to nearest                                       | 2                | 2^-11 relative  |
| int8    | rounded to a multiple of a float16 scale, one per neuron | 1                | half a scale    |
| latent  | rounded to a multiple of a float16 scale, one per row    | about 0.6        | half a scale    |

A scale is the largest magnitude that it covers divided by 127, by 31 for latents, whose numbers are then deflated:
few values are large, so that they take less than the six bits of a number. Integer arrays keep their values in
the smallest type that holds them. The bytes are those of a safetensors file: a header with names,
types and shapes, then the numbers; a scale is stored beside its array, with the axes that it spans
kept as 1, so that bytes explain themselves. `NAME.deflate` holds the numbers of the array `NAME` deflated.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from knowstore.config import Codec
from knowstore.errors import BankError

_SCALE, _DEFLATED = ".scale", ".deflate"
_INT8_STEPS, _LATENT_STEPS = 127, 31  # on either side of zero
_MOST_INFLATED = 1 << 28  # bytes of one expert
_NEURON_AXIS = {"up": 1, "up1": 1, "dw1": 1, "down": 0, "up2": 0, "dw2": 0}  # of the R neurons in (D, R) or (R, D)
_HALF_MAX, _SINGLE_MAX = float(np.finfo(np.float16).max), float(np.finfo(np.float32).max)
_DIVERGED = "make the expert again; its hypernetwork diverged"

Array = npt.NDArray[Any]


def check_codec(codec: str, form: str) -> None:
    """Raise BankError unless `codec` exists and suits experts of this form."""
    if codec not in get_args(Codec):
        raise _refused(f"codec is {codec!r}", f"use one of {', '.join(get_args(Codec))}")
    if codec == "latent" and form != "latent":
        raise _refused(
            f"codec latent cannot hold an expert in the form {form!r}",
            "use a hypernetwork that gives latents, or another codec",
        )


def encode(arrays: Mapping[str, Array], codec: Codec) -> bytes:
    """Named arrays as self-describing bytes, the same bytes for the same numbers.

    Args:
        arrays: floating or integer arrays of any shape; a name must not end in `.scale` or `.deflate`.
        codec: how floating numbers are kept.

    Raises:
        BankError: numbers that are NaN, infinite or too large for the codec, or an array of another type.
    """
    encoded: dict[str, Array] = {}
    for name, array in arrays.items():
        if name.endswith((_SCALE, _DEFLATED)):
            raise _refused(f"an array is named {name!r}", f"use a name that does not end in {_SCALE} or {_DEFLATED}")
        if np.issubdtype(array.dtype, np.integer):
            encoded[name] = np.asarray(_smallest(array), order="C")
        elif np.issubdtype(array.dtype, np.floating):
            encoded |= _encode_floats(name, array, codec)
        else:
            raise _refused(f"array {name!r} is of type {array.dtype}", "use floating or integer numbers")
    return save(encoded)


def decode(data: bytes) -> dict[str, Array]:
    """The arrays that `encode` was given: floats as float32, integers as int64, in arrays of their own.

    Raises:
        BankError: bytes that `encode` did not write, or numbers that are not finite.
    """
    try:
        stored = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise _damaged(str(error)) from error
    decoded: dict[str, Array] = {}
    n_inflated = 0
    for name, array in stored.items():
        if name.endswith(_SCALE):
            continue
        if name.endswith(_DEFLATED):
            name = name.removesuffix(_DEFLATED)
            array = _inflated(name, array, stored.get(name + _SCALE), _MOST_INFLATED - n_inflated)
            n_inflated += array.nbytes
        scale = stored.get(name + _SCALE)
        if scale is not None:
            decoded[name] = _scaled(name, array, scale)
        elif np.issubdtype(array.dtype, np.floating):
            decoded[name] = _as_float32(array)
        else:
            decoded[name] = array.astype(np.int64)
        if not np.isfinite(decoded[name]).all():
            raise _damaged(f"array {name!r} holds numbers that are not finite")
    return decoded


def _encode_floats(name: str, array: Array, codec: Codec) -> dict[str, Array]:
    if not np.isfinite(array).all():
        raise _refused(f"array {name!r} holds NaN or infinity", _DIVERGED)
    largest = float(np.abs(array).max(initial=0.0))
    if codec == "float32":
        if largest > _SINGLE_MAX:
            raise _refused(f"array {name!r} reaches {largest:.6g}, float32 ends at {_SINGLE_MAX:.6g}", _DIVERGED)
        return {name: np.asarray(array, np.float32, order="C")}
    if codec == "float16":
        if largest > _HALF_MAX:
            raise _refused(f"array {name!r} reaches {largest:.6g}, float16 ends at {_HALF_MAX:.0f}", "use float32")
        return {name: np.asarray(array, np.float16, order="C")}
    steps = _LATENT_STEPS if codec == "latent" else _INT8_STEPS
    if largest / steps > _HALF_MAX:
        raise _refused(f"array {name!r} reaches {largest:.6g}, too large for a float16 scale", "use codec float32")
    kept_axis = _NEURON_AXIS.get(name) if codec == "int8" and array.ndim == 2 else None
    spanned = -1 if kept_axis is None else 1 - kept_axis
    scale = _scales(array, spanned, steps)
    numbers = np.rint(array / np.where(scale == 0, np.float32(1), scale.astype(np.float32)))
    numbers = np.asarray(np.clip(numbers, -steps, steps).reshape(array.shape), np.int8, order="C")
    scales = {name + _SCALE: np.asarray(scale, order="C")}
    if codec != "latent" or not array.ndim or not array.size:
        return {name: numbers} | scales
    return {name + _DEFLATED: np.frombuffer(zlib.compress(numbers.tobytes(), 9), np.uint8)} | scales


def _inflated(name: str, data: Array, scale: Array | None, max_bytes: int) -> npt.NDArray[np.int8]:
    """The numbers that were deflated; all axes but the last are those of their scale."""
    try:
        inflate = zlib.decompressobj()
        numbers = np.frombuffer(inflate.decompress(data.tobytes(), max(max_bytes, 1)), np.int8)
        if scale is None or not inflate.eof:
            raise ValueError("its scale or its end is missing")
        return numbers.reshape(*scale.shape[:-1], -1)
    except (zlib.error, ValueError) as error:
        raise _damaged(f"array {name!r} cannot be inflated: {error}") from error


def _scales(array: Array, axis: int, steps: int) -> npt.NDArray[np.float16]:
    """One scale for all numbers along `axis`, rounded up so that none of them is clipped."""
    array = np.atleast_1d(array)
    exact = np.abs(array).max(axis=axis, keepdims=True, initial=0.0) / steps
    scale = exact.astype(np.float16)
    above: npt.NDArray[np.float16] = np.nextafter(scale, np.float16(np.inf))
    return np.where(scale < exact, above, scale)


def _as_float32(array: Array) -> npt.NDArray[np.float32]:
    """As `astype` does it; half precision by torch, which takes a thirtieth of the time."""
    if array.dtype != np.float16:
        return array.astype(np.float32)
    widened: npt.NDArray[np.float32] = torch.from_numpy(array).float().numpy()
    return widened


def _scaled(name: str, numbers: Array, scale: Array) -> npt.NDArray[np.float32]:
    try:
        scale = np.broadcast_to(scale.astype(np.float32), np.shape(np.atleast_1d(numbers)))
        return np.multiply(numbers, scale, dtype=np.float32).reshape(numbers.shape)
    except ValueError as error:
        raise _damaged(f"array {name!r} is {numbers.shape}, its scale {scale.shape}") from error


def _smallest(array: Array) -> Array:
    if array.size == 0:
        return array.astype(np.int8)
    low, high = int(array.min()), int(array.max())
    for kind in (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64):
        limits = np.iinfo(kind)
        if limits.min <= low and high <= limits.max:
            return array.astype(kind)
    raise _refused(f"an integer array reaches {high}", "use integers below 2^63")


def _refused(what: str, fix: str) -> BankError:
    return BankError(what, kept="the bank is as it was", fix=fix)


def _damaged(problem: str) -> BankError:
    return BankError(
        f"stored bytes are not an encoded expert: {problem}",
        kept="the bank is as it was; the other experts can be used",
        fix="run `knowstore verify --repair`, or remove the passage and ingest it again",
    )
