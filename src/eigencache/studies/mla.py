"""Compare the MLA latent cache with a cache of expanded keys and values, exact and compressed by PCA.

Ratios are relative to the 16-bit latent and rotary key, which MLA models cache. The size of the expanded keys and values
is reported as bytes (THEORY 9, 11).
"""

from collections.abc import Sequence

import numpy as np
import torch

from eigencache.calibration.moments import gather
from eigencache.calibration.session import Session
from eigencache.corpora.sequences import Sequences
from eigencache.errors import UnsupportedArchitectureError
from eigencache.evaluate.likelihood import batches_of, compared, scored_batches
from eigencache.evaluate.prefix import read_prefix
from eigencache.evaluate.summary import summarize
from eigencache.models.load import LoadedModel
from eigencache.models.mla_expanded import Expanded, expanded_codec, recorded_expansion, replayed_expansion
from eigencache.records.mla import LatentComparison
from eigencache.records.quality import ReadingProtocol, SequenceLoss, SweepPoint, SweepSeries
from eigencache.spectral.transform import Transform, fit_transform

KINDS = {"k": "keys_nope", "v": "values"}


def check_latent(loaded: LoadedModel) -> None:
    """Raise `UnsupportedArchitectureError` if a model does not cache a latent."""
    if loaded.geometry.mla is None:
        raise UnsupportedArchitectureError(
            f"{loaded.name} is not an MLA model: {loaded.geometry.describe()}. Use a model that caches a latent."
        )


@torch.no_grad()
def compare_caches(loaded: LoadedModel, sequences: Sequences, prefix: int) -> LatentComparison:
    """Compare logits after a prefix between a cached latent, expanded at each step, and a cached expansion.

    Args:
        loaded: An MLA model.
        sequences: Text to read.
        prefix: Tokens of the prefix.

    Raises:
        UnsupportedArchitectureError: The model does not cache a latent.
        CorpusError: No sequence is longer than the prefix.
    """
    check_latent(loaded)
    difference = largest = 0.0
    tokens = 0
    for batch in batches_of(sequences, ReadingProtocol(kind="prefix", length=prefix), 1):
        ids = torch.from_numpy(np.stack(batch)).to(loaded.device)
        with recorded_expansion(loaded) as expansion:
            start = read_prefix(loaded, ids[:, :prefix])
        latent = start.logits(ids[:, prefix:], None)
        with replayed_expansion(loaded, expansion):
            expanded = start.logits(ids[:, prefix:], None)
        difference = max(difference, float((latent - expanded).abs().max()))
        largest = max(largest, float(latent.abs().max()))
        tokens += ids.shape[1] - prefix
    geometry = loaded.geometry
    return LatentComparison(
        2 * geometry.values_per_token, 2 * geometry.expanded_values_per_token, tokens, difference, largest
    )


def fit_expanded(session: Session, sequences: Sequences) -> Expanded:
    """Fit a full-rank PCA of the expanded keys (without the rotary part) and values of every head.

    Args:
        session: An MLA model and settings to run it with.
        sequences: Calibration set.

    Returns:
        Transforms of the heads, by layer and kind of tensor.

    Raises:
        UnsupportedArchitectureError: The model does not cache a latent.
    """
    check_latent(session.loaded)
    gathered = gather(
        session,
        sequences,
        ("head",),
        kinds=tuple(KINDS.values()),
    )
    transforms: dict[tuple[int, str], list[Transform]] = {}
    for place, moments in gathered.accumulator.places():
        assert place.layer_idx is not None
        transform = fit_transform(moments.total()).to(session.loaded.model.dtype, session.loaded.device)
        transforms.setdefault((place.layer_idx, place.kind), []).append(transform)
    return transforms


@torch.no_grad()
def sweep_expanded(
    session: Session, sequences: Sequences, fitted: Expanded, target: str, shares: Sequence[float], prefix: int
) -> SweepSeries:
    """Measure the loss of low-rank expanded keys or values, as a cache without the latent would store them.

    Args:
        session: An MLA model and settings to run it with.
        sequences: Held-out text.
        fitted: Transforms of `fit_expanded`.
        target: `k` (keys) or `v` (values); the other stays in 16 bits.
        shares: Ranks as fractions of the full width of a head.
        prefix: Tokens of the compressed prefix.
    """
    kind = KINDS[target]
    width = max(t.width for (_, name), heads in fitted.items() if name == kind for t in heads)
    ranks = sorted({max(1, round(share * width)) for share in shares})
    codecs = {rank: _truncated(fitted, kind, rank) for rank in ranks}
    protocol = ReadingProtocol(kind="prefix", length=prefix)
    losses: dict[int | None, list[SequenceLoss]] = {rank: [] for rank in (None, *ranks)}
    nbytes = dict.fromkeys(ranks, 0)
    positions = 0
    batches = scored_batches(session, sequences, protocol)
    for done, batch in enumerate(batches, 1):
        ids = torch.from_numpy(np.stack(batch)).to(session.loaded.device)
        start, targets = read_prefix(session.loaded, ids[:, :prefix]), ids[:, prefix + 1 :]
        reference = start.logits(ids[:, prefix:], None)
        losses[None] += _losses(compared(reference, reference, targets), targets.shape[1])
        for rank, codec in codecs.items():
            with expanded_codec(session.loaded, codec, prefix) as stored:
                logits = start.logits(ids[:, prefix:], None)
            losses[rank] += _losses(compared(reference, logits, targets), targets.shape[1])
            nbytes[rank] += stored.nbytes
        positions += prefix * len(ids)
        session.on_progress(f"{target} expanded", done, len(batches))
    geometry = session.loaded.geometry
    rope = 2 * sum(layer.mla.qk_rope_head_dim for layer in geometry.layers if layer.mla) * positions
    points = []
    for rank, codec in codecs.items():
        quality = summarize(
            f"{target} expanded · rank {rank}",
            losses[rank],
            losses[None],
            encoded_tokens=positions,
            encoded_nbytes=nbytes[rank] + rope,
            values_per_token=geometry.values_per_token,
            basis_nbytes=sum(t.nbytes for heads in codec.values() for t in heads),
        )
        points.append(SweepPoint(rank=rank, target_ratio=width / rank, quality=quality))
    name = f"{target} expanded · head · frobenius · centered"
    return SweepSeries(
        name=name, target=f"{target} expanded", scope="head", frame="pre", metric="frobenius", centered=True, alpha=1.0,
        basis="fitted", bits=16, width=width, points=points,
    )  # fmt: skip


def _truncated(fitted: Expanded, kind: str, rank: int) -> Expanded:
    """Return the transforms of one kind truncated to a rank; the other kind is omitted and stays in 16 bits."""
    return {place: [t.truncated(min(rank, t.rank)) for t in heads] for place, heads in fitted.items() if place[1] == kind}


def _losses(sums: torch.Tensor, tokens: int) -> list[SequenceLoss]:
    return [SequenceLoss(tokens=tokens, nll=nll, kl=kl, agree=round(agree)) for nll, kl, agree in sums.T.tolist()]
