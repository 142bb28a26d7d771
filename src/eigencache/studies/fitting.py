"""What a codec was fitted from, as the card of a saved codec says it: model, rotation, text, settings, versions."""

from dataclasses import asdict
from typing import NamedTuple

import numpy as np

from eigencache.codec.card import CodecOrigin, CodecSettings
from eigencache.codec.pca import PCACodec
from eigencache.corpora.overlap import sketch
from eigencache.models.load import fingerprint
from eigencache.spectral.rope import rope_sha256
from eigencache.studies.calibrate import Calibration, PCASettings


class Fitting(NamedTuple):
    """What `save_codec` takes beside the codec; `windows`: sketch of the calibration text."""

    settings: CodecSettings
    origin: CodecOrigin
    windows: np.ndarray


def fitting_of(codec: PCACodec, settings: PCASettings, calibration: Calibration) -> Fitting:
    """Of a codec that `calibration` has just fitted with `settings`: the run that is recorded ends now."""
    loaded, gathered = calibration.loaded, calibration.gathered
    assert gathered is not None  # every calibration has read its text
    origin = CodecOrigin(
        model=loaded.name,
        model_sha256=fingerprint(loaded.model),
        rope_sha256=rope_sha256(calibration.rotations),
        dtype=str(loaded.model.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        calibration=calibration.sequences.corpus,
        run=gathered.watch.run(calibration.seed, {"batch_size": calibration.batch_size}),
    )
    about = CodecSettings(**asdict(settings), bits=codec.bits, rank=codec.rank)
    return Fitting(about, origin, sketch(calibration.sequences.ids))
