"""Every registered baseline brings a cache back in dtype and shape, from bytes that exist, and refuses NaN by its layer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from baseline_caches import SHAPES, RandomInputs, cache, numbers_of, relative_error
from eigencache.codec.base import Codec
from eigencache.codec.baselines import registry
from eigencache.codec.baselines.kivi import kivi
from eigencache.codec.baselines.kvtc_fit import fit_kvtc
from eigencache.codec.baselines.oscar import fit_oscar
from eigencache.codec.baselines.per_slot import PerSlot, Tensors
from eigencache.codec.baselines.registry import BaselineInputs, baseline, baselines
from eigencache.codec.baselines.turboquant import turboquant

pytestmark = pytest.mark.slow

SMALL: dict[str, Callable[[BaselineInputs], Codec]] = {  # sinks, windows and layers that fit into 37 tokens and 3 layers
    "kivi 4": lambda inputs: kivi(4, inputs.dtype, residual=4),
    "turboquant 4 uniform": lambda inputs: turboquant(inputs.widths, 4, inputs.dtype, boundary_layers=1, values="uniform"),
    "kvtc 4": lambda inputs: fit_kvtc(inputs.by_slot, inputs.dtype).at(4.0, sinks=4, window=9),
    "oscar 4": lambda inputs: fit_oscar(*inputs.moments, inputs.dtype, bits=4, sinks=3, window=5),
}
POINTS = [
    *((n, p) for n, b in baselines().items() for p in b.codecs(RandomInputs(SHAPES["odd"], torch.float32))),
    *((n, "") for n in SMALL),
]
CASES = [(name, point, shape) for name, point in POINTS for shape in SHAPES if (name, shape) != ("xquant", "mla")]
ALLOWED = {"8": 1e-4, "4": 0.1, "3": 0.15}  # operating point → largest error over energy; 0.4 for all others
CLOSE = {("int", "4"): 0.02, ("kivi-no-window", "4"): 0.02, ("turboquant", "3"): 0.05, ("xquant", "4"): 0.02}


@functools.cache
def made(name: str, point: str, shape: str, dtype: torch.dtype = torch.float32) -> Any:
    inputs = inputs_of(shape, dtype)
    return baselines()[name].codecs(inputs)[point] if point else SMALL[name](inputs)


@functools.cache
def inputs_of(shape: str, dtype: torch.dtype) -> RandomInputs:
    return RandomInputs(SHAPES[shape], dtype)


def allowed(name: str, point: str) -> float:
    return CLOSE.get((name, point), ALLOWED.get(point, 0.4))


def tensors_of(encoded: Any) -> list[torch.Tensor]:
    """All tensors that an encoded stretch consists of; byte strings have none."""
    if hasattr(encoded, "parts"):
        return [x for _, part in encoded.parts for x in tensors_of(part)]
    return list(getattr(encoded, "tensors", {}).values())


def check(codec: Any, shape: str, dtype: torch.dtype, most: float) -> None:
    cached = cache(SHAPES[shape], 37, dtype=dtype)
    encoded = codec.encode(cached, 11)
    decoded = codec.decode(encoded)
    assert (encoded.start, encoded.tokens) == (11, 37)
    assert list(decoded) == list(cached)
    for layer_idx, both in cached.items():
        assert [x.shape for x in decoded[layer_idx]] == [x.shape for x in both]
        assert all(x.dtype == dtype for x in decoded[layer_idx])
    assert relative_error(cached, decoded) < most
    assert encoded.nbytes <= 2 * numbers_of(cached)
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in tensors_of(encoded))
    assert all(x.dtype in (torch.uint8, torch.float16, dtype) for x in tensors_of(encoded))


@pytest.mark.parametrize(("name", "point", "shape"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_comes_back_from_no_more_bytes(name: str, point: str, shape: str, dtype: torch.dtype) -> None:
    check(made(name, point, shape, dtype), shape, dtype, allowed(name, point))


@pytest.mark.parametrize(("name", "point", "shape"), CASES)
def test_rows_can_be_chosen_and_decode_as_before(name: str, point: str, shape: str) -> None:
    codec = made(name, point, shape)
    cached = cache(SHAPES[shape], 35)
    encoded = codec.encode(cached, 0)
    decoded = codec.decode(encoded)
    chosen = codec.decode(encoded.select(torch.tensor([1, 1, 0])))
    for layer_idx in cached:
        for slot in (0, 1):
            assert torch.allclose(chosen[layer_idx][slot], decoded[layer_idx][slot][[1, 1, 0]], atol=1e-5)


@pytest.mark.parametrize(("name", "point"), POINTS)
def test_one_row_and_one_token_are_enough(name: str, point: str) -> None:
    codec = made(name, point, "odd")
    cached = cache(SHAPES["odd"], 1, batch=1)
    assert relative_error(cached, codec.decode(codec.encode(cached, 3))) < 2 * allowed(name, point)


@pytest.mark.parametrize(("name", "point"), POINTS)
@pytest.mark.parametrize("slot", [0, 1])
def test_nan_is_refused_and_the_layer_named(name: str, point: str, slot: int) -> None:
    codec = made(name, point, "odd")
    for place in (0, 20, 36):
        cached = cache(SHAPES["odd"], 37)
        cached[4][slot][1, 0, place, 2] = torch.nan
        with pytest.raises(Exception, match="layer 4") as caught:
            codec.encode(cached, 0)
        assert type(caught.value).__name__ == "CodecError"


@dataclass(frozen=True, eq=False)
class Halves(PerSlot):
    """A toy baseline: 16 bits for every number."""

    dtype: torch.dtype
    name: str = "halves"  # type: ignore[assignment]
    nbytes: int = 0

    def slot_encoded(self, x: Tensor, layer_idx: int, slot: int, what: str) -> Tensors:
        return {"half": x.half()}

    def slot_decoded(self, parts: Tensors, layer_idx: int, slot: int, width: int) -> Tensor:
        return parts["half"]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(registry, "_BASELINES", baselines())
    baseline("toy", "16 bits for every number")(lambda inputs: {"16": Halves(inputs.dtype)})
    yield "toy"


def test_a_baseline_is_one_registration_and_is_found_in_the_matrix(toy: str) -> None:
    assert [name for name in baselines() if name not in dict(POINTS)] == [toy]
    for shape in SHAPES:
        ((point, codec),) = baselines()[toy].codecs(RandomInputs(SHAPES[shape], torch.float32)).items()
        check(codec, shape, torch.float32, allowed(toy, point))


def test_a_name_is_registered_once(toy: str) -> None:
    with pytest.raises(ValueError, match="baseline 'toy' is registered already"):
        baseline(toy, "again")(lambda inputs: {})
