"""Provenance of fitted codecs, as saved in their cards: model, rotation, calibration text, settings and versions."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import NamedTuple

import numpy as np

from eigencache.codec.pca import PCACodec
from eigencache.codec.saved.card import CodecOrigin
from eigencache.codec.saved.eigen_card import EigenCardSettings
from eigencache.codec.saved.live import LiveCardSettings
from eigencache.codec.saved.pca import PCACardSettings
from eigencache.corpora.overlap import sketch
from eigencache.corpora.sequences import Sequences
from eigencache.fitting.eigen import EigenSettings
from eigencache.fitting.pca import PCACalibration
from eigencache.fitting.pca_settings import PCASettings
from eigencache.models.load import LoadedModel
from eigencache.models.rope_detection import rotations_of
from eigencache.records.base import Record
from eigencache.records.fit import Expected
from eigencache.records.run import Run
from eigencache.spectral.rope import Rotation, rope_sha256


class FitProvenance(NamedTuple):
    """Provenance of a fitted codec, which `save_codec` takes.

    Attributes:
        settings: settings of the fit.
        origin: the model, its rotations, the calibration text and the run.
        windows: sketch of the calibration text, which finds overlaps with other texts.
        expected: size and loss on the held-out sequences.
    """

    settings: Record
    origin: CodecOrigin
    windows: np.ndarray
    expected: Expected | None = None


def fitting_of(codec: PCACodec, settings: PCASettings, calibration: PCACalibration) -> FitProvenance:
    """Return the provenance of a PCA codec that was just fitted; the end of its run is the time of this call.

    Args:
        codec: the codec, truncated to its rank.
        settings: settings of the fit.
        calibration: the moments it was fitted from.
    """
    session = calibration.session
    run = calibration.captured.watch.run(session.seed, {"batch_size": session.batch_size})
    origin = _origin(session.loaded, calibration.rotations, calibration.sequences, run)
    about = PCACardSettings(**asdict(settings), bits=codec.bits, rank=codec.rank)
    return FitProvenance(about, origin, sketch(calibration.sequences.ids))


def eigen_fitting_of(
    settings: EigenSettings, expected: Expected, loaded: LoadedModel, sequences: Sequences, run: Run
) -> FitProvenance:
    """Return the provenance of a fitted `EigenCodec`. A forward pass over a few tokens finds the rotations.

    Args:
        settings: settings of the fit.
        expected: size and loss on the held-out sequences.
        loaded: the model.
        sequences: the calibration text, held-out sequences included.
        run: the record of the fit.
    """
    about = EigenCardSettings(**asdict(settings))
    return FitProvenance(about, _origin(loaded, rotations_of(loaded), sequences, run), sketch(sequences.ids), expected)


def live_fitting_of(
    settings: LiveCardSettings, expected: Expected, loaded: LoadedModel, sequences: Sequences, run: Run
) -> FitProvenance:
    """Return the provenance of a live codec that was fitted alone. Arguments are those of `eigen_fitting_of`."""
    return FitProvenance(settings, _origin(loaded, rotations_of(loaded), sequences, run), sketch(sequences.ids), expected)


def _origin(loaded: LoadedModel, rotations: Mapping[int, Rotation], sequences: Sequences, run: Run) -> CodecOrigin:
    return CodecOrigin(
        model=loaded.name,
        model_sha256=loaded.sha256,
        rope_sha256=rope_sha256(rotations),
        dtype=loaded.dtype_name,  # type: ignore[arg-type]
        calibration=sequences.corpus,
        run=run,
    )
