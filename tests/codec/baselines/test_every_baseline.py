"""Every baseline brings a cache back in its dtype and shape, from bytes that exist, and refuses NaN by its layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from baseline_caches import SHAPES, cache, layouts, moments, numbers_of, relative_error, rotation
from eigencache.codec.baselines.integers import Integers
from eigencache.codec.baselines.kivi import kivi
from eigencache.codec.baselines.kvtc_fit import fit_kvtc
from eigencache.codec.baselines.oscar import fit_oscar
from eigencache.codec.baselines.turboquant import turboquant
from eigencache.codec.baselines.xquant import xquant

pytestmark = pytest.mark.slow

Make = Callable[[dict, torch.dtype], Any]


def make_kvtc(shapes: dict, dtype: torch.dtype, **windows) -> Any:
    rotated = 1 if shapes is SHAPES["mla"] else 0
    calibration = cache(shapes, 200, seed=5)
    samples = [(layout, layout.vectors(calibration, 0).flatten(0, 1)) for layout in layouts(shapes, rotated)]
    return fit_kvtc(samples, dtype).at(4.0, **windows)


def make_turboquant(shapes: dict, dtype: torch.dtype, bits, **options) -> Any:
    return turboquant({i: (a[1], b[1]) for i, (a, b) in shapes.items()}, bits, dtype, **options)


def make_oscar(shapes: dict, dtype: torch.dtype, **options) -> Any:
    return fit_oscar(moments(shapes, 0), moments(shapes, 1), dtype, **options)


def make_xquant(shapes: dict, dtype: torch.dtype) -> Any:
    heads, width = next(iter(shapes.values()))[0]
    generator = torch.Generator().manual_seed(2)
    rows = 2 * heads * width
    weights = {i: (torch.linalg.qr(torch.randn(rows, rows, generator=generator)).Q, None) for i in shapes}
    return xquant(weights, heads, {i: (0, rotation(width)) for i in shapes}, 4, dtype)


MADE: dict[str, tuple[Make, float]] = {  # how it is made, and the largest error over energy that it may have
    "int8": (lambda shapes, dtype: Integers(8, dtype), 1e-4),
    "int4": (lambda shapes, dtype: Integers(4, dtype), 0.02),
    "kivi 2 bit": (lambda shapes, dtype: kivi(2, dtype, residual=4), 0.3),
    "kivi 4 bit": (lambda shapes, dtype: kivi(4, dtype, residual=4), 0.02),
    "turboquant 2 bit": (lambda shapes, dtype: make_turboquant(shapes, dtype, 2, boundary_layers=0), 0.15),
    "turboquant 3 bit": (lambda shapes, dtype: make_turboquant(shapes, dtype, 3, boundary_layers=1), 0.05),
    "turboquant 4 bit": (lambda shapes, dtype: make_turboquant(shapes, dtype, 4, boundary_layers=1, values="uniform"), 0.02),
    "kvtc 4 bit": (lambda shapes, dtype: make_kvtc(shapes, dtype, sinks=0, window=0), 0.2),
    "kvtc 4 bit with windows": (lambda shapes, dtype: make_kvtc(shapes, dtype, sinks=4, window=9), 0.2),
    "oscar 2 bit": (lambda shapes, dtype: make_oscar(shapes, dtype, sinks=0, window=0), 0.3),
    "oscar 4 bit": (lambda shapes, dtype: make_oscar(shapes, dtype, bits=4, sinks=3, window=5), 0.1),
    "xquant 4 bit": (make_xquant, 0.02),
}
CASES = [(name, shape) for name in MADE for shape in SHAPES if not (name.startswith("xquant") and shape == "mla")]


def tensors_of(encoded: Any) -> list[torch.Tensor]:
    """All tensors that something held consists of; byte strings have none."""
    if hasattr(encoded, "parts"):
        return [x for _, part in encoded.parts for x in tensors_of(part)]
    return list(getattr(encoded, "tensors", {}).values())


@pytest.mark.parametrize(("name", "shape"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_comes_back_from_fewer_bytes(name: str, shape: str, dtype: torch.dtype) -> None:
    make, allowed = MADE[name]
    codec = make(SHAPES[shape], dtype)
    cached = cache(SHAPES[shape], 37, dtype=dtype)
    encoded = codec.encode(cached, 11)
    decoded = codec.decode(encoded)
    assert codec.name == name.removesuffix(" with windows")
    assert (encoded.start, encoded.tokens) == (11, 37)
    assert list(decoded) == list(cached)
    for layer_idx, both in cached.items():
        assert [x.shape for x in decoded[layer_idx]] == [x.shape for x in both]
        assert all(x.dtype == dtype for x in decoded[layer_idx])
    assert relative_error(cached, decoded) < allowed
    assert encoded.nbytes < 2 * numbers_of(cached)
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in tensors_of(encoded))
    assert all(x.dtype in (torch.uint8, torch.float16, dtype) for x in tensors_of(encoded))


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_rows_can_be_chosen_and_decode_as_before(name: str, shape: str) -> None:
    codec = MADE[name][0](SHAPES[shape], torch.float32)
    cached = cache(SHAPES[shape], 35)
    encoded = codec.encode(cached, 0)
    decoded = codec.decode(encoded)
    chosen = codec.decode(encoded.select(torch.tensor([1, 1, 0])))
    for layer_idx in cached:
        for slot in (0, 1):
            assert torch.allclose(chosen[layer_idx][slot], decoded[layer_idx][slot][[1, 1, 0]], atol=1e-5)


@pytest.mark.parametrize("name", MADE)
def test_one_row_and_one_token_are_enough(name: str) -> None:
    codec = MADE[name][0](SHAPES["odd"], torch.float32)
    cached = cache(SHAPES["odd"], 1, batch=1)
    assert relative_error(cached, codec.decode(codec.encode(cached, 3))) < 2 * MADE[name][1]


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("slot", [0, 1])
def test_nan_is_refused_and_the_layer_named(name: str, slot: int) -> None:
    codec = MADE[name][0](SHAPES["odd"], torch.float32)
    for place in (0, 20, 36):
        cached = cache(SHAPES["odd"], 37)
        cached[4][slot][1, 0, place, 2] = torch.nan
        with pytest.raises(Exception, match="layer 4") as caught:
            codec.encode(cached, 0)
        assert type(caught.value).__name__ == "CodecError"
