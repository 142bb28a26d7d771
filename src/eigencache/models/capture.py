"""Capture of cached keys, values and latents in every frame, from forward passes of a model.

Values, keys after rotation and MLA latents are taken from the call that stores them. Keys before rotation are taken from the
projection by forward hooks and are verified: rotating them must reproduce the stored keys. This test, not the name of the
model, identifies the layout of the projection and the pairing of the rotation. If no reading passes it, a layer is captured
after rotation only, and `Capture.notes` reports it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from eigencache.errors import LayerError, NoCacheError, UnsupportedArchitectureError
from eigencache.geometry import MLA, KVGeometry
from eigencache.models.adapters import Adapter, Reading, adapter_for
from eigencache.spectral.rope import PAIRINGS, Angles, Pairing, angles_from, rotate

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class CapturedLayer:
    """Cached tensors of one layer for one batch.

    Attributes:
        layer_idx: Layer.
        tensors: [batch, heads, seq, dim] by name (`keys_pre_rope`, …).
        angles: Angles of the rotation; None without rotation.
        pairing: Pairing of the rotation; None without rotation.
    """

    layer_idx: int
    tensors: dict[str, Tensor]
    angles: Angles | None = None
    pairing: Pairing | None = None


@dataclass
class _Listener:
    """One hooked attention layer with the outputs of its submodules in the current forward pass."""

    attention: nn.Module
    adapter: Adapter
    outputs: dict[str, Tensor]
    tables: Any = None


@dataclass(frozen=True)
class _Identified:
    """Reading and pairing that reproduced the stored keys of a layer; `pairing` is None for keys without rotation."""

    how: str
    pairing: Pairing | None


class Capture:
    """Context manager that captures the cached tensors of a model; all hooks are removed on exit, also after an error.

    with Capture(model, geometry) as capture:
        for layer in capture.run(input_ids, attention_mask):
            layer.tensors["keys_pre_rope"]          # [batch, kv_heads, seq, head_dim]

    Args:
        model: The model.
        geometry: Its geometry.
        layers: Layers to capture; default: all layers with a cache.
        queries: Capture queries as well, in both frames.

    Raises:
        LayerError: A layer does not exist or has no cache.
    """

    def __init__(
        self, model: PreTrainedModel, geometry: KVGeometry, *, layers: Iterable[int] | None = None, queries: bool = False
    ) -> None:
        self.model, self.geometry, self.queries = model, geometry, queries
        self.layers = check_layers(geometry, layers)
        self._said: dict[str, list[int]] = {}
        self._handles: list[Any] = []
        self._listeners: dict[int, _Listener] = {}
        self._identified: dict[int, _Identified | None] = {}

    def __enter__(self) -> Self:
        layers = set(self.layers)
        for module in self.model.modules():
            layer_idx = getattr(module, "layer_idx", None)
            if layer_idx in layers and layer_idx not in self._listeners and (style := adapter_for(module)):
                self._listen(layer_idx, module, style)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._listeners.clear()

    def _listen(self, layer_idx: int, attention: nn.Module, style: Adapter) -> None:
        listener = self._listeners[layer_idx] = _Listener(attention, style, {})

        def before(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            tables = kwargs.get("position_embeddings")
            listener.tables = tables if tables is not None else next((a for a in args if _is_tables(a)), None)

        self._handles.append(attention.register_forward_pre_hook(before, with_kwargs=True))
        for role, module in style.modules(attention).items():

            def after(_module: nn.Module, args: tuple, output: Tensor, role: str = role) -> None:
                listener.outputs[role], listener.outputs[f"{role}.input"] = output, args[0]

            self._handles.append(module.register_forward_hook(after))

    @property
    def style(self) -> str:
        """Names of the adapters in use, for a record."""
        styles = {
            self._listeners[i].adapter.name if self._identified.get(i) else "generic: the cache itself" for i in self.layers
        }
        return ", ".join(sorted(styles))

    @property
    def readings(self) -> dict[int, str]:
        """Name of the verified reading of the projection, by layer; complete after the first `run`."""
        return {layer_idx: found.how for layer_idx, found in self._identified.items() if found}

    @torch.no_grad()
    def run(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[CapturedLayer]:
        """Run one forward pass without logits and return the cached tensors of every layer.

        Args:
            input_ids: Token ids [batch, seq].
            attention_mask: 1 for tokens and 0 for padding on the right [batch, seq]; default: no padding.

        Returns:
            Layers in order, with tensors in the dtype of the model on the devices of their layers.

        Raises:
            NoCacheError: The model stored nothing in its cache.
            UnsupportedArchitectureError: The projections of an MLA layer were not found.
        """
        cache, stored = tapped_cache(self.model)
        for listener in self._listeners.values():
            listener.outputs.clear()
        self.model.base_model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True)
        if not stored:
            raise NoCacheError(f"{self.geometry.model_type} stored no keys and values in its cache")
        for layer_idx in self.layers:
            if layer_idx not in stored:
                self._say("stored nothing: no cache of its own", layer_idx)
        return [self._assemble(i, *stored[i]) for i in self.layers if i in stored]

    @property
    def notes(self) -> list[str]:
        """Sentences on tensors that could not be captured, with their layers; complete after the first `run`."""
        return [f"layers {_listed(layers)}: {what}" for what, layers in self._said.items()]

    def _say(self, what: str, layer_idx: int) -> None:
        layers = self._said.setdefault(what, [])
        if layer_idx not in layers:
            layers.append(layer_idx)

    def _assemble(self, layer_idx: int, keys: Tensor, values: Tensor) -> CapturedLayer:
        listener, prefix = self._listeners.get(layer_idx), "keys"
        tensors, rotated = {"values": values}, keys
        if mla := self.geometry.layers[layer_idx].mla:
            prefix = "key_rope"
            tensors, rotated = self._latent(layer_idx, listener, mla, keys, values)
        if not rotated.shape[-1]:  # MLA without a rotary key
            return CapturedLayer(layer_idx, tensors)
        identified, reading, angles = self._identify(layer_idx, listener, rotated)
        if identified and reading and listener:
            if identified.pairing is None:
                tensors[prefix] = rotated
            else:
                tensors[f"{prefix}_pre_rope"] = _expand(reading.keys, rotated)
                tensors[f"{prefix}_post_rope"] = rotated
            if self.queries:
                tensors |= self._queries(listener, reading, identified, angles, mla.qk_nope_head_dim if mla else 0)
        elif self.geometry.rope is None:
            tensors[prefix] = rotated
        else:
            tensors[f"{prefix}_post_rope"] = rotated
            self._say("keys before rotation could not be verified against the cache; after rotation only", layer_idx)
        pairing = identified.pairing if identified else None
        return CapturedLayer(layer_idx, tensors, angles if pairing else None, pairing)

    def _latent(
        self, layer_idx: int, listener: _Listener | None, mla: MLA, keys: Tensor, values: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return latent, expanded keys and values of an MLA layer, and its stored rotary key [batch, 1, seq, rope]."""
        kind = self.geometry.model_type
        if listener is None:
            raise UnsupportedArchitectureError(
                f"{kind}: layer {layer_idx} has no latent projections with the names kv_a_proj_with_mqa, kv_a_layernorm and "
                "kv_b_proj: this version does not support it"
            )
        attention, up = listener.attention, listener.outputs["up"]
        nope = getattr(attention, "qk_nope_head_dim", mla.qk_nope_head_dim)
        v_head_dim = getattr(attention, "v_head_dim", mla.v_head_dim)
        if up.shape[-1] % (nope + v_head_dim):
            raise UnsupportedArchitectureError(
                f"{kind}: layer {layer_idx} expands its latent to {up.shape[-1]} values, which are not divisible into heads "
                f"of {nope} + {v_head_dim}"
            )
        up = up.reshape(keys.shape[0], keys.shape[2], -1, nope + v_head_dim)
        keys_nope, expanded = up.transpose(1, 2).split([nope, v_head_dim], dim=-1)
        if keys.shape[1] == 1 and keys.shape[-1] == mla.kv_lora_rank:  # the latent itself is stored
            latent, rotated = keys, values
        else:  # older transformers store the expanded keys and values
            latent = listener.outputs["latent"].unsqueeze(1) * getattr(attention, "mla_scale_kv_lora", 1.0)
            rotated = keys[:, :1, :, nope:]
        return {"latent": latent, "keys_nope": keys_nope, "values": expanded}, rotated

    def _identify(
        self, layer_idx: int, listener: _Listener | None, stored: Tensor
    ) -> tuple[_Identified | None, Reading | None, Angles | None]:
        """Return the reading whose rotation equals the stored keys; identified on the first batch."""
        if listener is None or not listener.outputs:
            return None, None, None
        angles = None if listener.tables is None else angles_from(_to(listener.tables, stored.device))
        known = layer_idx in self._identified
        identified = self._identified.get(layer_idx)
        for reading in listener.adapter.readings(listener.outputs, self.geometry.layers[layer_idx], stored.shape[2]):
            if known:
                if identified and reading.how == identified.how:
                    return identified, reading, angles
                continue
            for pairing in (None, *(PAIRINGS if angles else ())):
                if _reproduces(_expand(reading.keys, stored), stored, angles, pairing):
                    identified = self._identified[layer_idx] = _Identified(reading.how, pairing)
                    return identified, reading, angles
        self._identified.setdefault(layer_idx, None)
        return None, None, angles

    def _queries(
        self, listener: _Listener, reading: Reading, identified: _Identified, angles: Angles | None, nope: int
    ) -> dict[str, Tensor]:
        """Return queries [batch, heads, seq, dim] in the frames of the keys; for MLA the rotary part is last."""
        if reading.queries is None:
            return {}
        queries = reading.queries * getattr(listener.attention, "mla_scale_q_lora", 1.0)
        if identified.pairing is None or angles is None:
            return {"queries": queries}
        rotated = rotate(queries[..., nope:], angles, identified.pairing)
        return {"queries_pre_rope": queries, "queries_post_rope": torch.cat((queries[..., :nope], rotated), -1)}


