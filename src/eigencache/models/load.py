"""Models by bundled name, folder, GGUF file or hub name; a model whose weights are incomplete is refused.

Every way in ends in `transformers`' own `from_pretrained`; what is added are the bundled names, errors of one line,
and the refusal of checkpoints that leave weights at random values (a probe of those would be a fiction).
"""

import struct
from dataclasses import dataclass
from importlib import resources
from logging import getLogger
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
from eigencache.models.identity import known_fingerprint
from eigencache.records.run import Model

_LOG = getLogger(__name__)
BUNDLED = ("ref-gpt2", "ref-llama", "ref-qwen2", "ref-deepseek")


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with its tokenizer, the name the user gave, and its geometry."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    geometry: KVGeometry

    @property
    def device(self) -> torch.device:
        """Where token ids have to be: the device of the embedding."""
        return device_of(self.model.get_input_embeddings())

    @property
    def learned_positions(self) -> int | None:
        """How many positions a model without rotation says it has; None where it rotates keys, or says nothing."""
        return getattr(self.model.config, "max_position_embeddings", None) or None if self.geometry.rope is None else None

    @property
    def default_length(self) -> int:
        """Tokens of a sequence where nobody asks for another length: 512, or as many as the model has positions for."""
        return min(512, getattr(self.model.config, "max_position_embeddings", None) or 512)

    @property
    def sha256(self) -> str:
        """Hash of everything that the cache depends on; computed again only when the model has changed."""
        return known_fingerprint(self.model)

    def record(self, adapter: str) -> Model:
        """The model behind a result. `adapter`: how its cache was captured."""
        return Model(
            name=self.name,
            architecture=type(self.model).__name__,
            dtype=str(self.model.dtype).removeprefix("torch."),
            device=str(self.model.device),
            parameters=self.model.num_parameters(),
            sha256=self.sha256,
            adapter=adapter,
            geometry=self.geometry,
        )

    @property
    def embedded_ids(self) -> int:
        """How many token ids the model knows."""
        return _embedded_ids(self.model)


def bundled_path(name: str) -> Path:
    """The folder of a bundled model."""
    return Path(str(resources.files("eigencache.bundled") / name))


def load(spec: str, *, device: str | None = None, dtype: str | None = None, tokenizer: str | None = None) -> LoadedModel:
    """Load `spec`: a bundled name, a folder, a GGUF file or a hub name.

    `device`: `cpu`, `cuda`, `cuda:1`, `mps`, or `auto` to spread a model over devices (needs `accelerate`); default:
    CUDA if there is one. `dtype`: `float32`, `bfloat16`, `float16`; default: that of the checkpoint on an
    accelerator, `float32` on a CPU. `tokenizer`: another spec to take the tokenizer from.
    Raises `ModelError` in one line that says what is wrong and what to do.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    source, options = _source(spec)
    resolved = _dtype(dtype, device)
    options |= {"device_map": device} if device == "auto" else {}
    if not Path(source).exists():
        check_hub(spec)
    with _one_line(spec):
        config = AutoConfig.from_pretrained(source, **{k: v for k, v in options.items() if k == "gguf_file"})
    geometry = geometry_from_config(config)
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if spec in BUNDLED:
        logging.disable_progress_bar()
    try:
        with _one_line(spec):
            options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # judged below, by name
            found: Any = AutoModelForCausalLM.from_pretrained(source, dtype=resolved, **options)
            model, report = found
            tokens = load_tokenizer(tokenizer) if tokenizer else AutoTokenizer.from_pretrained(source, **_gguf(options))
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
    for what, keys in (("missing from", report["missing_keys"]), ("of another shape in", report["mismatched_keys"])):
        if names := sorted(key if isinstance(key, str) else key[0] for key in keys):
            raise ModelError(f"{spec}: {len(names)} weights are {what} the checkpoint, such as {names[0]}")
    if "gguf_file" in options and geometry.rope is not None and geometry.rope.rope_type == "default":
        _warn_of_dropped_rotation(Path(source) / options["gguf_file"])
    if device != "auto":
        model.to(device)
    check_tokenizer(tokens, model)
    return LoadedModel(spec, model.eval(), tokens, with_evidence(geometry, model))


def check_hub(name: str) -> None:
    """Raises `ModelError` when a hub name is neither in the local cache nor to be had, before anything retries."""
    if isinstance(try_to_load_from_cache(name, "config.json"), str) or constants.HF_HUB_OFFLINE:
        return
    try:
        with _one_line(name):
            HfApi().model_info(name, timeout=10)
    except HTTPError as error:
        raise ModelError(f"{name}: the hub cannot be reached, and the model is not in the local cache: {error}") from error


def load_tokenizer(spec: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model spec."""
    source, options = _source(spec)
    with _one_line(spec):
        return AutoTokenizer.from_pretrained(source, **_gguf(options))


