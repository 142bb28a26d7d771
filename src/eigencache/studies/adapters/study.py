"""Train residual adapters, analyze them as linear operators, truncate them, and compare their loss with direct PCA.

With adapters, the cache receives V_eff = M·V (for keys M·K, then RoPE). The truncated cache stores only r coefficients per
layer and token, S_r V_rᵀ v of the SVD M = U S Vᵀ, and decodes them with U_r. On V_eff this is the projection on U_r. Direct
PCA stores r coefficients of the frozen model's values.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from eigencache.calibration.session import Session
from eigencache.codec.pca import PCACodec, PCAGroup
from eigencache.corpora.overlap import check_overlap
from eigencache.corpora.sequences import Sequences
from eigencache.evaluate.codec_scoring import score_codecs
from eigencache.evaluate.likelihood import batches_of
from eigencache.fitting.pca import PCACalibration
from eigencache.fitting.pca_settings import PCASettings
from eigencache.models.residual import AdapterTarget, Site, find_sites, inserted
from eigencache.progress import Progress
from eigencache.records.adapter import AdapterRecord, Method, Truncation
from eigencache.records.provenance import Stopwatch
from eigencache.records.quality import ReadingProtocol
from eigencache.spectral.operator import analyze, operator_transform
from eigencache.studies.adapters.training import TrainingSettings, new_residuals, train
from eigencache.studies.sweep import Plan, Ranks

QUARTERS = (0.25, 0.5, 0.75, 1.0)


def study_adapter(
    session: Session,
    sequences: Sequences,
    calibration: Sequences,
    protocol: ReadingProtocol,
    *,
    target: AdapterTarget = "v",
    layers: Iterable[int] | None = None,
    ranks: Ranks = None,
    training: TrainingSettings | None = None,
    force: bool = False,
) -> AdapterRecord:
    """Train adapters, analyze and truncate them, and score them on held-out text.

    The model is restored at the end, also after an error.

    Args:
        session: Model and settings to run it with.
        sequences: Held-out text.
        calibration: Text for training and for the bases of PCA.
        protocol: Reading protocol.
        target: Tensor that is adapted, `k` or `v`.
        layers: Indices of adapted layers. Default: all.
        ranks: Ranks to score. Default: quarters of the full width.
        training: Training settings. Default: `TrainingSettings()`.
        force: Accept held-out text that overlaps the calibration text.

    Raises:
        CorpusError: Texts overlap and `force` is false, or no sequence is long enough.
        LayerError: A layer does not exist.
        UnsupportedArchitectureError: The model uses MLA, or normalizes keys after their projection.
        StatisticsError: A rank does not exist, or the calibration set is too small for a basis.
        TrainingError: A training setting is out of range, or training diverges.
        NonFiniteError: Captured tensors or logits are not finite.
    """
    training, watch = training or TrainingSettings(), Stopwatch()
    overlap = check_overlap(sequences.ids, calibration.ids, force=force)
    for text in (calibration, sequences):
        session.require_readable(text)
    batches_of(sequences, protocol, training.batch_size)  # raises before training if no sequence is long enough
    first = torch.from_numpy(calibration.ids[0])[None].to(session.loaded.device)
    sites = find_sites(session.loaded.model, session.loaded.geometry, target, layers, first)
    settings = PCASettings(target, "layer")
    kept_ranks = Plan(settings, ranks=ranks, shares=QUARTERS).ranks_for(max(site.width for site in sites))
    residuals = new_residuals(sites, training)

    def progress(which: str) -> Progress:
        return lambda what, done, of: session.on_progress(f"{what}, {which}", done, of)

    def calibrated(which: str) -> PCACalibration:
        size, seed = training.batch_size, training.seed
        return PCACalibration(
            replace(session, batch_size=size, seed=seed, on_progress=progress(which)),
            calibration,
            scopes=("layer",),
        )

    def scored(which: str, whole: dict[Method, PCACodec]) -> tuple[float, list[Truncation]]:
        codecs: dict[tuple[Method, int], PCACodec] = {
            (method, rank): codec.truncated(rank, f"{method}, rank {rank}")
            for method, codec in whole.items()
            for rank in kept_ranks
        }
        scores = score_codecs(
            replace(session, batch_size=training.batch_size, on_progress=progress(which)),
            sequences,
            {codec.name: codec for codec in codecs.values()},
            protocol,
            calibration=calibration.corpus,
        )
        return scores.uncompressed_nll, [
            Truncation(method=method, rank=rank, quality=scores.quality[codec.name])
            for (method, rank), codec in codecs.items()
        ]

    direct = _of_sites(calibrated("frozen").fit(settings), sites)
    trained = train(
        session.loaded, sites, residuals, calibration, training, lambda n, of: session.on_progress("training", n, of)
    )
    operators = {layer_idx: residual.operator for layer_idx, residual in residuals.items()}
    frozen_nll, without = scored("frozen", {"direct-pca": direct})
    with inserted(sites, residuals):
        adapted = calibrated("adapted")
        pca = _of_sites(adapted.fit(settings), sites)
        codecs: dict[Method, PCACodec] = {
            "operator-svd": _operator_codec(pca, operators, centered=False),
            "operator-svd-centered": _operator_codec(pca, operators, centered=True),
            "random-basis": _of_sites(adapted.fit(replace(settings, basis="random")), sites),
            "adapted-pca": pca,
        }
        adapted_nll, results = scored("adapted", codecs)
    return AdapterRecord(
        model=session.loaded.record("forward hooks on the projection"),
        corpus=sequences.corpus,
        calibration=calibration.corpus,
        protocol=protocol,
        run=watch.run(training.seed, {"batch_size": training.batch_size, "forced": force}),
        target=target,
        training=trained,
        operators=[
            analyze(site.layer_idx, operators[site.layer_idx], before.transform, behind.transform, kept_ranks)
            for site, before, behind in zip(sites, direct.groups, pca.groups, strict=True)
        ],
        frozen_nll=frozen_nll,
        adapted_nll=adapted_nll,
        results=results + without,
        warnings=[
            *sequences.corpus.warnings,
            *calibration.corpus.warnings,
            *([overlap] if overlap else []),
            *trained.warnings,
        ],
    )


def _of_sites(codec: PCACodec, sites: list[Site]) -> PCACodec:
    """Restrict a codec to the layers of the sites, in their order; other layers stay in 16 bits."""
    groups = {group.parts[0].layer_idx: group for group in codec.groups}
    rotations = {site.layer_idx: codec.rotations[site.layer_idx] for site in sites if site.layer_idx in codec.rotations}
    return replace(codec, groups=tuple(groups[site.layer_idx] for site in sites), rotations=rotations)


def _operator_codec(pca: PCACodec, operators: Mapping[int, Tensor], *, centered: bool) -> PCACodec:
    """Return `pca` with U of M = U S Vᵀ as basis in every layer, about its mean or about zero."""
    groups = []
    for group in pca.groups:
        transform = operator_transform(operators[group.parts[0].layer_idx], group.transform.mean if centered else None)
        groups.append(PCAGroup(group.parts, transform.to(torch.float32, group.transform.mean.device)))
    return replace(pca, groups=tuple(groups))
