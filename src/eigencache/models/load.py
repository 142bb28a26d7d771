"""Loading of models by name, folder, GGUF file or hub name.

All models are loaded by `from_pretrained` of transformers. This module adds the names of `sources.py`, errors of one line,
and the refusal of checkpoints with missing weights, which transformers would initialize at random.
"""

import struct
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage] - of httpx or of httpx2, by version
    RepositoryNotFoundError,
)
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from eigencache.errors import ModelError, TokenizerMismatchError
from eigencache.geometry import KVGeometry, geometry_from_config
from eigencache.models.adapters import adapter_for
from eigencache.models.devices import device_of
from eigencache.models.gguf import gguf_options, header_parsed_once, model_options, require_plain_rotation
from eigencache.models.identity import known_fingerprint
from eigencache.models.sources import NAMES, did_you_mean, source_of
from eigencache.records.run import Model


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with its tokenizer, the name that the user gave, and its geometry."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    geometry: KVGeometry

    @property
    def device(self) -> torch.device:
        """Device of the embedding, on which token ids are required."""
        return device_of(self.model.get_input_embeddings())

    @property
    def learned_positions(self) -> int | None:
        """Number of positions of a model without rotation; None if it rotates keys or the configuration has no number."""
        return self._positions if self.geometry.rope is None else None

    @property
    def default_length(self) -> int:
        """Default sequence length: 512 tokens, or the number of positions of the model if that is smaller."""
        return min(512, self._positions or 512)

    @property
    def _positions(self) -> int | None:
        config = self.model.config
        return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)  # the second: MPT

    @property
    def dtype_name(self) -> str:
        """Number format of the weights, such as `float32`."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def sha256(self) -> str:
        """Hash of everything that the cache depends on; computed again only after a change of the model."""
        return known_fingerprint(self.model)

    def record(self, adapter: str) -> Model:
        """Return the record of the model.

        Args:
            adapter: How the cache was captured (`Capture.style`).
        """
        return Model(
            name=self.name,
            architecture=type(self.model).__name__,
            dtype=self.dtype_name,
            device=str(self.model.device),
            parameters=self.model.num_parameters(),
            sha256=self.sha256,
            adapter=adapter,
            geometry=self.geometry,
        )

    @property
    def embedded_ids(self) -> int:
        """Number of token ids that the model embeds."""
        return _embedded_ids(self.model)


def load(spec: str, *, device: str | None = None, dtype: str | None = None, tokenizer: str | None = None) -> LoadedModel:
    """Load a model with its tokenizer.

    Args:
        spec: A name of `sources.NAMES`, a folder, a GGUF file or a hub name.
        device: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto` to distribute the model over devices (requires `accelerate`);
            default: `cuda` if available, otherwise `cpu`.
        dtype: `float32`, `bfloat16`, `float16`, `float64` or `auto`; default: the dtype of the checkpoint on an
            accelerator, `float32` on a CPU.
        tokenizer: Model whose tokenizer is used instead, as `spec`.

    Raises:
        ModelError: The model cannot be found or loaded, or weights are missing from its checkpoint.
        TokenizerMismatchError: The tokenizer has ids that the model does not embed.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    source, options = source_of(spec)
    with header_parsed_once() if "gguf_file" in options else nullcontext():
        return _load(spec, source, options, device, _dtype(dtype, device), tokenizer)


def _load(spec: str, source: str, options: dict[str, Any], device: str, dtype: Any, tokenizer: str | None) -> LoadedModel:
    """Load a model from `source` with `options` of `from_pretrained`; the other arguments are those of `load`."""
    options |= {"device_map": device} if device == "auto" else {}
    if not Path(source).exists():
        check_hub(spec)
    with _one_line(spec):
        config = AutoConfig.from_pretrained(source, **gguf_options(options))
    geometry = geometry_from_config(config)
    if "gguf_file" in options and geometry.rope is not None and geometry.rope.rope_type == "default":
        require_plain_rotation(Path(source) / options["gguf_file"])
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if spec in NAMES:
        logging.disable_progress_bar()
    try:
        with _one_line(spec):
            options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, by name
            from_pretrained: Any = AutoModelForCausalLM.from_pretrained
            model, report = from_pretrained(source, dtype=dtype, **model_options(options, config))
            if tokenizer:
                tokens = load_tokenizer(tokenizer)
            else:
                tokens = AutoTokenizer.from_pretrained(source, **gguf_options(options))
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    for what, keys in (("missing from", report["missing_keys"]), ("of another shape in", report["mismatched_keys"])):
        if names := sorted(key if isinstance(key, str) else key[0] for key in keys):
            raise ModelError(
                f"{spec}: {len(names)} weights are {what} the checkpoint, such as {names[0]}: use a complete checkpoint"
            )
    if device != "auto":
        model.to(device)
    check_tokenizer(tokens, model)
    return LoadedModel(spec, model.eval(), tokens, with_evidence(geometry, model))


def check_hub(name: str) -> None:
    """Check that a hub model is in the local cache or on the hub, before transformers retries its download.

    Raises:
        ModelError: The hub does not have the model, or cannot be reached.
    """
    if isinstance(try_to_load_from_cache(name, "config.json"), str) or constants.HF_HUB_OFFLINE:
        return
    try:
        with _one_line(name):
            HfApi().model_info(name, timeout=10)
    except HTTPError as error:
        raise ModelError(
            f"{name}: the hub cannot be reached ({_first_line(error)}), and the model is not in the local "
            f"cache{did_you_mean(name)}: check the network, or give a local folder"
        ) from error


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, which is given as in `load`."""
    source, options = source_of(spec)
    with _one_line(spec):
        return AutoTokenizer.from_pretrained(source, **gguf_options(options))


def check_device(device: str) -> None:
    """Check that this machine has a device.

    Raises:
        ModelError: It does not.
    """
    if device == "auto":
        return
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ModelError(f"`device` {device}: no such kind of device: use cpu, cuda, cuda:0, mps or auto") from error
    index, count = torch.device(device).index, torch.cuda.device_count()
    if kind == "cuda" and index is not None and 0 < count <= index:
        raise ModelError(f"`device` {device}: this machine has {count} CUDA devices, counted from cuda:0. Use one of them.")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(kind, True):
        raise ModelError(f"`device` {device}: this machine has no {kind} device: use `device` cpu")


def wrapped_tokenizer(tokenizer: Any) -> Any:
    """Return a `tokenizers.Tokenizer` as a tokenizer of transformers."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def check_tokenizer(tokenizer: Any, model: PreTrainedModel) -> None:
    """Check that a model embeds all ids of a tokenizer.

    Raises:
        TokenizerMismatchError: It does not.
    """
    rows = _embedded_ids(model)
    if len(tokenizer) > rows:
        raise TokenizerMismatchError(
            f"the tokenizer has {len(tokenizer)} entries, the model embeds only {rows}: use the tokenizer of the model"
        )


def with_evidence(geometry: KVGeometry, model: PreTrainedModel) -> KVGeometry:
    """Return the geometry completed by facts from the modules: biases of keys and values, norm of keys.

    Args:
        geometry: Geometry from the configuration.
        model: The model of that configuration.
    """
    cached = set(geometry.cached_layers)
    for module in model.modules():
        if getattr(module, "layer_idx", None) in cached and (style := adapter_for(module)):
            modules = style.modules(module)
            projection = modules.get("keys") or modules.get("fused") or modules.get("down")
            values = getattr(module, "v_proj", None) or modules.get("fused") or modules.get("up")
            return geometry.model_copy(
                update={
                    "key_bias": getattr(projection, "bias", None) is not None,
                    "value_bias": getattr(values, "bias", None) is not None,
                    "key_norm": "keys_normed" in modules,
                }
            )
    return geometry


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _embedded_ids(model: PreTrainedModel) -> int:
    embedding: Any = model.get_input_embeddings()  # its weight may be packed by a quantization
    return getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0]


def _dtype(dtype: str | None, device: str) -> Any:
    if dtype is None:
        on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
        return torch.float32 if on_cpu else "auto"
    if dtype not in ("float32", "bfloat16", "float16", "float64", "auto"):
        raise ModelError(f"`dtype` {dtype}: use float32, bfloat16, float16, float64 or auto")
    return dtype if dtype == "auto" else getattr(torch, dtype)


class _one_line:
    """Converts the exceptions of loading into a `ModelError` of one line."""

    def __init__(self, spec: str) -> None:
        self.spec = spec

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        match error:
            case GatedRepoError():
                raise ModelError(f"{self.spec}: gated on the hub: accept its terms there and run `hf auth login`") from error
            case RepositoryNotFoundError() | HFValidationError():
                raise ModelError(
                    f"{self.spec}: not a model on the hub, not a folder, not one of {', '.join(NAMES)}"
                    f"{did_you_mean(self.spec)}: check the name"
                ) from error
            case struct.error():
                raise ModelError(f"{self.spec}: cannot be loaded: it ends within its header. Download it again.") from error
            case OSError() | ValueError() | ImportError() | KeyError() | IndexError() | RuntimeError():
                local = self.spec in NAMES or Path(self.spec).expanduser().exists()
                guess = "" if local else did_you_mean(self.spec)
                raise ModelError(f"{self.spec}: cannot be loaded{guess}: {_first_line(error)}") from error
