"""Identity of a model: a hash of everything that its cache depends on, and a cheap test for changes.

The hash covers the configuration of the computation (geometry, rotation, activation, …), a sample of every weight, and the
active adapters. It does not cover location, wrappers, labels, special tokens, generation settings or the version of
transformers.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

_SAMPLE = 4096  # minimum number of sampled values of a weight; more for a weight with more columns
_WRAPPERS = ("base_model.model.", "_orig_mod.", "base_layer.", "original_module.")
_NOT_THE_CACHE = {
    "use_cache",
    "output_router_logits",
    "router_aux_loss_coef",
    "initializer_range",
    "initializer_factor",
    "pretraining_tp",
    "tie_word_embeddings",
    "num_hidden_layers",  # follows from the weights
    "partial_rotary_factor",  # also in rope_parameters
    "quantization_config",  # the packed weights are hashed
}
_NOT_THE_CACHE_ENDS = ("token_id", "token_ids", "dropout", "_pdrop", "_implementation")
_RENAMED_LAYER_TYPES = {"deepseek_sparse_attention": "indexed_attention"}  # name in transformers 5.17 → name since

_KNOWN: WeakKeyDictionary[nn.Module, tuple[int, str]] = WeakKeyDictionary()  # state and hash


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of everything that the cache of a model depends on; equal for equal models."""
    digest = hashlib.sha256(json.dumps(_of_the_cache(model.config), sort_keys=True, default=str).encode())
    for name, weight in sorted(_weights(model), key=lambda named: named[0]):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        for part in _dense(weight):
            digest.update(_sample(part).contiguous().view(torch.uint8).numpy().tobytes())
    for name, adapter in sorted(_active_adapters(model)):
        digest.update(f"{name} {adapter}".encode())
    return digest.hexdigest()


def known_fingerprint(model: nn.Module) -> str:
    """Return `fingerprint(model)`, computed again only after a change of `state_of(model)`."""
    state, known = state_of(model), _KNOWN.get(model)
    if known is None or known[0] != state:
        known = _KNOWN[model] = state, fingerprint(model)
    return known[1]


def fingerprint_before(model: Any) -> str | None:
    """Return the hash of earlier releases, which sampled not every column; saved codecs may have it.

    None for packed weights, for which it was not defined.
    """
    try:
        return _fingerprint_before(model)
    except (NotImplementedError, RuntimeError):  # depends on the type of the tensor
        return None


