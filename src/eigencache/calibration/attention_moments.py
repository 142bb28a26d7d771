"""Second moments of queries and of attended values, from which rotations for few-bit integers are made.

As in the repository of OSCAR (arXiv 2605.17757), a value has the weight w_t ∝ k_tᵀ C_q k_t, the variance of the logits of
its own key, with mean 1 over the text. All vectors are taken after rotation and not centered.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from eigencache.calibration.session import Session
from eigencache.corpora.sequences import Sequences
from eigencache.errors import UnsupportedArchitectureError
from eigencache.models.capture import Capture, CapturedLayer

Moments = dict[int, Tensor]  # layer_idx → [kv_heads, d, d] float64


@torch.no_grad()
def attended_moments(session: Session, sequences: Sequences) -> tuple[Moments, Moments]:
    """Return Σ q qᵀ / n over the queries of each KV head, and Σ w v vᵀ / Σ w, by layer.

    The text is read twice, since the weights depend on all of its queries.

    Raises:
        UnsupportedArchitectureError: the model uses MLA, or its queries cannot be captured.
    """
    if session.loaded.geometry.mla:
        raise UnsupportedArchitectureError(
            f"{session.loaded.name}: moments of attended values need keys and values, but MLA caches latents."
        )

    def summed(add: Callable[[CapturedLayer, Tensor, dict[int, Tensor]], None], what: str) -> dict[int, Tensor]:
        sums: dict[int, Tensor] = {}
        with Capture(session.loaded.model, session.loaded.geometry, queries=True) as capture:
            done = 0
            for input_ids, mask, indices in sequences.batches(session.batch_size, pad_id=0):
                for layer in capture.run(input_ids.to(session.loaded.device), mask.to(session.loaded.device)):
                    if not {"queries", "queries_post_rope"} & layer.tensors.keys():
                        raise UnsupportedArchitectureError(
                            f"{session.loaded.name}: queries of layer {layer.layer_idx} cannot be captured."
                        )
                    add(layer, mask.bool().to(session.loaded.device), sums)
                done += len(indices)
                session.on_progress(what, done, len(sequences.ids))
        return sums

    queries = {i: total / total[..., -1:, -1:] for i, total in summed(_add_queries, "queries").items()}
    queries = {i: total[..., :-1, :-1] for i, total in queries.items()}
    values = summed(partial(_add_values, queries), "attended values")
    return queries, {i: (total / total[..., -1:, -1:])[..., :-1, :-1] for i, total in values.items()}


def _add_queries(layer: CapturedLayer, mask: Tensor, sums: dict[int, Tensor]) -> None:
    q = layer.tensors.get("queries_post_rope", layer.tensors.get("queries"))
    keys = layer.tensors.get("keys_post_rope", layer.tensors.get("keys"))
    assert q is not None and keys is not None
    grouped = q.unflatten(1, (keys.shape[1], -1)).permute(1, 0, 3, 2, 4)[:, mask].flatten(1, 2)
    _add(sums, layer.layer_idx, grouped, torch.ones_like(grouped[..., :1]))


def _add_values(queries: Moments, layer: CapturedLayer, mask: Tensor, sums: dict[int, Tensor]) -> None:
    keys = layer.tensors.get("keys_post_rope", layer.tensors.get("keys"))
    assert keys is not None
    k, v = (x.transpose(0, 1)[:, mask].double() for x in (keys, layer.tensors["values"]))
    _add(sums, layer.layer_idx, v, ((k @ queries[layer.layer_idx]) * k).sum(-1, keepdim=True))


def _add(sums: dict[int, Tensor], layer_idx: int, x: Tensor, weight: Tensor) -> None:
    """Add Σ w x xᵀ per head, bordered by Σ w x and Σ w, for x [heads, n, d] and weights [heads, n, 1]."""
    x, weight = torch.cat([x.double(), torch.ones_like(x[..., :1], dtype=torch.float64)], -1), weight.double()
    sums[layer_idx] = sums.get(layer_idx, 0) + (x * weight).mT @ x  # type: ignore[operator]
