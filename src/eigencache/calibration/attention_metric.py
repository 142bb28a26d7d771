"""The attention metric: the logit error caused by a key error, and the output error caused by a value error.

Keys: Σ E[q qᵀ]/d over the query heads of a group; before rotation, averaged over the lags that attention uses.
Values: Σ W_O,h W_O,hᵀ. A latent affects both through its expansion. All tokens have the same weight: the factor Σ a² of
THEORY 4.3 is omitted. See THEORY 4.2, 4.3 and 9.
"""

import torch
from torch import Tensor, nn

from eigencache.calibration.metrics import Metrics, metric
from eigencache.calibration.session import Session
from eigencache.corpora.sequences import Sequences
from eigencache.errors import UnsupportedArchitectureError
from eigencache.geometry import Layer
from eigencache.memory import release
from eigencache.models.capture import Capture, CapturedLayer
from eigencache.models.linear_map import linear_map
from eigencache.models.load import LoadedModel
from eigencache.models.output_projection import OUTPUT_PROJECTIONS, output_projection, output_rows
from eigencache.spectral.metric import lag_averaged
from eigencache.spectral.rope import Rotation


@metric("attention", common_scale=False)
def attention_metrics(session: Session, sequences: Sequences, rotations: dict[int, Rotation]) -> Metrics:
    """Measure the attention metric per KV head, for every slot in every frame it has.

    Args:
        session: the model and how it is run.
        sequences: the text.
        rotations: rotation of the keys by layer.

    Raises:
        UnsupportedArchitectureError: queries, their keys or the output projection cannot be found.
    """
    queries: Metrics = {}
    lags: dict[int, Tensor] = {}
    done = 0
    with Capture(session.loaded.model, session.loaded.geometry, queries=True) as capture:
        for input_ids, attention_mask, indices in sequences.batches(session.batch_size, pad_id=0):
            padded = bool((attention_mask == 0).any())
            mask = attention_mask.to(session.loaded.device) if padded else None
            for layer in capture.run(input_ids.to(session.loaded.device), mask):
                _add_queries(queries, layer, attention_mask, session.loaded.name)
                if layer.layer_idx in rotations:
                    lags[layer.layer_idx] = _added(lags.get(layer.layer_idx), lag_weights(layer, attention_mask))
            release()
            done += len(indices)
            session.on_progress("attention metric", done, len(sequences.ids))
    tokens = sum(map(len, sequences.ids))
    metrics: Metrics = {}
    for name, layers in queries.items():
        for layer_idx, total in layers.items():
            layer = session.loaded.geometry.layers[layer_idx]
            moments = total / tokens / layer.head_dim
            nope = layer.mla.qk_nope_head_dim if layer.mla else 0
            kind = ("key_rope" if layer.mla else "keys") + name.removeprefix("queries")
            matrix = _grouped(moments[:, nope:, nope:], 1 if layer.mla else layer.num_key_value_heads)
            if name == "queries_pre_rope":
                matrix = torch.stack([lag_averaged(c, rotations[layer_idx], lags[layer_idx]) for c in matrix])
            metrics.setdefault(kind, {})[layer_idx] = matrix
            attention = _attention(session.loaded, layer_idx)
            outputs = output_metric(attention, layer)
            if layer.mla:
                metrics.setdefault("latent", {})[layer_idx] = latent_metric(attention, layer, moments, outputs)
            else:
                metrics.setdefault("values", {})[layer_idx] = _grouped(outputs, layer.num_key_value_heads)
    return metrics


def _add_queries(queries: Metrics, layer: CapturedLayer, mask: Tensor, model: str) -> None:
    """Add Σ q qᵀ per query head over the tokens of one batch, without padding."""
    names = [name for name in layer.tensors if name.startswith("queries")]
    if not names:
        raise UnsupportedArchitectureError(
            f"{model}: the queries of layer {layer.layer_idx} cannot be captured. Use `metric` fisher or frobenius."
        )
    for name in names:
        x = layer.tensors[name]
        rows = x.transpose(0, 1).flatten(1, 2)[:, mask.bool().flatten().to(x.device)].double()
        layers = queries.setdefault(name, {})
        layers[layer.layer_idx] = layers.get(layer.layer_idx, 0) + rows.mT @ rows


