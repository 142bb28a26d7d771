"""Train residual adapters on a frozen model, whose own weights get no gradient.

There are three losses: `nll` is the language-model loss of the training text. `nll+tail` adds the share of variance outside
the top r directions of the adapted vectors, averaged over layers. `nll@rank` is the language-model loss with the vectors
projected on those directions. The directions are computed per batch, about its mean.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from eigencache.corpora.sequences import Batch, Sequences
from eigencache.errors import TrainingError
from eigencache.models.load import LoadedModel
from eigencache.models.residual import Residual, Site, inserted
from eigencache.records.adapter import LossName, Training
from eigencache.spectral.spectrum import eigenbasis_of

_COMPARED = 16  # sequences for the loss before and after training


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a training.

    Args:
        loss: `nll`, `nll+tail` or `nll@rank`.
        loss_rank: r of `nll+tail` and `nll@rank`. Default: half of the width.
        tail_weight: Weight of the tail share in `nll+tail`.
        inner_rank: Inner rank of the adapters.
        scale: Factor of the adapters' output.
        steps: Optimizer steps.
        learning_rate: Learning rate of Adam, above 0 and at most 1.
        batch_size: Sequences per step.
        seed: Seed of the initial weights and of the order of sequences.
    """

    loss: LossName = "nll"
    loss_rank: int | None = None
    tail_weight: float = 1.0
    inner_rank: int = 16
    scale: float = 1.0
    steps: int = 60
    learning_rate: float = 1e-3
    batch_size: int = 4
    seed: int = 0


def new_residuals(sites: list[Site], settings: TrainingSettings) -> dict[int, Residual]:
    """Return new adapters by layer, which start as the identity.

    Args:
        sites: Projections to adapt.
        settings: Settings of the training.

    Raises:
        TrainingError: A rank or the learning rate is out of range.
    """
    if not 0 < settings.learning_rate <= 1:
        raise TrainingError(f"`learning_rate` {settings.learning_rate:g}: must be above 0 and at most 1")
    narrowest = min(site.width for site in sites)
    for name, rank in (("inner_rank", settings.inner_rank), ("loss_rank", settings.loss_rank)):
        if rank is not None and not 1 <= rank <= narrowest:
            raise TrainingError(f"`{name}` {rank}: must be 1 to {narrowest}, the width of a layer's vectors")
    generator = torch.Generator().manual_seed(settings.seed)
    made = {s.layer_idx: Residual(s.width, settings.inner_rank, settings.scale, generator) for s in sites}
    return {s.layer_idx: made[s.layer_idx].to(next(s.module.parameters()).device) for s in sites}


def train(
    loaded: LoadedModel,
    sites: list[Site],
    residuals: Mapping[int, Residual],
    sequences: Sequences,
    settings: TrainingSettings,
    on_step: Callable[[int, int], None] = lambda *_: None,
) -> Training:
    """Train the adapters in place with Adam; each epoch draws a new order of sequences.

    Args:
        loaded: The frozen model.
        sites: Adapted projections.
        residuals: Adapters by layer.
        sequences: Training text.
        settings: Settings of the training.
        on_step: Called with the finished steps and the number of steps.

    Raises:
        TrainingError: The adapted vectors or the loss become NaN or infinite.
    """
    weights = [weight for residual in residuals.values() for weight in residual.parameters()]
    optimizer = torch.optim.Adam(weights, lr=settings.learning_rate)
    losses: list[float] = []
    before = _mean_loss(loaded, sites, residuals, sequences, settings)
    with torch.enable_grad(), _in_training(sites, residuals, settings) as made:
        for step, batch in zip(range(1, settings.steps + 1), _endless(sequences, settings), strict=False):
            loss = _loss(loaded, made, batch, settings)
            losses.append(_finite(loss, f"step {step}"))
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.grad = gradient
            optimizer.step()
            on_step(step, settings.steps)
    return Training(
        loss=settings.loss,
        loss_rank=None if settings.loss == "nll" else _rank(sites[0].width, settings),
        tail_weight=settings.tail_weight if settings.loss == "nll+tail" else None,
        inner_rank=settings.inner_rank,
        scale=settings.scale,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        parameters=sum(weight.numel() for weight in weights),
        losses=losses,
        loss_before=before,
        loss_after=_mean_loss(loaded, sites, residuals, sequences, settings),
    )