def check_device(device: str) -> None:
    """Raises `ModelError` for a device that this machine does not have."""
    if device == "auto":
        return
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ModelError(f"`device` {device}: no such kind of device; use cpu, cuda, cuda:0, mps or auto") from error
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(kind, True):
        raise ModelError(f"`device` {device}: this machine has no {kind} device; use `device` cpu")


def wrapped_tokenizer(tokenizer: Any) -> Any:
    """Return a `tokenizers.Tokenizer` as one of transformers."""
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def check_tokenizer(tokenizer: Any, model: PreTrainedModel) -> None:
    """Raises `TokenizerMismatchError` when the tokenizer has ids that the model's embedding does not."""
    rows = _embedded_ids(model)
    if len(tokenizer) > rows:
        raise TokenizerMismatchError(
            f"the tokenizer has {len(tokenizer)} entries, the model embeds only {rows}: they do not belong together"
        )


def with_evidence(geometry: KVGeometry, model: PreTrainedModel) -> KVGeometry:
    """The geometry completed with what only the modules tell: biases of keys and values, norms of keys."""
    wanted = set(geometry.cached_layers)
    for module in model.modules():
        if getattr(module, "layer_idx", None) in wanted and (style := adapter_for(module)):
            found = style.modules(module)
            projection = found.get("keys") or found.get("fused") or found.get("down")
            values = getattr(module, "v_proj", None) or found.get("fused") or found.get("up")
            return geometry.model_copy(
                update={
                    "key_bias": getattr(projection, "bias", None) is not None,
                    "value_bias": getattr(values, "bias", None) is not None,
                    "key_norm": "keys_normed" in found,
                }
            )
    return geometry


def _source(spec: str) -> tuple[str, dict[str, Any]]:
    """What to hand to `from_pretrained`, with its options."""
    if spec in BUNDLED:
        return str(bundled_path(spec)), {}
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{spec}: no such GGUF file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{spec}: the folder has no config.json, so it is not a Hugging Face model")
        return str(path), {}
    if path.exists():
        raise ModelError(f"{spec}: is a file; a model is a folder, a .gguf file, a hub name or one of {', '.join(BUNDLED)}")
    if spec.count("/") != 1 or spec.startswith((".", "/", "~")):
        raise ModelError(
            f"{spec}: no such folder, and no bundled model ({', '.join(BUNDLED)}); on the hub names are OWNER/NAME"
        )
    return spec, {}


def _warn_of_dropped_rotation(path: Path) -> None:
    """Name what a GGUF file says of its rotation and transformers, which rotates by the base alone, does not read."""
    from gguf import GGUFReader  # which transformers has just read the file with

    reader = GGUFReader(path)
    names = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")]
    names += [key for key in reader.fields if ".rope.scaling." in key]
    if names:
        _LOG.warning(
            "%s: transformers does not read %s and rotates keys by the base alone: logits and spectra differ from those of "
            "the model the file was made of: load that one's folder or hub name for figures of it",
            path.name,
            ", ".join(names),
        )


def _embedded_ids(model: PreTrainedModel) -> int:
    embedding: Any = model.get_input_embeddings()  # the weight of a quantized one may be packed
    return getattr(embedding, "num_embeddings", None) or embedding.weight.shape[0]


def _gguf(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key == "gguf_file"}


def _dtype(dtype: str | None, device: str) -> Any:
    if dtype is None:
        on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
        return torch.float32 if on_cpu else "auto"
    if dtype not in ("float32", "bfloat16", "float16", "float64", "auto"):
        raise ModelError(f"`dtype` {dtype}: use float32, bfloat16, float16, float64 or auto")
    return dtype if dtype == "auto" else getattr(torch, dtype)


class _one_line:
    """Turns the exceptions of loading into a `ModelError` of one line."""

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
                    f"{self.spec}: not a model on the hub, not a folder, not one of {', '.join(BUNDLED)}"
                ) from error
            case OSError() | ValueError() | ImportError() | KeyError() | IndexError() | RuntimeError() | struct.error():
                first = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise ModelError(f"{self.spec}: cannot be loaded: {first}") from error