def _fingerprint_before(model: Any) -> str:
    text, where = model.config.to_json_string(use_diff=False), ("_name_or_path", "transformers_version")
    config = json.loads(text, object_hook=lambda part: {k: v for k, v in part.items() if k not in where})
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.device.type != "meta":
            flat = weight.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 4096)][:4096].cpu()
            digest.update(sample.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def state_of(model: nn.Module) -> int:
    """Return a number that changes when a weight is replaced or written, or an adapter is added, switched or merged.

    Cost: microseconds per weight; no weight is read. Writes through `weight.data` are not detected, because PyTorch does
    not count them.
    """
    parts: list[Any] = []
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            offloaded = _offloaded(module, name, weight)
            parts.append(id(weight) if offloaded is None else (id(offloaded), name))  # the tensor is created at every pass
            parts += [(0 if part.is_inference() else part._version, part.data_ptr()) for part in _dense(weight)]
    return hash((tuple(parts), tuple(sorted(_active_adapters(model)))))


def _of_the_cache(config: Any) -> dict[str, Any]:
    """Return the entries of a configuration that affect keys and values and differ from the defaults of its class.

    New versions of transformers add entries to classes; their defaults describe the behavior of earlier versions.
    """
    config = config.get_text_config(decoder=True)
    general = PreTrainedConfig().to_dict().keys()
    defaults = {} if getattr(config, "has_no_defaults_at_init", False) else type(config)().to_dict()

    def kept(name: str, value: Any) -> bool:
        generic = name in general or name in _NOT_THE_CACHE or name.startswith("_") or name.endswith(_NOT_THE_CACHE_ENDS)
        return value is not None and not generic and value != defaults.get(name)

    entries = {name: value for name, value in config.to_dict().items() if kept(name, value)}
    types = [_RENAMED_LAYER_TYPES.get(kind, kind) for kind in entries.pop("layer_types", ())]
    if set(types) - {"full_attention"}:  # the behavior of a version without this entry
        entries["layer_types"] = types
    return entries | {"model_type": config.model_type}


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield weights with their names outside of wrappers; weights of adapters only if the adapter is active."""
    for path, module in model.named_modules():
        if _adapter_of(model, path) is False:
            continue
        for name, weight in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if name not in module._non_persistent_buffers_set:
                yield _unwrapped(f"{path}.{name}"), _loaded(module, name, weight)
                for scale_name, scale in _scales(module, name, weight):
                    yield _unwrapped(f"{path}.{name}.{scale_name}"), scale


def _unwrapped(name: str) -> str:
    """Remove the prefixes of PEFT and `torch.compile` from a name."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _is_adapted(module: nn.Module) -> bool:
    """Return whether PEFT has wrapped a module with an adapter or with a trainable copy."""
    return hasattr(module, "active_adapters") and (hasattr(module, "base_layer") or hasattr(module, "original_module"))


def _adapter_of(model: Any, path: str) -> bool | None:
    """Return whether a module belongs to an active adapter of PEFT; None if it belongs to no adapter."""
    parts, module = path.split("."), model
    for index, part in enumerate(parts):
        module = getattr(module, part, module)
        if _is_adapted(module):
            rest = parts[index + 1 :]
            if not rest or rest[0] in ("base_layer", "original_module"):
                return None
            return not module.disable_adapters and any(name in rest for name in module.active_adapters)
    return None


def _active_adapters(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield every wrapped layer with its active, not merged adapters and their scales."""
    module: Any
    for path, module in model.named_modules():
        if _is_adapted(module):
            scales = getattr(module, "scaling", {})
            active = [] if module.disable_adapters else list(module.active_adapters)
            merged = list(getattr(module, "merged_adapters", []))
            if active or merged:
                yield _unwrapped(path), f"{[(name, scales.get(name)) for name in active if name not in merged]}"


def _loaded(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    """Return a weight, loaded from where accelerate has offloaded it."""
    weights = _offloaded(module, name, weight)
    return weight if weights is None else weights[name]


def _offloaded(module: nn.Module, name: str, weight: Tensor) -> Any | None:
    """Return the mapping in which accelerate stores an offloaded weight; None for a weight in its module."""
    hooks = getattr(module, "_hf_hook", None)
    for hook in getattr(hooks, "hooks", [hooks]):
        weights = getattr(hook, "weights_map", None)
        if weight.device.type == "meta" and weights is not None:
            return weights
    return None


def _scales(module: Any, name: str, weight: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the scales of a weight packed by bitsandbytes; they are not parameters of the module."""
    if name != "weight":
        return
    first = getattr(weight, "SCB", None)  # before the first forward pass; afterwards in the state of the module
    scale = first if first is not None else getattr(getattr(module, "state", None), "SCB", None)
    if isinstance(scale, Tensor):
        yield "SCB", scale.detach()
    absmax = getattr(getattr(weight, "quant_state", None), "absmax", None)
    if isinstance(absmax, Tensor):
        yield "absmax", absmax.detach()


def _dense(weight: Any) -> list[Tensor]:
    """Return the plain tensors that a weight consists of; none for a weight that is not in memory."""
    if hasattr(weight, "__tensor_flatten__"):
        return [part for name in weight.__tensor_flatten__()[0] for part in _dense(getattr(weight, name))]
    return [] if weight.device.type == "meta" else [weight.detach()]


def _sample(weight: Tensor) -> Tensor:
    """Return at least 4,096 values from all rows and columns, on the CPU; the stride is coprime to the shape."""
    flat = weight.flatten()
    count = max(_SAMPLE, 2 * weight.shape[-1] if weight.ndim else 1)
    stride = max(1, flat.numel() // count)
    while any(math.gcd(stride, size) > 1 for size in weight.shape):
        stride += 1
    return flat[::stride].cpu()
