"""Codecs: what comes back, how exactly, and what is refused."""

from __future__ import annotations

import tracemalloc
import zlib

import numpy as np
import pytest
from safetensors.numpy import save

from knowstore.bank import StoredExpert, decode, encode
from knowstore.bank import codec as codec_module
from knowstore.errors import BankError, ExpertShapeError

D, R = 24, 6


def _factors(seed: int = 0, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"up1": (D, R), "up2": (R, D), "dw1": (D, R), "dw2": (R, D)}
    return {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def test_float32_comes_back_bit_for_bit() -> None:
    arrays = _factors()
    decoded = decode(encode(arrays, "float32"))
    assert decoded.keys() == arrays.keys()
    assert all(np.array_equal(decoded[name], arrays[name]) for name in arrays)


def test_float16_comes_back_within_its_rounding() -> None:
    arrays = _factors()
    decoded = decode(encode(arrays, "float16"))
    assert all(decoded[name].dtype == np.float32 for name in arrays)
    assert all(np.abs(decoded[name] - arrays[name]).max() <= np.abs(arrays[name]).max() * 2**-11 for name in arrays)


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e-3, 1.0, 1e4])
def test_int8_errs_by_at_most_half_a_scale_of_each_neuron(scale: float) -> None:
    arrays = _factors(scale=scale)
    decoded = decode(encode(arrays, "int8"))
    for name, array in arrays.items():
        span = 0 if name in ("up1", "dw1") else 1  # the axis along D
        largest = np.abs(array).max(axis=span, keepdims=True)
        half_step = (largest / 127 * (1 + 2**-10) + 6e-8) / 2  # a float16 scale, rounded up
        assert (np.abs(decoded[name] - array) <= half_step * (1 + 1e-5)).all()


def test_int8_gives_each_neuron_its_own_scale_even_when_shapes_are_square() -> None:
    up = np.ones((R, R), np.float32)
    up[:, 0] = 1000.0
    decoded = decode(encode({"up": up, "down": up.T.copy()}, "int8"))
    np.testing.assert_allclose(decoded["up"], up, rtol=1e-3)
    np.testing.assert_allclose(decoded["down"], up.T, rtol=1e-3)


def test_int8_keeps_zeros_and_signs() -> None:
    array = np.array([[0.0, 0.0], [-1.0, 1.0]], np.float32)
    np.testing.assert_allclose(decode(encode({"down": array}, "int8"))["down"], array, rtol=1e-3)


def test_latent_keeps_integers_exactly_and_codes_within_half_a_scale() -> None:
    rng = np.random.default_rng(1)
    codes = rng.standard_normal((7, 128)).astype(np.float32)
    ids = np.array([0, 49151, 5], np.int32)
    data = encode({"codes": codes, "ids": ids}, "latent")
    decoded = decode(data)
    assert decoded["ids"].tolist() == [0, 49151, 5]
    steps = np.abs(codes).max(axis=1, keepdims=True) / 31
    assert (np.abs(decoded["codes"] - codes) <= steps * 0.501).all()
    assert len(data) < 0.75 * 7 * 128 + 400


def test_latents_that_were_written_with_a_byte_a_number_can_still_be_read() -> None:
    numbers, scale = np.array([[-127, 3], [64, 127]], np.int8), np.array([[0.5], [0.25]], np.float16)
    decoded = decode(save({"codes": numbers, "codes.scale": scale}))["codes"]
    assert decoded.tolist() == [[-63.5, 1.5], [16.0, 31.75]]


@pytest.mark.parametrize("deflated", [b"", b"no such stream", zlib.compress(bytes(12))[:-6], zlib.compress(bytes(7))])
def test_latents_that_cannot_be_inflated_are_refused(deflated: bytes) -> None:
    scale = np.ones((3, 1), np.float16)
    stored = save({"codes.deflate": np.frombuffer(deflated, np.uint8), "codes.scale": scale})
    with pytest.raises(BankError, match="'codes' cannot be inflated"):
        decode(stored)


def test_latents_that_would_fill_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = np.zeros((40, 40), np.float32)
    data = encode({"codes": codes}, "latent")
    several = encode({"a": codes, "b": codes}, "latent")
    monkeypatch.setattr(codec_module, "_MOST_INFLATED", 1700)
    with pytest.raises(BankError, match="cannot be inflated"):
        decode(several)
    decode(data)
    monkeypatch.setattr(codec_module, "_MOST_INFLATED", 1000)
    with pytest.raises(BankError, match="'codes' cannot be inflated"):
        decode(data)


