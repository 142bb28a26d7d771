"""Random caches of known shapes (grouped-query attention, latent and rotary key of MLA), and inputs of baselines."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eigencache.codec.layout import Layout, Part
from eigencache.spectral.rope import Rotation

GQA = {0: ((2, 32), (2, 32)), 1: ((2, 32), (2, 32)), 2: ((2, 32), (2, 32)), 5: ((2, 32), (2, 32)), 6: ((2, 32), (2, 32))}
ODD = {2: ((3, 20), (3, 20)), 4: ((3, 20), (3, 20)), 5: ((3, 20), (3, 20))}
MLA = {0: ((1, 40), (1, 8)), 1: ((1, 40), (1, 8)), 2: ((1, 40), (1, 8))}
SHAPES = {"gqa": GQA, "odd": ODD, "mla": MLA}  # layer → (heads, width) of both slots
Cache = dict[int, tuple[Tensor, Tensor]]


def cache(shapes: dict, seq: int = 37, *, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> Cache:
    """Return Gaussian numbers whose spread differs between channels, as that of keys does."""
    generator = torch.Generator().manual_seed(seed)

    def slot(heads: int, width: int) -> Tensor:
        x = torch.randn(batch, heads, seq, width, generator=generator)
        return (x * torch.linspace(0.2, 3, width)).to(dtype)

    return {i: (slot(*first), slot(*second)) for i, (first, second) in shapes.items()}


def numbers_of(cached: Cache) -> int:
    """Return the number of values of a cache."""
    return sum(x.numel() for both in cached.values() for x in both)


def rotation(width: int) -> Rotation:
    return Rotation(10_000.0 ** -(torch.arange(width // 2, dtype=torch.float64) / (width // 2)), 1.0, "half")


def layouts(shapes: dict, rotated_slot: int | None = 0) -> list[Layout]:
    """Return one layout of all layers for each slot; `rotated_slot` is held before rotation."""
    found = []
    for slot in (0, 1):
        parts = tuple(Part(i, slot, (0, both[slot][0]), both[slot][1]) for i, both in shapes.items())
        turned = {i: (slot, rotation(both[slot][1])) for i, both in shapes.items()} if slot == rotated_slot else {}
        found.append(Layout(parts, turned))
    return found


def moments(shapes: dict, slot: int, seed: int = 0) -> dict[int, Tensor]:
    """Return positive definite matrices for every head."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer_idx, both in shapes.items():
        heads, width = both[slot]
        x = torch.randn(heads, 3 * width, width, generator=generator) * torch.linspace(0.1, 4, width)
        found[layer_idx] = x.mT @ x
    return found


def relative_error(cached: Cache, decoded: Cache) -> float:
    """Return squared error over energy."""
    error = sum(float((decoded[i][s].float() - cached[i][s].float()).square().sum()) for i in cached for s in (0, 1))
    return error / sum(float(x.float().square().sum()) for both in cached.values() for x in both)


@dataclass(eq=False)
class RandomInputs:
    """The `BaselineInputs` of a model that has never existed: random vectors, moments and weights of the given shapes."""

    shapes: dict
    dtype: torch.dtype
    rates: tuple[float, ...] = (2.0, 4.0)
    fits: dict[str, Any] = field(default_factory=dict)

    @property
    def widths(self) -> dict[int, tuple[int, int]]:
        return {i: (first[1], second[1]) for i, (first, second) in self.shapes.items()}

    @property
    def cached(self) -> Cache:
        return cache(self.shapes, 200, seed=5)

    @property
    def by_slot(self) -> list[tuple[Layout, Tensor]]:
        rotated_slot = 1 if self.shapes is SHAPES["mla"] else 0
        return [(layout, layout.vectors(self.cached, 0).flatten(0, 1)) for layout in layouts(self.shapes, rotated_slot)]

    @property
    def moments(self) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        return moments(self.shapes, 0), moments(self.shapes, 1)

    @property
    def projections(self) -> tuple[dict, int, dict]:
        heads, width = next(iter(self.shapes.values()))[0]
        generator = torch.Generator().manual_seed(2)
        rows = 2 * heads * width
        weights = {i: (torch.linalg.qr(torch.randn(rows, rows, generator=generator)).Q, None) for i in self.shapes}
        return weights, heads, {i: (0, rotation(width)) for i in self.shapes}

    def once(self, name: str, fit: Callable[[], Any]) -> Any:
        if name not in self.fits:
            self.fits[name] = fit()
        return self.fits[name]