def check_layers(geometry: KVGeometry, layers: Iterable[int] | None) -> tuple[int, ...]:
    """Return the requested layers without repetitions; default: all layers with a cache.

    Args:
        geometry: Geometry of the model.
        layers: Layer indices, or None.

    Raises:
        LayerError: A layer does not exist or has no cache, or no layer was given.
    """
    if layers is None:
        return geometry.cached_layers
    chosen = tuple(dict.fromkeys(layers))
    for layer_idx in chosen:
        if not 0 <= layer_idx < geometry.num_hidden_layers:
            raise LayerError(f"no layer {layer_idx}: the model has layers 0 to {geometry.num_hidden_layers - 1}")
        if why := geometry.skipped.get(layer_idx):
            raise LayerError(f"layer {layer_idx} has no KV cache ({why}): use layers {_listed(geometry.cached_layers)}")
    if not chosen:
        raise LayerError("`layers` is empty: give layer indices, for example 0,6,12")
    return chosen


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def tapped_cache(model: PreTrainedModel, *, track: bool = False) -> tuple[DynamicCache, dict[int, tuple[Tensor, Tensor]]]:
    """Return an ordinary dynamic cache, and a dictionary that receives the keys and values stored in it.

    Args:
        model: The model.
        track: Retain the gradients of the stored tensors in a backward pass.

    Returns:
        The cache, and the latest stored (keys, values) by layer.
    """
    cache = DynamicCache(config=model.config)
    stored: dict[int, tuple[Tensor, Tensor]] = {}

    def tap(layer_idx: int, layer: Any) -> None:
        store = layer.update

        def update(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
            if track:
                keys, values = (x if x.requires_grad else x.detach().requires_grad_() for x in (keys, values))
                keys.retain_grad()
                values.retain_grad()
            stored[layer_idx] = (keys, values)
            return store(keys, values, *args, **kwargs)

        layer.update = update

    for layer_idx, layer in enumerate(cache.layers):
        if hasattr(layer, "update"):
            tap(layer_idx, layer)
    return cache, stored


def _is_tables(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(v, Tensor) and v.ndim == 3 for v in value)


def _to(tables: Any, device: torch.device) -> Any:
    return tables.to(device) if isinstance(tables, Tensor) else tuple(table.to(device) for table in tables)


def _expand(keys: Tensor, stored: Tensor) -> Tensor:
    """Repeat KV heads where an implementation stores a copy per query head."""
    copies = stored.shape[1] // keys.shape[1] if keys.shape[1] else 1
    return keys.repeat_interleave(copies, dim=1) if copies > 1 else keys


def _reproduces(keys: Tensor, stored: Tensor, angles: Angles | None, pairing: Pairing | None) -> bool:
    """Return whether `keys`, after rotation, equal the stored keys to the rounding of their dtype."""
    if keys.shape != stored.shape or not keys.numel():
        return False
    if pairing is not None:
        if angles is None or angles.rotary_dim > keys.shape[-1]:
            return False
        keys = rotate(keys.float(), angles, pairing)
    error = (keys.float() - stored.float()).abs().amax()
    return bool(error <= _TOLERANCE.get(stored.dtype, 5e-2) * stored.float().abs().amax())