@pytest.mark.parametrize("numbers", [np.ones((3000, 1), np.int8), np.ones(1, np.int8)])
def test_numbers_do_not_grow_with_their_scale(numbers: np.ndarray) -> None:
    data = save({"up": numbers, "up.scale": np.ones((1, 3000), np.float16)})
    tracemalloc.start()
    try:
        with pytest.raises(BankError, match="its scale"):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000  # all combinations would take 36 MB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("codec", ["float32", "float16", "int8", "latent"])
@pytest.mark.parametrize("shape", [(), (5,), (0, 4), (4, 0), (2, 3, 4)])
def test_arrays_of_any_shape_come_back_in_that_shape(codec: str, shape: tuple[int, ...]) -> None:
    array = np.full(shape, 0.5, np.float64)
    decoded = decode(encode({"codes": array}, codec))["codes"]  # type: ignore[arg-type]
    assert decoded.shape == shape
    np.testing.assert_allclose(decoded, array, rtol=1e-2)


@pytest.mark.parametrize("low_high", [(0, 255), (-1, 127), (-1, 200), (0, 2**40), (-(2**63), 2**63 - 1)])
def test_integers_keep_their_values(low_high: tuple[int, int]) -> None:
    decoded = decode(encode({"ids": np.array(low_high, np.int64)}, "latent"))["ids"]
    assert decoded.tolist() == list(low_high)


def test_the_same_numbers_give_the_same_bytes() -> None:
    arrays = _factors()
    reordered = dict(reversed(arrays.items()))
    strided = {name: np.asfortranarray(array) for name, array in arrays.items()}
    assert encode(arrays, "int8") == encode(reordered, "int8") == encode(strided, "int8")


@pytest.mark.parametrize("codec", ["float32", "float16", "int8", "latent"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(codec: str, bad: float) -> None:
    with pytest.raises(BankError, match="NaN or infinity"):
        encode({"up": np.array([[1.0, bad]], np.float32)}, codec)  # type: ignore[arg-type]


def test_numbers_beyond_float16_are_refused_with_the_number_named() -> None:
    with pytest.raises(BankError, match=r"1e\+300, float32 ends at 3.40282e\+38"):
        encode({"up": np.array([1e300, 1.0])}, "float32")
    with pytest.raises(BankError, match="70000, float16 ends at 65504"):
        encode({"up": np.array([[7e4]], np.float32)}, "float16")
    with pytest.raises(BankError, match="too large for a float16 scale"):
        encode({"up": np.array([[1e9]], np.float32)}, "int8")


def test_arrays_that_are_not_numbers_are_refused() -> None:
    with pytest.raises(BankError, match="of type bool"):
        encode({"up": np.array([True])}, "float32")
    with pytest.raises(BankError, match=r"does not end in \.scale"):
        encode({"up.scale": np.ones(1, np.float32)}, "float32")


@pytest.mark.parametrize("damage", [b"", b"12345678", b"\xff" * 64])
def test_bytes_that_are_no_expert_are_refused(damage: bytes) -> None:
    with pytest.raises(BankError, match="not an encoded expert"):
        decode(damage)


def test_cut_bytes_are_refused() -> None:
    with pytest.raises(BankError, match="not an encoded expert"):
        decode(encode(_factors(), "float16")[:-3])


def test_experts_whose_tensors_do_not_fit_together_are_refused() -> None:
    good = _factors()
    StoredExpert("a", "factors", good, (2, 4), R)
    for tensors, segment_ranks, rank, expected in (
        ({**good, "up2": good["up2"].T}, (), R, "up2"),
        ({name: good[name] for name in ("up1", "up2")}, (), R, "tensors are"),
        (good, (2, 3), R, "do not add up"),
        (good, (), R + 1, "up1"),
        ({}, (), R, "0 tensors"),
    ):
        with pytest.raises(ExpertShapeError, match=expected):
            StoredExpert("a", "factors", tensors, segment_ranks, rank)
    with pytest.raises(ExpertShapeError, match="form is 'other'"):
        StoredExpert("a", "other", good, (), R)  # type: ignore[arg-type]
