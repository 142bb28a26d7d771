"""Keep what a calibration set has measured in a folder, so that an interrupted fit resumes with the same numbers."""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from eigencache.calibration.gradient_energy import GradientEnergy
from eigencache.calibration.metrics import Metrics
from eigencache.calibration.vectors import SampledVectors, Units
from eigencache.codec.layout import Layout, Part, Rotations
from eigencache.errors import OutputError

Tensors = dict[str, Tensor]
_KEY = "key"  # in the header of a file
_WHOLE, _UNFINISHED = ".safetensors", ".unfinished"


class KeptMeasurements:
    """Measurements of one calibration set in a folder: a safetensors file for each.

    Args:
        folder: the folder, made when something is kept; None keeps nothing.
        key: everything that the measurements depend on. A file with another key, or a damaged one, is measured anew.
    """

    def __init__(self, folder: Path | None = None, key: Mapping[str, object] | None = None) -> None:
        self._folder, self._key = folder, json.dumps(key or {}, sort_keys=True, default=str)

    def find(self, name: str) -> Tensors | None:
        """Return the tensors that were kept under a name, or None."""
        if self._folder is None or not (path := self._path(self._folder, name)).is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                known = (file.metadata() or {}).get(_KEY)
            return load_file(path) if known == self._key else None
        except (OSError, SafetensorError):  # damaged: a file is only a saving of time
            return None

    def keep(self, name: str, tensors: Tensors) -> None:
        """Write tensors whole or not at all. Raises `OutputError` if that fails."""
        if self._folder is None:
            return
        path = self._path(self._folder, name)
        unfinished = path.with_suffix(_UNFINISHED)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file({k: x.contiguous() for k, x in tensors.items()}, unfinished, {_KEY: self._key})
            unfinished.replace(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                unfinished.unlink()
            why = getattr(error, "strerror", None) or error
            raise OutputError(f"{path}: cannot be written ({why}). Free some space or choose another output.") from error

    def clear(self) -> None:
        """Delete what was kept, and the folder if nothing else is in it."""
        if self._folder is None or not self._folder.is_dir():
            return
        for path in self._folder.iterdir():
            if path.suffix in (_WHOLE, _UNFINISHED):
                path.unlink()
        with suppress(OSError):  # not empty
            self._folder.rmdir()

    @staticmethod
    def _path(folder: Path, name: str) -> Path:
        return folder / f"{name.replace(' ', '-')}{_WHOLE}"


def tensors_of_metric(metric: Metrics, energy: GradientEnergy | None) -> Tensors:
    """Return a metric and the gradient energy that was measured with it as named tensors."""
    tensors = {f"metric.{kind}.{i}": matrix for kind, layers in metric.items() for i, matrix in layers.items()}
    if energy is not None:
        tensors["tokens"] = torch.tensor(energy.tokens)
        for layer_idx, slot in energy.first:
            tensors[f"first.{layer_idx}.{slot}"] = torch.cat(energy.first[layer_idx, slot])
            tensors[f"later.{layer_idx}.{slot}"] = torch.tensor(energy.later[layer_idx, slot], dtype=torch.float64)
    return tensors


def metric_of(tensors: Tensors) -> tuple[Metrics, GradientEnergy | None]:
    """Return what `tensors_of_metric` was given; the batches of the energy are joined."""
    metric: Metrics = {}
    energy = GradientEnergy(tokens=int(tensors["tokens"])) if "tokens" in tensors else None
    for name, tensor in sorted(tensors.items()):
        kind, _, place = name.partition(".")
        first, _, second = place.partition(".")
        if kind == "metric":
            metric.setdefault(first, {})[int(second)] = tensor
        elif energy is not None and kind == "first":
            energy.first[int(first), int(second)] = [tensor]
        elif energy is not None and kind == "later":
            energy.later[int(first), int(second)] = float(tensor)
    return metric, energy


def tensors_of_vectors(samples: SampledVectors) -> Tensors:
    """Return sampled vectors as named tensors, without the rotations of their layout."""
    parts = torch.tensor([(part.layer_idx, part.slot, *part.heads, part.dim) for part in samples.layout.parts])
    tensors = {"parts": parts, "stored": samples.stored, "ids": samples.ids, "lengths": torch.tensor(samples.lengths)}
    if samples.units is not None:
        tensors |= {"offset": samples.units.offset, "unit": samples.units.unit}
    return tensors


def vectors_of(tensors: Tensors, rotations: Rotations) -> SampledVectors:
    """Return what `tensors_of_vectors` was given.

    Args:
        tensors: its result.
        rotations: the rotations of the layout.
    """
    parts = tuple(Part(layer, slot, (first, stop), dim) for layer, slot, first, stop, dim in tensors["parts"].tolist())
    layers = {part.layer_idx for part in parts}
    layout = Layout(parts, {i: rotation for i, rotation in rotations.items() if i in layers})
    units = Units(tensors["offset"], tensors["unit"]) if "unit" in tensors else None
    lengths = tuple(tensors["lengths"].tolist())
    return SampledVectors(layout, tensors["stored"], tensors["ids"], lengths, units)
