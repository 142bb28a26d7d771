"""A metric is one file and one registration: the calibration finds it by its name."""

import pytest
import torch

from eigencache.calibration import metrics
from eigencache.calibration.metrics import check_metric, metric, metric_named, metric_names
from eigencache.calibration.session import Session
from eigencache.errors import StatisticsError
from eigencache.fitting.pca import PCACalibration
from eigencache.fitting.pca_settings import PCASettings


def test_a_registered_metric_is_measured_and_used(loaded, sequences, monkeypatch: pytest.MonkeyPatch) -> None:
    metric_names()
    monkeypatch.setattr(metrics, "_MEASURES", dict(metrics._MEASURES))

    @metric("first number", common_scale=True)
    def first_number(session, sequences, rotations):
        heads, dim = 2, 16
        weights = torch.eye(dim, dtype=torch.float64) * 1e-6
        weights[0, 0] = 1.0
        names = ("keys_pre_rope", "keys_post_rope", "values")
        return {name: {i: weights.repeat(heads, 1, 1) for i in range(3)} for name in names}

    assert "first number" in metric_names()
    calibration = PCACalibration(Session(loaded("llama")), sequences(*(64,) * 8))
    codec = calibration.fit(PCASettings("v", metric="first number")).truncated(1)
    decoder = codec.groups[0].transform.decoder
    assert decoder.flatten().abs().argmax() == 0


def test_an_unknown_metric_is_refused_with_a_guess() -> None:
    with pytest.raises(StatisticsError, match=r"`metric` fihser does not exist\. .*Did you mean fisher\?"):
        check_metric("fihser")
    with pytest.raises(StatisticsError, match="has no matrix to measure"):
        metric_named("frobenius")
