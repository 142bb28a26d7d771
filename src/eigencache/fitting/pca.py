"""Fit PCA codecs from the moments and metrics of a model on a text, which are captured once for any number of codecs.

A codec has a target (`k`, `v`, `kv`, `latent`), a scope, a frame of the keys and a metric, and is centered or not. With
MLA the cache holds `latent` and the rotary key. `k` and `v`, to which the latent expands, are not in the cache.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from eigencache.calibration.accumulator import Columns
from eigencache.calibration.metrics import FROBENIUS, METRIC_TOKENS, Metrics, metric_named, spread_out
from eigencache.calibration.moments import CapturedMoments, gather
from eigencache.calibration.session import Session
from eigencache.codec.pca import Part, PCACodec, PCAGroup
from eigencache.corpora.sequences import Sequences
from eigencache.errors import StatisticsError
from eigencache.fitting.pca_settings import KINDS_OF, PCASettings, check_target
from eigencache.fitting.wide_pca import fit_wide_transform
from eigencache.geometry import kind_and_frame
from eigencache.models.rope_detection import rotations_of
from eigencache.records.base import Scope
from eigencache.spectral.measure import DOUBTFUL_BELOW, Place, effective_vectors
from eigencache.spectral.metric import block_diagonal, regularized
from eigencache.spectral.moments import Moments, SecondOrder
from eigencache.spectral.rope import Rotation
from eigencache.spectral.spectrum import eigenbasis_of
from eigencache.spectral.transform import Transform, fit_transform, random_transform

_SLOT = {"keys": 0, "values": 1, "latent": 0, "key_rope": 1}
_SAMPLED = 65_536  # vectors of a basis of all layers, where they are too wide for a matrix; fewer if memory is short
MIN_SUPPORT = 1  # least number of independent vectors per dimension of a basis


@dataclass(eq=False)
class PCACalibration:
    """The moments and metrics of a model on a text, from which any PCA codec is fitted; each is measured on first use.

    Args:
        session: the model and how it is run; `seed` draws random bases.
        sequences: the calibration text.
        scopes: the scopes of the moments to collect.
        gathered: moments of `sequences` in `scopes`, where they have been captured before.
        metrics: the metrics measured so far, by name.
        metric_tokens: tokens of the text that a metric is measured on.

    Raises:
        StatisticsError: sequences so long that the model rotates their keys differently.
    """

    session: Session
    sequences: Sequences
    scopes: tuple[Scope, ...] = ("head",)
    gathered: CapturedMoments | None = None
    metrics: dict[str, Metrics] = field(default_factory=dict)
    metric_tokens: int = METRIC_TOKENS

    def __post_init__(self) -> None:
        self.session.require_steady(self.sequences)

    @cached_property
    def rotations(self) -> dict[int, Rotation]:
        """The rotation of the keys, by layer."""
        return rotations_of(self.session.loaded)

    def metric(self, name: str) -> Metrics:
        """Return a metric's matrices, measured on first use. Raises `StatisticsError` for an unknown name."""
        if name not in self.metrics:
            text = spread_out(self.sequences, self.metric_tokens)
            self.metrics[name] = metric_named(name).measure(self.session, text, self.rotations)
        return self.metrics[name]

    def fit(self, settings: PCASettings) -> PCACodec:
        """Return the codec of full rank, fitted once per settings; its `truncated` returns lower ranks.

        Raises:
            CodecError: the model does not cache the target.
            StatisticsError: too little text.
        """
        if settings not in self._fitted:
            self._fitted[settings] = self._fit(settings)
        return self._fitted[settings]

    @cached_property
    def captured(self) -> CapturedMoments:
        """The moments of the calibration text."""
        return self.gathered or gather(self.session, self.sequences, self.scopes, kinds=self._kinds, sampled=_SAMPLED)

    @cached_property
    def _kinds(self) -> tuple[str, str]:
        return ("latent", "key_rope") if self.session.loaded.geometry.mla else ("keys", "values")

    @cached_property
    def _columns(self) -> dict[str, list[Columns]]:
        return {n: c for n, c in self.captured.columns.items() if kind_and_frame(n)[0] in self._kinds}

    @cached_property
    def _moments(self) -> dict[Place, Moments]:
        return dict(self.captured.accumulator.places())

    @property
    def notes(self) -> list[str]:
        """Remarks on bases that fewer than 10 independent vectors per dimension support, of those fitted so far."""
        doubts = [
            f"{name} at scope {scope}: a basis from {support:.1f} independent vectors per dimension, {DOUBTFUL_BELOW} needed"
            for (name, scope), support in self._doubtful.items()
        ]
        return [*doubts, *self._limits]

    @cached_property
    def _doubtful(self) -> dict[tuple[str, Scope], float]:
        return {}

    @cached_property
    def _limits(self) -> list[str]:
        return []

    @cached_property
    def _shared(self) -> dict[tuple[str, str, float, bool], Transform]:
        return {}

    @cached_property
    def _fitted(self) -> dict[PCASettings, PCACodec]:
        return {}

    def _fit(self, settings: PCASettings) -> PCACodec:
        check_target(self.session.loaded, settings.target)
        _ = self.captured  # first: names the layer of activations that are not finite
        identified = self.rotations
        groups: list[PCAGroup] = []
        rotations: dict[int, tuple[int, Rotation]] = {}
        for kind in KINDS_OF[settings.target]:
            name = self._name(kind, settings.frame)
            groups += self._groups(name, settings)
            if name.endswith("_pre_rope"):
                rotations |= {c.layer_idx: (_SLOT[kind], identified[c.layer_idx]) for c in self._columns[name]}
        codec = PCACodec(
            settings.describe(), tuple(groups), rotations, self.session.loaded.model.dtype, sinks=settings.sinks
        )
        return codec.to(self.session.loaded.device)

    def _name(self, kind: str, frame: str) -> str:
        """Return the tensor name of a kind in `frame`, or in its only frame."""
        return next(name for name in (f"{kind}_{frame}_rope", kind) if name in self._columns)

    def _groups(self, name: str, settings: PCASettings) -> list[PCAGroup]:
        kind, frame = kind_and_frame(name)
        columns = self._columns[name]
        whole = {c.layer_idx: Part(c.layer_idx, _SLOT[kind], (0, c.heads), c.dim) for c in columns}
        if settings.scope == "all":
            place = Place(None, None, kind, frame, "all")
            return [PCAGroup(tuple(whole.values()), self._transform(place, name, list(whole.values()), settings))]
        if settings.scope == "layer":
            places = {i: Place(i, None, kind, frame, "layer") for i in whole}
            return [PCAGroup((part,), self._transform(places[i], name, [part], settings)) for i, part in whole.items()]
        groups = []
        for c in columns:
            parts = [replace(whole[c.layer_idx], heads=(h, h + 1)) for h in range(c.heads)]
            places = [Place(c.layer_idx, h, kind, frame, "head") for h in range(c.heads)]
            if settings.basis == "pooled":
                pooled = self._transform(places[0], name, parts, settings, pool=places)
                groups += [PCAGroup((part,), pooled) for part in parts]
            else:
                groups += [
                    PCAGroup((p,), self._transform(head, name, [p], settings)) for head, p in zip(places, parts, strict=True)
                ]
        return groups

    def _transform(
        self, place: Place, name: str, parts: list[Part], settings: PCASettings, pool: list[Place] | None = None
    ) -> Transform:
        if place.scope == "all" and name in self.captured.accumulator.samplings:
            return self._wide(name, parts, settings)
        moments = self._moments.get(place)
        if moments is None:
            raise StatisticsError(f"{name}: scope {place.scope} was not captured. Choose another `scope`.")
        total = moments.total() if pool is None else _pooled([self._moments[head].total() for head in pool])
        self._check_support(moments, total, name, place)
        if settings.basis == "random":
            return random_transform(total, self.session.seed).to(torch.float32)
        metric = None
        if settings.metric != FROBENIUS:
            blocks = self._blocks(name, parts, settings.metric)
            metric = regularized(sum(blocks) / len(blocks) if pool else block_diagonal(blocks))  # type: ignore[arg-type]
        fitted = fit_transform(total, metric=metric, alpha=settings.alpha, centered=settings.centered)
        return fitted.to(torch.float32)

    def _blocks(self, name: str, parts: list[Part], metric: str) -> list[Tensor]:
        """Return the diagonal blocks of a metric, one per head; empty for the Frobenius norm."""
        if metric == FROBENIUS:
            return []
        layers = self.metric(metric)[name]
        return [layers[p.layer_idx][head] for p in parts for head in range(*p.heads)]

    def _wide(self, name: str, parts: list[Part], settings: PCASettings) -> Transform:
        """Return the transform of all layers that are too wide for a matrix; `k`, `v` and `kv` share it."""
        if settings.basis != "fitted":
            raise StatisticsError(
                f"{name}: all layers are too wide for a {settings.basis} basis. Choose a narrower `scope`."
            )
        key = name, settings.metric, settings.alpha, settings.centered
        if key not in self._shared:
            self.session.on_progress(f"{name}: basis of all layers", 0, 1)
            sample, contexts = self.captured.accumulator.samplings[name].sample, self.sequences.corpus.distinct_8grams
            transform, independent = fit_wide_transform(
                sample,
                self._blocks(name, parts, settings.metric),
                alpha=settings.alpha,
                centered=settings.centered,
                contexts=contexts,
            )
            self.session.on_progress(f"{name}: basis of all layers", 1, 1)
            self._limits.append(
                f"{name}, all layers: {independent:,.0f} independent vectors carry a basis of {transform.rank:,} of "
                f"{transform.width:,} dimensions, {DOUBTFUL_BELOW} for each"
            )
            self._shared[key] = transform
        return self._shared[key]

    def _check_support(self, moments: Moments, total: SecondOrder, name: str, place: Place) -> None:
        eigenvalues, basis = eigenbasis_of(total.covariance)
        n_eff = effective_vectors(moments, total, basis, eigenvalues) or total.count
        independent = min(n_eff, self.sequences.corpus.distinct_8grams)
        if independent < MIN_SUPPORT * moments.width:
            where = f"layer {place.layer_idx}" if place.layer_idx is not None else "all layers"
            narrower = "" if place.scope == "head" else " or a narrower scope"
            raise StatisticsError(
                f"{name}, {where}: n_eff of {independent:,.0f} independent vectors cannot carry a basis of "
                f"{moments.width:,} dimensions. Use more calibration tokens{narrower}."
            )
        if independent < DOUBTFUL_BELOW * moments.width:
            support, known = independent / moments.width, self._doubtful.get((name, place.scope), DOUBTFUL_BELOW)
            self._doubtful[name, place.scope] = min(support, known)


def _pooled(parts: list[SecondOrder]) -> SecondOrder:
    """Merge the moments of all heads into those of one set of vectors."""
    count = sum(part.count for part in parts)
    mean: Tensor = sum(part.count * part.mean for part in parts) / count  # type: ignore[assignment]
    about: Tensor = sum(part.count * part.second_moment for part in parts) / count  # type: ignore[assignment]
    return SecondOrder(count, mean, (about - torch.outer(mean, mean)) * count)
