"""Settings of PCA codecs, and what they mean for a model: targets that it caches, and widths of transformed vectors."""

from dataclasses import dataclass, replace
from typing import Literal

from eigencache.codec.sinks_and_window import FIRST_EXACT
from eigencache.errors import CodecError
from eigencache.geometry import KVGeometry, Layer
from eigencache.models.load import LoadedModel
from eigencache.records.base import Scope

Target = Literal["k", "v", "kv", "latent", "key_rope"]
Basis = Literal["fitted", "pooled", "random"]
KINDS_OF: dict[str, tuple[str, ...]] = {
    "k": ("keys",),
    "v": ("values",),
    "kv": ("keys", "values"),
    "latent": ("latent",),
    "key_rope": ("key_rope",),
}


@dataclass(frozen=True)
class PCASettings:
    """Settings of a PCA codec.

    Args:
        target: cached tensors to compress.
        scope: vectors that share a basis: each head, each layer, or all layers.
        frame: keys before or after rotation.
        metric: error metric.
        centered: subtract the mean.
        alpha: exponent of the metric.
        basis: `fitted`; `pooled`, one for all heads of a layer; or `random`, a control.
        sinks: first tokens that stay in 16 bits.
    """

    target: Target = "v"
    scope: Scope = "head"
    frame: Literal["pre", "post"] = "pre"
    metric: str = "frobenius"
    centered: bool = True
    alpha: float = 1.0
    basis: Basis = "fitted"
    sinks: int = FIRST_EXACT

    def of(self, target: Target) -> "PCASettings":
        """Return these settings with another target."""
        return replace(self, target=target)

    def describe(self) -> str:
        """Return one line for tables."""
        parts = [self.target, self.scope]
        if self.target in ("k", "kv", "key_rope"):
            parts.append(f"{self.frame}-RoPE")
        parts.append(self.metric + (f"^{self.alpha:g}" if self.alpha != 1 and self.metric != "frobenius" else ""))
        parts += ["centered" if self.centered else "uncentered"]
        return " · ".join(parts + ([] if self.basis == "fitted" else [f"{self.basis} basis"]))


def targets_of(loaded: LoadedModel) -> tuple[Target, ...]:
    """Return the targets that the cache of a model has, the most common first."""
    return ("latent", "key_rope") if loaded.geometry.mla else ("v", "k", "kv")


def check_target(loaded: LoadedModel, target: Target) -> None:
    """Raise `CodecError` for a target that the model does not cache."""
    cached = sorted({kind for target_name in targets_of(loaded) for kind in KINDS_OF[target_name]})
    if missing := [kind for kind in KINDS_OF[target] if kind not in cached]:
        raise CodecError(
            f"{loaded.name} does not cache {missing[0]}: it caches {' and '.join(cached)}. Choose another `target`."
        )


def width_of(geometry: KVGeometry, settings: PCASettings) -> int:
    """Return the width of the widest transformed vector, the full rank of `fit`, from the architecture alone."""
    widths = []
    for kind in KINDS_OF[settings.target]:
        sizes = [cached_size(layer, kind) for layer in geometry.layers if layer.cached]
        whole = [heads * dim for heads, dim in sizes]
        widths.append({"head": max(dim for _, dim in sizes), "layer": max(whole), "all": sum(whole)}[settings.scope])
    return max(widths)


def cached_size(layer: Layer, kind: str) -> tuple[int, int]:
    """Return the KV heads of one layer and the numbers per head, for a kind of cached tensor."""
    if layer.mla:
        return 1, {"latent": layer.mla.kv_lora_rank, "key_rope": layer.mla.qk_rope_head_dim}[kind]
    return layer.num_key_value_heads, {"keys": layer.head_dim, "values": layer.v_head_dim}[kind]
