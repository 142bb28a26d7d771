"""Geometry of a KV cache, read from the model configuration: layers, heads, widths, frames, MLA ranks and RoPE.

Frames (THEORY 1): a key before rotation has the frame `pre_rope`, after rotation `post_rope`. Tensors that are never
rotated have the frame `unrotated`, including the keys of models with learned positions. The name of a captured tensor
joins kind and frame: `keys_pre_rope`, `keys_post_rope`, `keys`, `values`, `latent`, `key_rope_pre_rope`,
`key_rope_post_rope`, `keys_nope`.
"""

from collections import Counter
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from eigencache.errors import NoCacheError, UnsupportedArchitectureError

Kind = Literal["keys", "latent", "key_rope", "keys_nope", "values"]
Frame = Literal["pre_rope", "post_rope", "unrotated"]
KINDS: tuple[Kind, ...] = ("keys", "latent", "key_rope", "keys_nope", "values")

_WITHOUT_CACHE = {
    "linear_attention": "linear attention",
    "mamba": "Mamba",
    "mamba2": "Mamba",
    "recurrent": "recurrent",
    "conv": "convolution",
    "moe": "mixture of experts only",
    "mlp": "MLP only",
    "dummy": "shares the cache of another layer",
}
_NEVER_ATTENDS = {"mamba": "mamba", "mamba2": "mamba2", "falcon_mamba": "mamba", "rwkv": "recurrent", "xlstm": "recurrent"}
_SPECIAL_CACHE = {"compressed_sparse_attention", "heavily_compressed_attention", "minimax_m3_sparse"}
_LEARNED_OR_NO_ROTATION = {"gpt2", "gpt_bigcode", "opt", "bloom", "mpt", "gpt_neo", "biogpt", "xglm", "openai-gpt"}


def tensor_name(kind: str, frame: str) -> str:
    """Return the name of a captured tensor: `keys`, `pre_rope` → `keys_pre_rope`; `keys`, `unrotated` → `keys`."""
    return kind if frame == "unrotated" else f"{kind}_{frame}"


def kind_and_frame(name: str) -> tuple[str, str]:
    """Return kind and frame of a tensor name, the inverse of `tensor_name`: `keys_pre_rope` → (`keys`, `pre_rope`)."""
    for frame in ("pre_rope", "post_rope"):
        if name.endswith(f"_{frame}"):
            return name.removesuffix(f"_{frame}"), frame
    return name, "unrotated"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class Rope(_Frozen):
    """Rotary position embedding: the first `rotary_dim` dimensions of a head are rotated, the others are unchanged."""

    rope_type: str
    theta: float | None
    rotary_dim: int
    scaling: dict[str, Any] = {}


