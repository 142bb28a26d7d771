"""What a codec was fitted from, as the card of a saved codec says it: model, rotation, text, settings, versions."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import NamedTuple

import numpy as np

from eigencache.codec.pca import PCACodec
from eigencache.codec.saved.card import CodecOrigin, Expected
from eigencache.codec.saved.eigen import EigenCardSettings
from eigencache.codec.saved.pca import PCACardSettings
from eigencache.corpora.overlap import sketch
from eigencache.corpora.sequences import Sequences
from eigencache.fitting.eigen import EigenSettings
from eigencache.fitting.pca import PCACalibration, PCASettings
from eigencache.models.load import LoadedModel
from eigencache.models.rope_detection import rotations_of
from eigencache.records.base import Record
from eigencache.records.run import Run
from eigencache.spectral.rope import Rotation, rope_sha256


class FitProvenance(NamedTuple):
    """What `save_codec` takes beside the codec; `windows`: sketch of the calibration text."""

    settings: Record
    origin: CodecOrigin
    windows: np.ndarray
    expected: Expected | None = None


def fitting_of(codec: PCACodec, settings: PCASettings, calibration: PCACalibration) -> FitProvenance:
    """Of a codec that `calibration` has just fitted with `settings`: the run that is recorded ends now."""
    gathered = calibration.gathered
    assert gathered is not None  # every calibration has read its text
    run = gathered.watch.run(calibration.seed, {"batch_size": calibration.batch_size})
    origin = _origin(calibration.loaded, calibration.rotations, calibration.sequences, run)
    about = PCACardSettings(**asdict(settings), bits=codec.bits, rank=codec.rank)
    return FitProvenance(about, origin, sketch(calibration.sequences.ids))


def eigen_fitting_of(
    settings: EigenSettings, expected: Expected, loaded: LoadedModel, sequences: Sequences, run: Run
) -> FitProvenance:
    """Of an `EigenCodec` that `fit_eigen` fitted with `settings` on `sequences`, those that it kept apart included.

    Costs one forward pass over a few tokens, which finds the rotations.
    """
    about = EigenCardSettings(**asdict(settings))
    return FitProvenance(about, _origin(loaded, rotations_of(loaded), sequences, run), sketch(sequences.ids), expected)


def _origin(loaded: LoadedModel, rotations: Mapping[int, Rotation], sequences: Sequences, run: Run) -> CodecOrigin:
    return CodecOrigin(
        model=loaded.name,
        model_sha256=loaded.sha256,
        rope_sha256=rope_sha256(rotations),
        dtype=str(loaded.model.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        calibration=sequences.corpus,
        run=run,
    )
