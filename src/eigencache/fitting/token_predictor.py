"""How much of a cache its text says already: ridge regression of every vector on features of its token and the last one.

Features are the model's own input embeddings, each brought to unit mean square, which is what the first layer's norm
does to them. The prediction is cut to the rank that matters in the metric.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from eigencache.calibration.vectors import SampledVectors
from eigencache.codec.eigen.token_features import EmbeddingFeatures, StoredFeatures, unit_mean_square
from eigencache.codec.eigen.token_predictor import TokenPredictor
from eigencache.codec.layout import Layout
from eigencache.models.embeddings import embed_of
from eigencache.models.load import LoadedModel
from eigencache.spectral.metric import block_product
from eigencache.spectral.metric import roots as roots_of
from eigencache.spectral.spectrum import eigenbasis_of

MAX_FEATURES = 256
_RIDGE = 1e-4  # of the features' mean variance
_ROWS = 8192  # at a time
_SMALL = 0.01
_PLACES = 32  # dimensions in which tokens are told apart


def vocabulary(loaded: LoadedModel, ids: Tensor) -> tuple[Tensor, EmbeddingFeatures]:
    """Rank of every token id [vocabulary], most frequent first, and features of ranks: centered, 256 at most."""
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
    """The features of the token before each [n, h], zero at the first of every sequence."""
    before = F.pad(features, (0, 0, 1, 0))[:-1].clone()
    before[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = 0
    return before


def fit_text(
    samples: SampledVectors,
    ranks: Tensor,
    features: EmbeddingFeatures | StoredFeatures,
    roots: Sequence[Tensor],
    inverses: Sequence[Tensor],
    *,
    told_by: int | None = None,
) -> TokenPredictor:
    """Predicts the vectors of `samples`, which are centered, from the `ranks` [n] of their tokens.

    `roots`, `inverses`: blocks of M^{1/2} and M^{−1/2}. Directions of the metric in which the prediction varies by less
    than a hundredth of what is left over in the mean direction are left out. `told_by`: the layer in which tokens are
    found, by default the first. Cost: O(n h width).
    """
    here = features.of(ranks)
    both = torch.cat([here, previous(here, samples.lengths)], 1)
    gram = both.mT.double() @ both.double() / len(both)
    weights = _ridge(gram, both, samples.vectors)
    weighed = block_product(weights.float(), roots).double()
    factor = torch.linalg.cholesky(gram + 1e-9 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype))
    _, singular, directions = torch.linalg.svd(factor.mT @ weighed, full_matrices=False)
    total = sum(float(block_product(x, roots).double().square().sum()) for x in samples.vectors.split(_ROWS)) / len(both)
    left_over = max(total - float(singular.square().sum()), 0) / samples.vectors.shape[1]
    kept = directions[: max(1, int((singular.square() > _SMALL * left_over).sum()))]
    mix, rows = weighed @ kept.mT, block_product(kept.float(), inverses)
    return TokenPredictor(features, mix.half(), rows.half(), *_finder(samples, here, gram, told_by))


def _ridge(gram: Tensor, features: Tensor, vectors: Tensor) -> Tensor:
    """Weights [h, width] float64 of the regression of vectors on features, whose second moment is `gram`."""
    penalty = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    products = sum(f.mT.double() @ x.double() for f, x in zip(features.split(_ROWS), vectors.split(_ROWS), strict=True))
    return torch.linalg.solve(gram + penalty, products / len(features))  # type: ignore[operator]


def _finder(samples: SampledVectors, here: Tensor, gram: Tensor, layer_idx: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """What of one layer tells tokens apart, whitened by what their own features do not explain."""
    start, stop = _columns_of(samples.layout, layer_idx)
    seen = samples.vectors[:, start:stop]
    h = here.shape[1]
    weights = _ridge(gram[:h, :h], here, seen)
    rest = seen.double() - here.double() @ weights
    noise = rest.mT @ rest / len(rest)
    whiten = roots_of(noise + 1e-4 * seen.var() * torch.eye(len(noise), dtype=noise.dtype), 1.0)[1]
    places = weights @ whiten
    spread = eigenbasis_of(places.mT @ gram[:h, :h] @ places)[1][:, :_PLACES]
    return torch.tensor([start], dtype=torch.int32), (whiten @ spread).float(), (places @ spread).float()


def _columns_of(layout: Layout, layer_idx: int | None) -> tuple[int, int]:
    """Columns of what a layer, or the first one, caches in its wider slot."""
    layer_idx = min(part.layer_idx for part in layout.parts) if layer_idx is None else layer_idx
    parts = zip(layout.parts, layout.spans, strict=True)
    return max((part.width, part.slot, span) for part, span in parts if part.layer_idx == layer_idx)[2]