class MLA(_Frozen):
    """Multi-head latent attention: each token caches one latent of `kv_lora_rank` and one rotary key for all heads."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int


class Layer(_Frozen):
    """One layer of a model: its attention and widths (values per token), or the reason why it has no cache."""

    layer_idx: int
    attention: Literal["full", "sliding", "chunked", "none"]
    why_none: str = ""
    window: int | None = None
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    v_head_dim: int = 0
    mla: MLA | None = None

    @property
    def cached(self) -> bool:
        """Whether the layer has a cache."""
        return self.attention != "none"


class KVGeometry(_Frozen):
    """Geometry of the cache of a model: what one token stores in each layer."""

    model_type: str
    attention: Literal["MHA", "GQA", "MQA", "MLA"]
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layers: tuple[Layer, ...]
    rope: Rope | None = None
    mla: MLA | None = None
    key_bias: bool | None = None
    value_bias: bool | None = None
    key_norm: bool | None = None
    notes: tuple[str, ...] = ()

    @property
    def cached_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have a cache."""
        return tuple(layer.layer_idx for layer in self.layers if layer.cached)

    @property
    def skipped(self) -> dict[int, str]:
        """Reason by layer index, for the layers without a cache."""
        return {layer.layer_idx: layer.why_none for layer in self.layers if not layer.cached}

    @property
    def values_per_token(self) -> int:
        """Values stored per token over all layers: keys and values, or latent and rotary key for MLA."""
        latent = sum(layer.mla.kv_lora_rank + layer.mla.qk_rope_head_dim for layer in self.layers if layer.mla)
        return latent or self.expanded_values_per_token

    @property
    def expanded_values_per_token(self) -> int:
        """Values per token of the keys and values that attention reads (for MLA: after expansion of the latent)."""
        return sum(layer.num_key_value_heads * (layer.head_dim + layer.v_head_dim) for layer in self.layers if layer.cached)

    @property
    def width_ratio(self) -> float:
        """Values cached per token and layer, divided by `hidden_size`; above 1 they are linearly dependent (THEORY 5)."""
        return self.values_per_token / (len(self.cached_layers) * self.hidden_size)

    def describe(self) -> str:
        """Return one line: attention, layers, heads, widths, rotation, and the layers without a cache."""
        cached = len(self.cached_layers)
        parts = [self.attention, f"{cached} layer{'s' if cached > 1 else ''} with a cache"]
        if self.mla:
            parts.append(f"latent {self.mla.kv_lora_rank} + rotary key {self.mla.qk_rope_head_dim}")
        else:
            parts.append(f"{self.num_key_value_heads} KV heads × {self.head_dim}")
        windows = Counter(layer.window for layer in self.layers if layer.cached and layer.window)
        parts += [f"{count} of them with a window of {window}" for window, count in windows.items()]
        parts.append(f"RoPE on {self.rope.rotary_dim}" if self.rope else "no rotation")
        parts += [
            word for word, has in (("K bias", self.key_bias), ("V bias", self.value_bias), ("K norm", self.key_norm)) if has
        ]
        if self.skipped:
            parts.append("no cache: " + ", ".join(f"{n} × {why}" for why, n in Counter(self.skipped.values()).items()))
        parts.append(f"{self.values_per_token * 2} bytes per token at 16 bit, KV width / hidden size {self.width_ratio:.2f}")
        return "; ".join(parts)


def _rope(config: Any, layer: Layer) -> Rope | None:
    """Return the rotation of a layer; None for learned positions, ALiBi and models without positions."""
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if getattr(config, "alibi", False) or config.model_type in _LEARNED_OR_NO_ROTATION:
        return None
    if not getattr(config, "use_mem_rope", True):  # zamba2 configures a rotation even if it does not use one
        return None
    if not parameters and getattr(config, "rope_theta", None) is None and getattr(config, "rotary_dim", None) is None:
        return None
    parameters = dict(parameters or {})
    if parameters and all(isinstance(value, dict) for value in parameters.values()):  # one set per layer type
        parameters = dict(parameters.get("full_attention") or next(iter(parameters.values())))
    if "mrope_section" in parameters:
        raise UnsupportedArchitectureError(
            f"{config.model_type} rotates keys along several position axes (mRoPE, sections {parameters['mrope_section']}), "
            "which this version cannot undo: use a text-only model of the family"
        )
    partial = parameters.pop("partial_rotary_factor", None) or getattr(config, "partial_rotary_factor", None) or 1.0
    rotary_dim = getattr(config, "rotary_dim", None) or int(layer.head_dim * partial)
    rotary_dim = layer.mla.qk_rope_head_dim if layer.mla else rotary_dim
    theta = parameters.pop("rope_theta", None) or getattr(config, "rope_theta", None)
    return Rope(rope_type=parameters.pop("rope_type", "default"), theta=theta, rotary_dim=rotary_dim, scaling=parameters)


def _of_layer(config: Any, layer_idx: int) -> Any:
    """Return the configuration of one layer; widths and heads differ between layers in some models."""
    per_layer = getattr(config, "per_layer_config", None)
    return per_layer[layer_idx] if per_layer else config