def lag_weights(layer: CapturedLayer, mask: Tensor) -> Tensor:
    """Return the attention mass at each lag Δ = 0, 1, …, summed over heads and queries [seq] float64.

    Attention is causal; a sliding window of the layer is not applied.

    Args:
        layer: captured queries and keys of one batch.
        mask: 1 for tokens, 0 for padding [batch, seq].
    """
    queries, tensors = layer.tensors["queries_post_rope"].float(), layer.tensors
    if "latent" in tensors:
        nope, rope = tensors["keys_nope"], tensors["key_rope_post_rope"]
        keys = torch.cat([nope, rope.expand(-1, nope.shape[1], -1, -1)], -1).float()
    else:
        keys = tensors["keys_post_rope"].float()
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
    seq = queries.shape[2]
    future = torch.ones(seq, seq, dtype=torch.bool, device=queries.device).triu(1)
    weights = torch.zeros(seq, dtype=torch.float64)
    lag = (torch.arange(seq)[:, None] - torch.arange(seq)).clamp_min(0).flatten()
    for q, k, kept in zip(queries, keys, mask, strict=True):  # one row at a time, since [heads, seq, seq] is large
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf).softmax(-1).sum(0).double().cpu()
        weights.index_add_(0, lag, (scores * kept[:, None]).flatten())
    return weights


def _added(known: Tensor | None, more: Tensor) -> Tensor:
    """Add lag weights of batches whose lengths may differ."""
    if known is None:
        return more
    length = max(len(known), len(more))
    return sum(torch.nn.functional.pad(x, (0, length - len(x))) for x in (known, more))  # type: ignore[return-value]


def _grouped(metric: Tensor, kv_heads: int) -> Tensor:
    """Sum matrices [query heads, d, d] over the query heads of each KV head."""
    return metric.unflatten(0, (kv_heads, -1)).sum(1)


def _attention(loaded: LoadedModel, layer_idx: int) -> nn.Module:
    for module in loaded.model.modules():
        if getattr(module, "layer_idx", None) == layer_idx and output_projection(module):
            return module
    raise UnsupportedArchitectureError(
        f"{loaded.name}: layer {layer_idx} has no output projection of a known name "
        f"({', '.join(OUTPUT_PROJECTIONS)}). Use `metric` fisher or frobenius."
    )


def output_metric(attention: nn.Module, layer: Layer) -> Tensor:
    """Return W_O,h W_O,hᵀ per query head [heads, v_head_dim, v_head_dim]: the squared output error of a value error."""
    projection = output_projection(attention)
    assert projection is not None
    weights = output_rows(projection[1], layer)[0].double()
    return weights @ weights.mT


def latent_metric(attention: nn.Module, layer: Layer, queries: Tensor, outputs: Tensor) -> Tensor:
    """Return M_c = Σ_h [W_UK,hᵀ C_q,h W_UK,h + W_UV,hᵀ W_O,h W_O,hᵀ W_UV,h], `[1, rank, rank]`, α = β = 1 (THEORY 9).

    Args:
        attention: the attention module of the layer.
        layer: geometry of the layer.
        queries: second moments per query head, divided by d; only the part without rotation is used.
        outputs: output metric per query head.
    """
    mla = layer.mla
    assert mla is not None
    up = linear_map(attention.kv_b_proj, mla.kv_lora_rank, f"layer {layer.layer_idx}, kv_b_proj")[0].detach().double()  # type: ignore[arg-type]
    nope = mla.qk_nope_head_dim
    keys, values = up.unflatten(0, (layer.num_attention_heads, -1)).split(
        [nope, up.shape[0] // layer.num_attention_heads - nope], 1
    )
    through_keys = keys.mT @ queries[:, :nope, :nope] @ keys
    through_values = values.mT @ outputs @ values
    return (through_keys + through_values).sum(0, keepdim=True)