def tail_share(vectors: Tensor, rank: int) -> Tensor:
    """Return the share of variance outside the top `rank` directions, as a differentiable scalar.

    The basis is constant in the backward pass: at its optimum, its derivative does not contribute (envelope theorem).

    Args:
        vectors: Vectors [n, p].
        rank: Number of directions.
    """
    x = vectors.float() - vectors.float().mean(0)
    return 1 - (x @ _leading(x, rank)).square().sum() / x.square().sum()


def cut(vectors: Tensor, rank: int) -> Tensor:
    """Project vectors [..., p] on their top `rank` directions about their mean; the basis is constant in the gradient."""
    x = vectors.float().flatten(0, -2)
    mean = x.mean(0)
    x = x - mean
    basis = _leading(x, rank)
    return (mean + x @ basis @ basis.mT).view(vectors.shape).to(vectors.dtype)


def _leading(x: Tensor, rank: int) -> Tensor:
    scatter = (x.mT @ x).detach().double()
    if not scatter.isfinite().all():
        raise TrainingError("the adapted vectors hold NaN or infinite values. Lower `learning_rate` or `scale`.")
    return eigenbasis_of(scatter)[1][:, :rank].to(x.dtype)


def _rank(width: int, settings: TrainingSettings) -> int:
    return settings.loss_rank or max(1, width // 2)


def _in_training(
    sites: list[Site], residuals: Mapping[int, Residual], settings: TrainingSettings
) -> AbstractContextManager[dict[int, Tensor]]:
    if settings.loss != "nll@rank":
        return inserted(sites, residuals)
    return inserted(sites, residuals, lambda x: cut(x, _rank(x.shape[-1], settings)))


def _loss(loaded: LoadedModel, made: Mapping[int, Tensor], batch: Batch, settings: TrainingSettings) -> Tensor:
    """Return the mean loss per token; padding is on the right, where no token attends to it."""
    ids, mask = batch.input_ids.to(loaded.device), batch.attention_mask.to(loaded.device).bool()
    logits = loaded.model(input_ids=ids, use_cache=False).logits
    targets = ids.masked_fill(~mask, -100)[:, 1:]
    nll = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=-100)
    if settings.loss != "nll+tail":
        return nll
    shares = [tail_share(x[mask.to(x.device)], _rank(x.shape[-1], settings)).to(nll.device) for x in made.values()]
    return nll + settings.tail_weight * torch.stack(shares).mean()


@torch.no_grad()
def _mean_loss(
    loaded: LoadedModel,
    sites: list[Site],
    residuals: Mapping[int, Residual],
    sequences: Sequences,
    settings: TrainingSettings,
) -> float:
    few = replace(sequences, ids=sequences.ids[:_COMPARED])
    with _in_training(sites, residuals, settings) as made:
        losses = [_loss(loaded, made, batch, settings) for batch in few.batches(settings.batch_size, pad_id=0)]
    return _finite(torch.stack(losses).mean(), "the comparison of before and after")


def _finite(loss: Tensor, where: str) -> float:
    value = float(loss.detach())
    if not np.isfinite(value):
        raise TrainingError(f"the training loss is {value} at {where}. Lower `learning_rate` or `scale`.")
    return value


def _endless(sequences: Sequences, settings: TrainingSettings) -> Iterator[Batch]:
    rng = np.random.default_rng(settings.seed)
    while True:
        order = rng.permutation(len(sequences.ids))
        yield from replace(sequences, ids=[sequences.ids[i] for i in order]).batches(settings.batch_size, pad_id=0)