def _layer_types(config: Any) -> list[str]:
    """Return one type name per layer, from the field that the configuration uses."""
    count = config.num_hidden_layers
    if never := _NEVER_ATTENDS.get(config.model_type):
        return [never] * count
    for field in ("layer_types", "layers_block_type", "block_types"):
        if types := getattr(config, field, None):
            return [types[i % len(types)] for i in range(count)]
    sliding = getattr(_of_layer(config, 0), "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return ["sliding_attention" if sliding else "full_attention"] * count


def _shares_cache(config: Any, layer_idx: int) -> bool:
    """Return whether a layer reads the cache of an earlier layer (last layers of Gemma 3n and 4; Mistral Large 4)."""
    sources = getattr(config, "kv_source_layers", None)
    first_shared = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
    return sources[layer_idx] != layer_idx if sources else layer_idx >= first_shared


def _key_value_heads(config: Any) -> int:
    """Return the number of KV heads in the cache; falcon's newer architecture stores one copy per query head."""
    if config.model_type == "falcon":
        return 1 if config.multi_query and not config.new_decoder_architecture else config.num_attention_heads
    if config.model_type == "gpt_bigcode" and config.multi_query:
        return 1
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _mla(config: Any) -> MLA | None:
    if not getattr(config, "kv_lora_rank", None):
        return None
    return MLA(**{field: getattr(config, field) for field in MLA.model_fields})


def _layer(config: Any, layer_idx: int, kind: str) -> Layer:
    """Return the geometry of a layer with a cache, from its configuration and the name of its type."""
    attention = "sliding" if "sliding" in kind else "chunked" if "chunked" in kind else "full"
    windows = {"sliding": "sliding_window", "chunked": "attention_chunk_size"}
    heads, mla = config.num_attention_heads, _mla(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Layer(
        layer_idx=layer_idx,
        attention=attention,
        window=getattr(config, windows[attention], None) if attention in windows else None,
        num_attention_heads=heads,
        num_key_value_heads=heads if mla else _key_value_heads(config),
        head_dim=mla.qk_nope_head_dim + mla.qk_rope_head_dim if mla else head_dim,
        v_head_dim=mla.v_head_dim if mla else head_dim,
        mla=mla,
    )


def geometry_from_config(config: Any) -> KVGeometry:
    """Return the geometry of the cache from a Hugging Face configuration; no weights are needed.

    Args:
        config: A `transformers` configuration; for a multimodal model, its text decoder is used.

    Raises:
        NoCacheError: No layer caches keys and values.
        UnsupportedArchitectureError: The model uses mRoPE or a cache that does not consist of keys and values.
    """
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    types = ["dummy" if _shares_cache(config, i) else kind for i, kind in enumerate(_layer_types(config))]
    if special := _SPECIAL_CACHE.intersection(types):
        raise UnsupportedArchitectureError(
            f"{config.model_type} uses a cache of another kind than keys and values ({', '.join(sorted(special))}): "
            "this version does not support it"
        )
    if all(kind in _WITHOUT_CACHE for kind in types):
        reasons = ", ".join(sorted({_WITHOUT_CACHE[kind] for kind in types}))
        raise NoCacheError(f"{config.model_type} has no KV cache: all of its {len(types)} layers are {reasons}")
    layers, notes = [], []
    for layer_idx, kind in enumerate(types):
        if kind in _WITHOUT_CACHE:
            layers.append(Layer(layer_idx=layer_idx, attention="none", why_none=_WITHOUT_CACHE[kind]))
        else:
            layers.append(_layer(_of_layer(config, layer_idx), layer_idx, kind))
    first = next(layer for layer in layers if layer.cached)
    rotated = next((layer for layer in layers if layer.attention == "full"), first)
    rope = _rope(_of_layer(config, rotated.layer_idx), rotated)
    config = _of_layer(config, first.layer_idx)
    heads, kv_heads, mla = first.num_attention_heads, first.num_key_value_heads, first.mla
    if config.model_type == "falcon" and config.new_decoder_architecture:
        notes.append(f"this implementation caches {heads} copies of {config.num_kv_heads} KV heads")
    if len({(layer.num_key_value_heads, layer.head_dim) for layer in layers if layer.cached}) > 1:
        notes.append("heads and widths differ between layers; the figures of the first cached layer are shown")
    return KVGeometry(
        model_type=config.model_type,
        attention="MLA" if mla else "MQA" if kv_heads == 1 < heads else "GQA" if kv_heads < heads else "MHA",
        hidden_size=config.hidden_size,
        num_hidden_layers=len(layers),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=first.head_dim,
        layers=tuple(layers),
        rope=rope,
        mla=mla,
        notes=tuple(notes),
    )
