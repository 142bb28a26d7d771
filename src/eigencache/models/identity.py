"""Which model a cache is of: a hash of all that its cache depends on, and a cheap look at whether that has changed.

The hash is of geometry, rotation, activation and whatever else the configuration says of the computation, of numbers of
every weight, and of the adapters that are active. Where a model lies, what wraps it, its labels, tokens and generation
settings, and the version of transformers do not enter.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

_SAMPLE = 4096  # numbers of a weight at least; more where it has more columns
_WRAPPERS = ("base_model.model.", "_orig_mod.", "base_layer.")
_NOT_THE_CACHE = {"use_cache", "initializer_range", "initializer_factor", "pretraining_tp", "tie_word_embeddings"}
_NOT_THE_CACHE_ENDS = ("token_id", "token_ids", "dropout", "_pdrop", "_implementation")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all that the cache of `model` depends on: two models alike are one model."""
    config = model.config.to_dict()  # type: ignore[union-attr, operator]
    digest = hashlib.sha256(json.dumps(_of_the_cache(config), sort_keys=True, default=str).encode())
    for name, weight in sorted(_weights(model), key=lambda named: named[0]):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        for part in _dense(weight):
            digest.update(_sample(part).contiguous().view(torch.uint8).numpy().tobytes())
    for name, adapter in sorted(_active_adapters(model)):
        digest.update(f"{name} {adapter}".encode())
    return digest.hexdigest()


def fingerprint_before(model: Any) -> str:
    """What codecs hold that were saved before the hash was of every column of the weights."""
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
    """A number that changes whenever a weight is replaced or written, or an adapter added, switched or merged."""
    parts = [(id(p), 0 if p.is_inference() else p._version) for p in model.parameters()]
    return hash((tuple(parts), tuple(sorted(_active_adapters(model)))))


def _of_the_cache(config: dict[str, Any]) -> dict[str, Any]:
    """The entries of a configuration that say how keys and values come about, those of parts included."""
    general = PreTrainedConfig().to_dict().keys()

    def kept(name: str, value: Any) -> bool:
        generic = name in general or name in _NOT_THE_CACHE or name.startswith("_") or name.endswith(_NOT_THE_CACHE_ENDS)
        return value is not None and not generic

    entries = {name: value for name, value in config.items() if kept(name, value)}
    return {name: _of_the_cache(value) if name.endswith("_config") else value for name, value in entries.items()}


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights by the name that they have without wrappers; those of adapters only where these are active."""
    for path, module in model.named_modules():
        for own, weight in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if own in module._non_persistent_buffers_set:
                continue
            name = f"{path}.{own}"
            if (adapter := _adapter_of(model, path)) is not None and not adapter:
                continue
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
            yield name, _loaded(module, own, weight)


def _adapter_of(model: Any, path: str) -> bool | None:
    """Whether a module belongs to an active adapter of PEFT; None for one that belongs to no adapter."""
    parts, module = path.split("."), model
    for index, part in enumerate(parts):
        module = getattr(module, part, module)
        if hasattr(module, "base_layer") and hasattr(module, "active_adapters"):
            rest = parts[index + 1 :]
            if not rest or rest[0] == "base_layer":
                return None
            return not module.disable_adapters and any(name in rest for name in module.active_adapters)
    return None


def _active_adapters(model: nn.Module) -> Iterator[tuple[str, str]]:
    """The adapters that a layer's output depends on beside its weights, with their scale."""
    module: Any
    for path, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "active_adapters"):
            scales = getattr(module, "scaling", {})
            active = [] if module.disable_adapters else list(module.active_adapters)
            merged = list(getattr(module, "merged_adapters", []))
            if active or merged:
                said = f"{[(name, scales.get(name)) for name in active if name not in merged]}"
                name = path
                for wrapper in _WRAPPERS:
                    name = name.replace(wrapper, "")
                yield name, said


def _loaded(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    """A weight from where accelerate keeps it, if that is not the module."""
    hooks = getattr(module, "_hf_hook", None)
    for hook in getattr(hooks, "hooks", [hooks]):
        kept = getattr(hook, "weights_map", None)
        if weight.device.type == "meta" and kept is not None:
            return kept[name]
    return weight


def _dense(weight: Any) -> list[Tensor]:
    """The plain tensors that a weight is made of; none of one that is nowhere in memory."""
    if hasattr(weight, "__tensor_flatten__"):
        return [part for name in weight.__tensor_flatten__()[0] for part in _dense(getattr(weight, name))]
    return [] if weight.device.type == "meta" else [weight.detach()]


def _sample(weight: Tensor) -> Tensor:
    """At least 4,096 numbers, from every row and every column, on the CPU: the stride has no factor of the shape's."""
    flat = weight.flatten()
    wanted = max(_SAMPLE, 2 * weight.shape[-1] if weight.ndim else 1)
    stride = max(1, flat.numel() // wanted)
    while any(math.gcd(stride, size) > 1 for size in weight.shape):
        stride += 1
    return flat[::stride].cpu()
