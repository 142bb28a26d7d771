"""Tables of residual adapters: the operators by layer, and the loss of truncating them, compared with direct PCA."""

import math

from eigencache.records.adapter import AdapterRecord, Method, Operator
from eigencache.records.quality import Quality
from eigencache.report.core.measured import ABSENT
from eigencache.report.core.table import Table

METHODS: dict[Method, str] = {
    "operator-svd": "SVD of M",
    "operator-svd-centered": "SVD of M, centered",
    "random-basis": "Random basis, centered",
    "adapted-pca": "PCA of adapted vectors",
    "direct-pca": "Direct PCA, no adapter",
}
TENSORS = {"v": "values", "k": "keys before rotation"}
_CLASSIC_RANK = 32


def shown_rank(operator: Operator) -> int:
    """Return the rank at which tables show shares: 32 as in the original tables, or half of a width of at most 32."""
    return _CLASSIC_RANK if operator.width > _CLASSIC_RANK else max(1, operator.width // 2)


def operator_table(record: AdapterRecord) -> Table:
    """Return one row per layer: distance of M from the identity, its spectrum, and the variance that r directions keep."""
    columns = (
        "Layer",
        "Distance from I",
        "Condition number",
        "Effective rank",
        "Gains equal to 1",
        "r of p",
        "r/p",
        "Energy@r of M",
        "Variance in M's r",
        "Variance in the best r",
    )
    rows = []
    for o in record.operators:
        r = shown_rank(o)
        shares = (r / o.width, o.energy[r], o.variance_kept[r], o.variance_energy[r])
        rows.append(
            (
                str(o.layer_idx),
                f"{o.distance:.4f}",
                "∞" if math.isinf(o.condition_number) else f"{o.condition_number:.3g}",
                f"{o.effective_rank:.1f}",
                f"{o.unit_gains}",
                f"{r} of {o.width}",
                *(f"{100 * share:.1f} %" for share in shares),
            )
        )
    t = record.training
    weight = "" if t.tail_weight is None else f", weight {t.tail_weight:g}"
    loss = t.loss if t.loss_rank is None else f"{t.loss} (r = {t.loss_rank}{weight})"
    notes = (
        f"Trained: loss {loss}, {t.steps} steps, learning rate {t.learning_rate:g}, inner rank {t.inner_rank}, "
        f"scale {t.scale:g}, {t.parameters:,} parameters; loss {t.loss_before:.4f} → {t.loss_after:.4f} on "
        f"{record.calibration.name}, {record.calibration.tokens:,} tokens.",
        "Energy@r of M: share of Σσ² in its r largest singular values (gains); the identity has r/p for any vectors.",
        "Variance: share of the centered variance that r directions keep. In M's r: of the adapted vectors, in the first r "
        "left singular vectors of M. In the best r: of the vectors of the frozen model, in their leading r directions.",
    )
    title = f"{record.model.name}: M = I + s·W_out W_in on {TENSORS[record.target]}, heads of a layer concatenated"
    return Table(title, columns, tuple(rows), notes=notes, warnings=tuple(record.warnings))


def truncation_table(record: AdapterRecord) -> Table:
    """Return one row per rank and one column per method: perplexity and, below it, ΔNLL with its interval."""
    by_rank: dict[int, dict[Method, Quality]] = {}
    for result in sorted(record.results, key=lambda result: result.rank):
        by_rank.setdefault(result.rank, {})[result.method] = result.quality
    rows = tuple(
        (
            str(rank),
            f"{by_method['direct-pca'].compression_ratio:.2f}",
            *(_cost(by_method.get(method)) for method in METHODS),
        )
        for rank, by_method in by_rank.items()
    )
    scored = record.results[0].quality
    notes = (
        f"Uncompressed: perplexity {math.exp(record.frozen_nll):.3f} (frozen model), {math.exp(record.adapted_nll):.3f} "
        "(adapted model).",
        "Cells: perplexity; ΔNLL in nats per token above the same model with its uncompressed cache, with its 95 % interval "
        "(paired bootstrap over sequences). Bases are from the training text; the rest of the cache is in 16 bits.",
        f"{record.corpus.name}: {scored.tokens:,} tokens scored in {scored.sequences} sequences; "
        f"{record.protocol.describe()}.",
    )
    title = f"{record.model.name}: {TENSORS[record.target]} cached as r coefficients per layer"
    return Table(title, ("Rank", "Ratio K+V", *METHODS.values()), rows, notes=notes)


def _cost(quality: Quality | None) -> str:
    if quality is None:
        return ABSENT
    interval = quality.delta_nll_interval
    between = f" [{_nats(interval[0])}, {_nats(interval[1])}]" if interval else ""
    return f"{math.exp(quality.nll):.3f}\n{_nats(quality.delta_nll)}{between}"


def _nats(value: float) -> str:
    """Return a signed number; what rounds to zero is `+0.0000`."""
    return f"{round(value, 4) + 0.0:+.4f}"
