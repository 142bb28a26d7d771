"""Adapters: where the attention layers of an architecture have their keys and queries before rotation.

An adapter names the submodules of an attention layer to hook and offers possible readings of their outputs. `capture` uses
the reading whose rotation equals the stored keys, or none. A new architecture with common submodule names therefore needs
no code, and a wrong reading is never reported.

To add a style of architecture: write a class with `modules` and `readings`, decorate it with `@adapter`, and add a
tiny model to `tests/helpers/tiny_models.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from eigencache.geometry import Layer

Outputs = Mapping[str, Tensor]  # role → output of that submodule, "role.input" → its input


@dataclass(frozen=True)
class Reading:
    """One reading of keys and queries before rotation, each [batch, heads, seq, dim]; queries may be unknown.

    Attributes:
        how: Name of the reading.
        keys: Keys before rotation; for MLA the rotary key.
        queries: Queries before rotation, or None.
    """

    how: str
    keys: Tensor
    queries: Tensor | None = None


class Adapter(Protocol):
    """Interface for one style of attention layer."""

    name: str

    def modules(self, attention: nn.Module) -> dict[str, nn.Module]:
        """Return the submodules to hook, by role; empty for a layer of another style."""
        ...

    def readings(self, outputs: Outputs, layer: Layer, seq: int) -> Iterator[Reading]:
        """Yield the possible readings of the outputs of these submodules, the most likely first.

        Args:
            outputs: Outputs and inputs by role.
            layer: Geometry of the layer.
            seq: Sequence length.
        """
        ...


ADAPTERS: list[Adapter] = []


def adapter(style: Any) -> Any:
    """Register a style of attention layer; a layer uses the first style whose `modules` is not empty."""
    ADAPTERS.append(style())
    return style


def adapter_for(attention: nn.Module) -> Adapter | None:
    """Return the adapter for an attention layer; None if no style matches."""
    return next((style for style in ADAPTERS if style.modules(attention)), None)


def _present(attention: nn.Module, names: Mapping[str, str]) -> dict[str, nn.Module]:
    """Return the existing submodules by role; `names` maps roles to attributes."""
    modules = {role: getattr(attention, name, None) for role, name in names.items()}
    return {role: module for role, module in modules.items() if isinstance(module, nn.Module)}


def _layouts(x: Tensor, dim: int, seq: int) -> Iterator[tuple[str, Tensor]]:
    """Yield x as [batch, heads, seq, dim], for each layout that x may have, with the name of the layout."""
    if x.ndim == 3:
        yield "[b, t, h·d]", x.unflatten(-1, (-1, dim)).transpose(1, 2)
    elif x.ndim == 4:
        if x.shape[1] == seq:
            yield "[b, t, h, d]", x.transpose(1, 2)
        if x.shape[2] == seq:
            yield "[b, h, t, d]", x


@adapter
class LatentAttention:
    """MLA: the down-projection returns the latent and the rotary key."""

    name = "latent"

    def modules(self, attention: nn.Module) -> dict[str, nn.Module]:
        """Return the latent projections, and the projection of queries (`q_b_proj` in models with a query rank)."""
        modules = _present(attention, {"down": "kv_a_proj_with_mqa", "latent": "kv_a_layernorm", "up": "kv_b_proj"})
        if len(modules) < 3:
            return {}
        modules |= _present(attention, {"key_rope": "k_rope_only_layernorm"})
        return modules | (_present(attention, {"queries": "q_b_proj"}) or _present(attention, {"queries": "q_proj"}))

    def readings(self, outputs: Outputs, layer: Layer, seq: int) -> Iterator[Reading]:
        """Yield the dimensions after the latent as the rotary key, one head; some models normalize it."""
        assert layer.mla is not None
        key_rope = outputs.get("key_rope", outputs["down"][..., layer.mla.kv_lora_rank :])
        queries = outputs["queries"].unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) if "queries" in outputs else None
        yield Reading("behind the latent", key_rope.reshape(len(key_rope), 1, seq, -1), queries)


@adapter
class SeparateProjections:
    """Separate projections `k_proj` and `q_proj`, followed by norms in some models."""

    name = "separate projections"

    def modules(self, attention: nn.Module) -> dict[str, nn.Module]:
        """Return the projections and norms, by the common names."""
        modules = _present(attention, {"keys": "k_proj", "queries": "q_proj"})
        for norm in ("norm", "layernorm"):
            modules |= _present(attention, {"keys_normed": f"k_{norm}", "queries_normed": f"q_{norm}"})
        return modules if "keys" in modules else {}

    def readings(self, outputs: Outputs, layer: Layer, seq: int) -> Iterator[Reading]:
        """Yield the output of the norm if its input is the projection, and the output of the projection.

        The output of a norm after the rotation would be mistaken for keys without rotation.
        """
        for stage in ("_normed", ""):
            if (keys := outputs.get(f"keys{stage}")) is None or (
                stage and not self._norms_the_projection(outputs, layer, seq)
            ):
                continue
            for how, read in _layouts(keys, layer.head_dim, seq):
                queries = outputs.get(f"queries{stage}")
                matching = {} if queries is None else dict(_layouts(queries, layer.head_dim, seq))
                yield Reading(how + (" normed" if stage else ""), read, matching.get(how))

    @staticmethod
    def _norms_the_projection(outputs: Outputs, layer: Layer, seq: int) -> bool:
        (_, projected), *_ = _layouts(outputs["keys"], layer.head_dim, seq)
        given = outputs["keys_normed.input"]
        return any(
            torch.equal(read, projected) for _, read in _layouts(given, layer.head_dim, seq) if read.shape == projected.shape
        )


@adapter
class FusedProjection:
    """One projection for queries, keys and values: one after the other, or group by group."""

    name = "fused projection"
    _NAMES = ("qkv_proj", "query_key_value", "Wqkv", "c_attn")

    def modules(self, attention: nn.Module) -> dict[str, nn.Module]:
        """Return the fused projection, by any of the common names."""
        for name in self._NAMES:
            if modules := _present(attention, {"fused": name}):
                return modules
        return {}

    def readings(self, outputs: Outputs, layer: Layer, seq: int) -> Iterator[Reading]:
        """Yield all queries then all keys (phi3, gpt2, falcon MQA), and [queries, key, value] per group (gpt_neox)."""
        fused, dim, heads = outputs["fused"], layer.head_dim, layer.num_attention_heads
        columns = fused.shape[-1] // dim
        kv_heads = (columns - heads) // 2
        if columns * dim != fused.shape[-1] or kv_heads < 1 or heads + 2 * kv_heads != columns:
            return
        parts = fused.unflatten(-1, (columns, dim)).transpose(1, 2)
        yield Reading("one after the other", parts[:, heads : heads + kv_heads], parts[:, :heads])
        group = heads // kv_heads
        grouped = fused.unflatten(-1, (kv_heads, group + 2, dim))
        keys, queries = grouped[..., -2, :].transpose(1, 2), grouped[..., :-2, :].flatten(2, 3).transpose(1, 2)
        yield Reading("group by group", keys, queries)
