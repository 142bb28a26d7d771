"""Where a model's keys and queries stand before rotation; every claim is checked against the cache before it is used.

An adapter knows which submodules of an attention layer to listen to and how their outputs can be read. It offers
readings; `capture` keeps the one whose rotation equals what the cache was given, and none if none does. So a new
architecture with the usual submodule names needs no code, and a wrong reading is never reported as a key.

To add a style of architecture: write a class with `modules` and `readings`, decorate it with `@adapter`, and add a
tiny model to `tests/tiny_models.py`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from eigencache.geometry import Layer

Outputs = Mapping[str, Tensor]  # role → output of that submodule, "role.input" → what it was given


@dataclass(frozen=True)
class Reading:
    """One way to read keys and queries before rotation, each [batch, heads, seq, dim]; queries may be unknown."""

    how: str
    keys: Tensor
    queries: Tensor | None = None


class Adapter(Protocol):
    """How one style of attention layer is listened to."""

    name: str

    def modules(self, attention: nn.Module) -> dict[str, nn.Module]:
        """The submodules to listen to, by role; empty when the layer is not of this style."""
        ...

    def readings(self, outputs: Outputs, layer: Layer, seq: int) -> Iterator[Reading]:
        """The possible readings of what those submodules gave, the likeliest first."""
        ...


ADAPTERS: list[Adapter] = []


def adapter(style: Any) -> Any:
    """Register a style of attention layer; the first one whose `modules` is not empty serves a layer."""
    ADAPTERS.append(style())
    return style


def adapter_for(attention: nn.Module) -> Adapter | None:
    """The adapter that knows this attention layer, or None."""
    return next((style for style in ADAPTERS if style.modules(attention)), None)


def _present(attention: nn.Module, names: Mapping[str, str]) -> dict[str, nn.Module]:
    """Role → submodule for those of `names` (role → attribute) that exist as modules."""
    found = {role: getattr(attention, name, None) for role, name in names.items()}
    return {role: module for role, module in found.items() if isinstance(module, nn.Module)}


def _layouts(x: Tensor, dim: int, seq: int) -> Iterator[tuple[str, Tensor]]:
    """x as [batch, heads, seq, dim], read from [batch, seq, heads·dim], [batch, seq, heads, dim] or already so."""
    if x.ndim == 3:
        yield "[b, t, h·d]", x.unflatten(-1, (-1, dim)).transpose(1, 2)
    elif x.ndim == 4:
        if x.shape[1] == seq:
            yield "[b, t, h, d]", x.transpose(1, 2)
        if x.shape[2] == seq:
            yield "[b, h, t, d]", x


@adapter
class LatentAttention:
    """MLA: the rotary key stands in the down-projection beside the latent."""

    name = "latent"

    def modules(self, attention: nn.Module) -> dict[str, nn.Module]:
        """The down-projection marks the style; the query comes from `q_proj`, or from `q_b_proj` with a query rank."""
        found = _present(attention, {"down": "kv_a_proj_with_mqa", "latent": "kv_a_layernorm", "up": "kv_b_proj"})
        if len(found) < 3:
            return {}
        found |= _present(attention, {"key_rope": "k_rope_only_layernorm"})
        return found | (_present(attention, {"queries": "q_b_proj"}) or _present(attention, {"queries": "q_proj"}))

    def readings(self, outputs: Outputs, layer: Layer, seq: int) -> Iterator[Reading]:
        """The numbers behind the latent are the rotary key, one head, normed in some models."""
        assert layer.mla is not None
        key_rope = outputs.get("key_rope", outputs["down"][..., layer.mla.kv_lora_rank :])
        queries = outputs["queries"].unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) if "queries" in outputs else None
        yield Reading("behind the latent", key_rope.reshape(len(key_rope), 1, seq, -1), queries)


@adapter
class SeparateProjections:
    """`k_proj` and `q_proj`, followed by a norm of each where the model has one."""

    name = "separate projections"

    def modules(self, attention: nn.Module) -> dict[str, nn.Module]:
        """Projections and norms by the names in use."""
        found = _present(attention, {"keys": "k_proj", "queries": "q_proj"})
        for norm in ("norm", "layernorm"):
            found |= _present(attention, {"keys_normed": f"k_{norm}", "queries_normed": f"q_{norm}"})
        return found if "keys" in found else {}

    def readings(self, outputs: Outputs, layer: Layer, seq: int) -> Iterator[Reading]:
        """After the norm, if what it is given is the projection itself; before it otherwise.

        A norm that comes after rotation would pass for keys that are never rotated.
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
    """One projection gives queries, keys and values: one after the other, or group by group."""

    name = "fused projection"
    _NAMES = ("qkv_proj", "query_key_value", "Wqkv", "c_attn")

    def modules(self, attention: nn.Module) -> dict[str, nn.Module]:
        """The fused projection under any of its names."""
        for name in self._NAMES:
            if found := _present(attention, {"fused": name}):
                return found
        return {}

    def readings(self, outputs: Outputs, layer: Layer, seq: int) -> Iterator[Reading]:
        """All queries then all keys (phi3, gpt2, falcon's MQA), or [queries, key, value] per group (gpt_neox, falcon)."""
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
