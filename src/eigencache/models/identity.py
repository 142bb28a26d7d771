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
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

_SAMPLE = 4096  # numbers of a weight at least; more where it has more columns
_WRAPPERS = ("base_model.model.", "_orig_mod.", "base_layer.", "original_module.")
_NOT_THE_CACHE = {
    "use_cache",
    "output_router_logits",
    "router_aux_loss_coef",
    "initializer_range",
    "initializer_factor",
    "pretraining_tp",
    "tie_word_embeddings",
    "num_hidden_layers",  # weights tell how many
    "partial_rotary_factor",  # is in rope_parameters as well
    "quantization_config",  # packed weights are hashed themselves
}
_NOT_THE_CACHE_ENDS = ("token_id", "token_ids", "dropout", "_pdrop", "_implementation")
_RENAMED_LAYER_TYPES = {"deepseek_sparse_attention": "indexed_attention"}  # of transformers 5.17 by their name since

_KNOWN: WeakKeyDictionary[nn.Module, tuple[int, str]] = WeakKeyDictionary()  # state and hash


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all that the cache of `model` depends on: two models alike are one model."""
    digest = hashlib.sha256(json.dumps(_of_the_cache(model.config), sort_keys=True, default=str).encode())
    for name, weight in sorted(_weights(model), key=lambda named: named[0]):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        for part in _dense(weight):
            digest.update(_sample(part).contiguous().view(torch.uint8).numpy().tobytes())
    for name, adapter in sorted(_active_adapters(model)):
        digest.update(f"{name} {adapter}".encode())
    return digest.hexdigest()


def known_fingerprint(model: nn.Module) -> str:
    """`fingerprint`, made anew only where `state_of` says that the model has changed since."""
    state, known = state_of(model), _KNOWN.get(model)
    if known is None or known[0] != state:
        known = _KNOWN[model] = state, fingerprint(model)
    return known[1]


def fingerprint_before(model: Any) -> str | None:
    """What codecs hold that were saved before the hash was of every column of the weights.

    None for packed weights, of which it could not be made.
    """
    try:
        return _fingerprint_before(model)
    except (NotImplementedError, RuntimeError):  # by kind of tensor
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
    """A number that changes whenever a weight is replaced or written, or an adapter added, switched or merged.

    Costs microseconds per weight and reads none. PyTorch counts no write through `weight.data`: that alone goes unseen.
    """
    parts: list[Any] = []
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            offloaded = _offloaded(module, name, weight)
            parts.append(id(weight) if offloaded is None else (id(offloaded), name))  # made anew at every pass
            parts += [(0 if part.is_inference() else part._version, part.data_ptr()) for part in _dense(weight)]
    return hash((tuple(parts), tuple(sorted(_active_adapters(model)))))


def _of_the_cache(config: Any) -> dict[str, Any]:
    """The entries of a configuration that say how keys and values come about, where they are not the class's defaults.

    Versions of transformers give classes new entries, whose defaults are what earlier versions did without them.
    """
    config = config.get_text_config(decoder=True)
    general = PreTrainedConfig().to_dict().keys()
    defaults = {} if getattr(config, "has_no_defaults_at_init", False) else type(config)().to_dict()

    def kept(name: str, value: Any) -> bool:
        generic = name in general or name in _NOT_THE_CACHE or name.startswith("_") or name.endswith(_NOT_THE_CACHE_ENDS)
        return value is not None and not generic and value != defaults.get(name)

    entries = {name: value for name, value in config.to_dict().items() if kept(name, value)}
    types = [_RENAMED_LAYER_TYPES.get(kind, kind) for kind in entries.pop("layer_types", ())]
    if set(types) - {"full_attention"}:  # which is what a version without such an entry does
        entries["layer_types"] = types
    return entries | {"model_type": config.model_type}


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights by the name that they have without wrappers; those of adapters only where these are active."""
    for path, module in model.named_modules():
        if _adapter_of(model, path) is False:
            continue
        for own, weight in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if own not in module._non_persistent_buffers_set:
                yield _unwrapped(f"{path}.{own}"), _loaded(module, own, weight)
                yield from ((_unwrapped(f"{path}.{own}.{name}"), scale) for name, scale in _scales(module, own, weight))


def _unwrapped(name: str) -> str:
    """A name without the prefixes of PEFT and `torch.compile`."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _is_adapted(module: nn.Module) -> bool:
    """Whether PEFT has put an adapter, or a copy of its own, beside a module of the model."""
    return hasattr(module, "active_adapters") and (hasattr(module, "base_layer") or hasattr(module, "original_module"))


def _adapter_of(model: Any, path: str) -> bool | None:
    """Whether a module belongs to an active adapter of PEFT; None for one that belongs to no adapter."""
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
    """The adapters that a layer's output depends on beside its weights, with their scale."""
    module: Any
    for path, module in model.named_modules():
        if _is_adapted(module):
            scales = getattr(module, "scaling", {})
            active = [] if module.disable_adapters else list(module.active_adapters)
            merged = list(getattr(module, "merged_adapters", []))
            if active or merged:
                yield _unwrapped(path), f"{[(name, scales.get(name)) for name in active if name not in merged]}"


def _loaded(module: nn.Module, name: str, weight: Tensor) -> Tensor:
    """A weight from where accelerate keeps it, if that is not the module."""
    kept = _offloaded(module, name, weight)
    return weight if kept is None else kept[name]


def _offloaded(module: nn.Module, name: str, weight: Tensor) -> Any | None:
    """What accelerate keeps a weight in between passes, by name; None for a weight that is in its module."""
    hooks = getattr(module, "_hf_hook", None)
    for hook in getattr(hooks, "hooks", [hooks]):
        kept = getattr(hook, "weights_map", None)
        if weight.device.type == "meta" and kept is not None:
            return kept
    return None


def _scales(module: Any, name: str, weight: Any) -> Iterator[tuple[str, Tensor]]:
    """The scales of a weight packed by bitsandbytes, which are no parameters of their own."""
    if name != "weight":
        return
    first = getattr(weight, "SCB", None)  # before the first pass; then it is the module's
    scale = first if first is not None else getattr(getattr(module, "state", None), "SCB", None)
    if isinstance(scale, Tensor):
        yield "SCB", scale.detach()
    absmax = getattr(getattr(weight, "quant_state", None), "absmax", None)
    if isinstance(absmax, Tensor):
        yield "absmax", absmax.detach()


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
