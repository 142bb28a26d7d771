"""Predict the first stage from the text: ridge regression on features of each token and of the token before it.

Features are the input embeddings of the model, scaled to unit mean square as the norm of the first layer does.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from eigencache.codec.eigen.token_features import EmbeddingFeatures, unit_mean_square
from eigencache.codec.eigen.token_predictor import TokenPredictor
from eigencache.codec.layout import Layout
from eigencache.fitting.weighed_vectors import WeighedVectors
from eigencache.models.embeddings import embed_of
from eigencache.models.load import LoadedModel
from eigencache.spectral.metric import roots as roots_of
from eigencache.spectral.spectrum import eigenbasis_of

MAX_FEATURES = 256
_RIDGE = 1e-4  # penalty, as a share of the mean variance of the features
_ROWS = 8192  # vectors per product
_SMALL = 0.01  # smallest variance of a predicted direction, as a share of the mean residual variance
_PLACES = 32  # dimensions of the space in which tokens are identified


def vocabulary(loaded: LoadedModel, ids: Tensor) -> tuple[Tensor, EmbeddingFeatures]:
    """Rank the token ids by frequency, and make the features of the ranks.

    Args:
        loaded: the model.
        ids: token ids of the calibration text [n].

    Returns:
        The rank of every token id [vocabulary], and the centered features, at most 256, of every rank.
    """
    embed = embed_of(loaded.model)
    counts = torch.bincount(ids, minlength=loaded.embedded_ids)
    order = counts.argsort(descending=True, stable=True)
    seen = order[: int((counts > 0).sum())]
    share, embeddings = (counts[seen] / counts.sum())[:, None], unit_mean_square(embed(seen).cpu())
    mean = (share * embeddings).sum(0)
    projection = torch.eye(embeddings.shape[1])
    if embeddings.shape[1] > MAX_FEATURES:
        spread = embeddings - mean
        projection = eigenbasis_of(spread.mT @ (share * spread))[1][:, :MAX_FEATURES]
    projection = projection.half()
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order))
    return ranks, EmbeddingFeatures(order.int(), projection, mean @ projection.float(), embed)


def previous(features: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the features of the token before each token [n, h], zero at the start of every sequence."""
    before = F.pad(features, (0, 0, 1, 0))[:-1].clone()
    before[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = 0
    return before


def fit_text(
    vectors: WeighedVectors, rank_of: Tensor, features: EmbeddingFeatures, stop: int, *, told_by: int | None = None
) -> TokenPredictor:
    """Fit the predictor of the first stage from tokens. Cost: O(n h stop).

    Directions in which the prediction varies by less than 1 % of the mean residual variance are left out.

    Args:
        vectors: vectors in the metric, with their token ids.
        rank_of: rank of every token id [vocabulary].
        features: features of the ranks.
        stop: columns of the first stage.
        told_by: layer whose vectors identify the tokens; by default the first.
    """
    current = features.of(rank_of[vectors.ids])
    pairs = torch.cat([current, previous(current, vectors.lengths)], 1)
    gram = pairs.mT.double() @ pairs.double() / len(pairs)
    z = vectors.columns(0, stop)
    weights = _ridge(gram, pairs, z)
    factor = torch.linalg.cholesky(gram + 1e-9 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype))
    _, singular, directions = torch.linalg.svd(factor.mT @ weights, full_matrices=False)
    total = float(z.square().sum(dtype=torch.float64)) / len(pairs)
    residual = max(total - float(singular.square().sum()), 0) / stop
    kept = directions[: max(1, int((singular.square() > _SMALL * residual).sum()))]
    return TokenPredictor(features, (weights @ kept.mT).half(), kept.half(), *_finder(vectors, current, gram, told_by))


def _ridge(gram: Tensor, features: Tensor, vectors: Tensor) -> Tensor:
    """Return the weights [h, width] float64 of the regression on features with the second moment `gram`."""
    penalty = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    products = sum(f.mT.double() @ x.double() for f, x in zip(features.split(_ROWS), vectors.split(_ROWS), strict=True))
    return torch.linalg.solve(gram + penalty, products / len(features))  # type: ignore[operator]


def _finder(vectors: WeighedVectors, current: Tensor, gram: Tensor, layer_idx: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return start column and projections of the layer that identifies tokens, whitened by the residual."""
    start, stop = _columns_of(vectors.samples.layout, layer_idx)
    seen = vectors.samples.vectors(vectors.rows, start, stop).sub_(vectors.mean[start:stop])
    h = current.shape[1]
    weights = _ridge(gram[:h, :h], current, seen)
    residual = seen.double() - current.double() @ weights
    noise = residual.mT @ residual / len(residual)
    whiten = roots_of(noise + 1e-4 * seen.var() * torch.eye(len(noise), dtype=noise.dtype), 1.0)[1]
    places = weights @ whiten
    spread = eigenbasis_of(places.mT @ gram[:h, :h] @ places)[1][:, :_PLACES]
    return torch.tensor([start], dtype=torch.int32), (whiten @ spread).float(), (places @ spread).float()


def _columns_of(layout: Layout, layer_idx: int | None) -> tuple[int, int]:
    """Return the columns of the wider slot of a layer, by default the first."""
    layer_idx = min(part.layer_idx for part in layout.parts) if layer_idx is None else layer_idx
    parts = zip(layout.parts, layout.spans, strict=True)
    return max((part.width, part.slot, span) for part, span in parts if part.layer_idx == layer_idx)[2]
