"""Share calibration statistics among the methods of a benchmark; each is computed on first use."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from eigencache.calibration.attention_moments import Moments, attended_moments
from eigencache.calibration.calibration_set import CalibrationSet
from eigencache.calibration.metrics import spread_out
from eigencache.calibration.session import Session
from eigencache.codec.baselines.registry import Weights
from eigencache.codec.layout import Layout, Rotations
from eigencache.corpora.sequences import Sequences
from eigencache.evaluate.prefix import read_prefix
from eigencache.fitting.eigen import EigenFit, EigenSettings, fit_eigen
from eigencache.fitting.pca_settings import cached_size
from eigencache.models.residual import find_sites, weight_rows

RATES = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0, 4.0)
MOMENT_TOKENS = 16_384
_T = TypeVar("_T")


@dataclass(eq=False)
class BenchContext:
    """A model and a calibration set, with statistics and fits that several methods share.

    Args:
        session: Model and settings to run it with.
        sequences: Calibration set.
        rates: Bits per value to test for variable-rate methods.
    """

    session: Session
    sequences: Sequences
    rates: tuple[float, ...] = RATES
    _fitted: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def source(self) -> CalibrationSet:
        """Calibration vectors, metrics and RoPE rotations."""
        return CalibrationSet(self.session, self.sequences)

    def once(self, name: str, fit: Callable[[], _T]) -> _T:
        """Return the result of `fit`, computed on the first call with this name.

        Args:
            name: Key of the result.
            fit: Function that computes it.
        """
        if name not in self._fitted:
            self._fitted[name] = fit()
        return self._fitted[name]

    def eigen(self, settings: EigenSettings) -> EigenFit:
        """Return the fit of `eigen` for the given settings, computed on first use."""
        return self.once(
            repr(settings),
            lambda: fit_eigen(self.source, settings),
        )

    @cached_property
    def by_slot(self) -> list[tuple[Layout, Tensor]]:
        """Layout and vectors [n, width] of keys (before RoPE) and of values; with MLA, of latents and of rotary keys."""
        samples, held = self.source.samples, self.source.held_out_samples  # baselines hold nothing out
        slots = []
        for slot in (0, 1):
            parts = tuple(part for part in samples.layout.parts if part.slot == slot)
            rotations = {i: (s, r) for i, (s, r) in samples.layout.rotations.items() if s == slot}
            spans = zip(samples.layout.parts, samples.layout.spans, strict=True)
            own = [span for part, span in spans if part.slot == slot]
            columns = torch.cat([torch.cat([s.vectors(slice(None), *span) for s in (samples, held)]) for span in own], 1)
            slots.append((Layout(parts, rotations), columns))
        return slots

    @cached_property
    def widths(self) -> dict[int, tuple[int, int]]:
        """Width of a head in both cache slots (keys and values, or latent and rotary key), by layer."""
        kinds = ("latent", "key_rope") if self.session.loaded.geometry.mla else ("keys", "values")
        layers = [layer for layer in self.session.loaded.geometry.layers if layer.cached]
        return {layer.layer_idx: tuple(cached_size(layer, kind)[1] for kind in kinds) for layer in layers}  # type: ignore[misc]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model."""
        return self.session.loaded.model.dtype

    @cached_property
    def projections(self) -> tuple[Weights, int, Rotations]:
        """Stacked weights [W_K; W_V] and biases of every layer, the number of KV heads, and the rotations of the keys."""
        loaded = self.session.loaded
        ids = torch.from_numpy(self.sequences.ids[0][None, :64]).to(loaded.device)
        weights = {}
        keys, values = (find_sites(loaded.model, loaded.geometry, kind, None, ids) for kind in ("k", "v"))
        for k, v in zip(keys, values, strict=True):
            pairs = [weight_rows(site) for site in (k, v)]
            biases = [bias for _, bias in pairs if bias is not None]
            weights[k.layer_idx] = torch.cat([weight for weight, _ in pairs]), torch.cat(biases) if biases else None
        rotations = {i: (0, rotation) for i, rotation in self.source.rotations.items()}
        return weights, loaded.geometry.num_key_value_heads, rotations

    @cached_property
    def moments(self) -> tuple[Moments, Moments]:
        """Second moments of queries and of attention-weighted values, per layer and KV head."""
        return attended_moments(
            self.session,
            spread_out(self.sequences, MOMENT_TOKENS),
        )

    @cached_property
    def cached(self) -> dict[int, tuple[Tensor, Tensor]]:
        """Uncompressed cache of one batch of sequences, for methods that select settings on a cache."""
        ids = torch.from_numpy(np.stack(self.sequences.ids[: self.session.batch_size])).to(self.session.loaded.device)
        with torch.no_grad():
            return read_prefix(self.session.loaded, ids).stored
