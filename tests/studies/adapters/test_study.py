"""A trained adapter lowers its loss and stays near the identity; full rank costs nothing, and no trace of it is left."""

import copy

import numpy as np
import pytest
import torch

from eigencache.calibration.session import Session
from eigencache.errors import (
    CorpusError,
    LayerError,
    NonFiniteError,
    StatisticsError,
    TrainingError,
    UnsupportedArchitectureError,
)
from eigencache.models.residual import find_sites
from eigencache.records.adapter import AdapterRecord
from eigencache.records.quality import ReadingProtocol
from eigencache.report.adapters.plot import plot_adapter
from eigencache.report.adapters.tables import METHODS, operator_table, shown_rank, truncation_table
from eigencache.studies.adapters import study as adapter_study
from eigencache.studies.adapters.study import study_adapter
from eigencache.studies.adapters.training import TrainingSettings, cut, new_residuals, tail_share, train

pytestmark = pytest.mark.slow

HALF = ReadingProtocol(kind="prefix", length=24)
QUICK = TrainingSettings(inner_rank=4, steps=6, learning_rate=3e-3)


@pytest.fixture
def study(loaded, sequences):
    """A study of a tiny model on random ids."""

    def run(model="llama", held_out=None, calibration=None, training=QUICK, **options) -> AdapterRecord:
        one = loaded(model) if isinstance(model, str) else model
        held_out = held_out or sequences(*(48,) * 8, seed=1)
        return study_adapter(
            Session(one), held_out, calibration or sequences(*(48,) * 24), HALF, training=training, **options
        )

    return run


@pytest.mark.parametrize("target", ["v", "k"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_full_rank_costs_nothing_and_low_rank_does_for_every_method(name, target, study) -> None:
    record = study(name, target=target, ranks=(4, None))
    width = record.operators[0].width
    for method in METHODS:
        low, full = record.of(method)
        assert (low.rank, full.rank) == (4, width)
        assert abs(full.quality.delta_nll) < 1e-3
        assert low.quality.kl > 10 * max(full.quality.kl, 1e-6)
        assert low.quality.encoded_nbytes < full.quality.encoded_nbytes


def test_direct_pca_is_the_point_of_a_sweep_at_the_same_rank(study, loaded, sequences) -> None:
    from eigencache.fitting.pca import PCACalibration
    from eigencache.fitting.pca_settings import PCASettings
    from eigencache.studies.sweep import Plan, sweep_model

    held_out, text = sequences(*(48,) * 8, seed=1), sequences(*(48,) * 24)
    session = Session(loaded("llama"))
    calibration = PCACalibration(session, text, scopes=("layer",))
    swept = sweep_model(session, held_out, calibration, [Plan(PCASettings("v", "layer"), ranks=(8,))], HALF)
    (found,) = study(held_out=held_out, calibration=text, ranks=(8,)).of("direct-pca")
    expected = swept.series[0].points[0].quality
    assert found.quality.delta_nll == pytest.approx(expected.delta_nll, abs=1e-5)
    assert found.quality.encoded_nbytes == expected.encoded_nbytes


def test_without_training_the_operator_is_the_identity_and_its_energy_is_flat(study) -> None:
    record = study(training=TrainingSettings(steps=0), ranks=(8, 16))
    for o in record.operators:
        assert o.unit_gains == o.width == 32
        assert o.energy == pytest.approx({r: r / 32 for r in (1, 2, 4, 8, 16, 32)})
        assert (o.distance, o.condition_number) == (0, pytest.approx(1))
    assert record.adapted_nll == record.frozen_nll
    for one, other in zip(record.of("adapted-pca"), record.of("direct-pca"), strict=True):
        assert one.quality.nll == other.quality.nll
    assert record.training.loss_before == record.training.loss_after


@pytest.mark.parametrize("loss", ["nll", "nll+tail", "nll@rank"])
def test_the_named_loss_goes_down_and_the_model_is_not_touched(loss, loaded, sequences) -> None:
    one, text = loaded("llama"), sequences(*(48,) * 16)
    weights = {name: weight.clone() for name, weight in one.model.named_parameters()}
    sites = find_sites(one.model, one.geometry, "v", None, torch.from_numpy(text.ids[0])[None])
    settings = TrainingSettings(loss, inner_rank=8, steps=30, learning_rate=1e-2)
    residuals = new_residuals(sites, settings)
    steps = []
    found = train(one, sites, residuals, text, settings, lambda n, of: steps.append((n, of)))
    assert found.loss_after < found.loss_before - 0.01
    assert (len(found.losses), steps[-1]) == (30, (30, 30))
    assert found.parameters == 3 * 2 * 8 * 32
    expected = {"nll": (None, None), "nll+tail": (16, 1.0), "nll@rank": (16, None)}[loss]
    assert (found.loss_rank, found.tail_weight) == expected
    for name, weight in one.model.named_parameters():
        assert torch.equal(weight, weights[name])
        assert weight.grad is None
    assert not sum(len(module._forward_hooks) for module in one.model.modules())


def test_a_seed_gives_the_same_operators_again_and_another_seed_others(study) -> None:
    first, again, other = (study(training=TrainingSettings(inner_rank=4, steps=3, seed=s), ranks=(8,)) for s in (0, 0, 1))
    assert first.operators == again.operators
    assert first.results == again.results
    assert first.operators != other.operators


def test_the_tail_is_the_share_outside_the_leading_directions_and_its_gradient_that_of_the_share() -> None:
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(200, 6)) * [8, 4, 2, 1, 0.5, 0.25] + 3).double().requires_grad_()
    values = np.linalg.eigvalsh(np.cov(x.detach().numpy().T))
    share = tail_share(x, 2)
    assert float(share.detach()) == pytest.approx(values[:4].sum() / values.sum(), rel=1e-5)
    (gradient,) = torch.autograd.grad(share, x)
    with torch.no_grad():
        step = 0.05 * gradient / gradient.norm()
        slope = (tail_share(x + step, 2) - tail_share(x - step, 2)) / (2 * step.norm())
    assert float(slope) == pytest.approx(float(gradient.norm()), rel=0.02)


def test_what_is_cut_off_is_all_but_the_leading_directions() -> None:
    x = torch.randn(3, 50, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([8, 4, 2, 1, 0.5, 0.25]) + 3
    torch.testing.assert_close(cut(x, 6), x, rtol=1e-5, atol=1e-4)
    flat, short = (y.flatten(0, 1) for y in (x, cut(x, 2)))
    torch.testing.assert_close(short.mean(0), flat.mean(0), rtol=1e-4, atol=1e-4)
    values = np.linalg.eigvalsh(np.cov(flat.numpy().T, bias=True))
    assert float((flat - short).square().sum(1).mean()) == pytest.approx(values[:4].sum(), rel=1e-4)


def test_the_tables_show_what_the_record_holds_and_the_figure_is_drawn(study, tmp_path) -> None:
    record = study(ranks=(8, None))
    record.save(tmp_path / "a.json")
    assert AdapterRecord.load(tmp_path / "a.json") == record
    table = operator_table(record)
    assert [row[0] for row in table.rows] == ["0", "1", "2"]
    o = record.operators[0]
    assert shown_rank(o) == 16
    assert table.rows[0][5:8] == ("16 of 32", "50.0 %", f"{100 * o.energy[16]:.1f} %")
    costs = truncation_table(record)
    assert [row[0] for row in costs.rows] == ["8", "32"]
    assert f"{record.of('operator-svd')[0].quality.delta_nll:+.4f}" in costs.rows[0][2]
    assert costs.rows[1][2].split("\n")[1].startswith("+0.0000")  # full rank, whatever the sign of its rounding
    figure = plot_adapter(record)
    assert len(figure.axes) == 3
    assert len(figure.axes[2].lines) == len(METHODS) + 2


def test_every_hook_is_gone_after_an_error(study, loaded, monkeypatch) -> None:
    one = loaded("llama")

    def fails(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter_study, "_operator_codec", fails)
    with pytest.raises(KeyboardInterrupt):
        study(one)
    assert not sum(len(module._forward_hooks) for module in one.model.modules())


def test_what_cannot_be_done_is_refused_by_name(study, loaded, sequences) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="caches an MLA latent and not values"):
        study("deepseek_v2")
    with pytest.raises(StatisticsError, match="`ranks` 33: v · layer"):
        study(ranks=(33,))
    with pytest.raises(TrainingError, match="`inner_rank` 33: must be 1 to 32, the width"):
        study(training=TrainingSettings(inner_rank=33))
    with pytest.raises(TrainingError, match="`loss_rank` 0"):
        study(training=TrainingSettings("nll+tail", loss_rank=0))
    with pytest.raises(LayerError, match="no layer 9"):
        study(layers=(9,))
    with pytest.raises(StatisticsError, match="cannot carry a basis of 32"):
        study(calibration=sequences(25))
    with pytest.raises(CorpusError, match="occur in the calibration text"):
        study(held_out=sequences(*(48,) * 24))
    with pytest.raises(CorpusError, match="every sequence has fewer than 26 tokens"):
        study(held_out=sequences(24, 20, seed=1))
    with pytest.raises(TrainingError, match="`learning_rate` nan: must be above 0"):
        study(training=TrainingSettings(learning_rate=float("nan")))
    with pytest.raises(TrainingError, match="the training loss is nan"):
        study(training=TrainingSettings(steps=4, scale=float("inf")))
    with pytest.raises(TrainingError, match="the adapted vectors hold NaN"):
        study(training=TrainingSettings("nll+tail", steps=4, scale=float("inf")))


def test_a_training_that_did_not_lower_its_loss_is_marked(study) -> None:
    training = study(ranks=(8,), layers=(0,)).training
    assert not training.warnings
    worse = training.model_copy(update={"loss_after": training.loss_before + 0.5})
    assert worse.warnings[0].startswith("training did not lower its loss")


def test_an_overlap_that_is_forced_is_marked(study, sequences) -> None:
    record = study(held_out=sequences(*(48,) * 24), ranks=(8,), force=True)
    assert any(warning.startswith("OVERLAP") for warning in record.warnings)


def test_a_broken_model_is_named(study, loaded) -> None:
    one = loaded("llama")
    model = copy.deepcopy(one.model)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="values: layer 1"):
        study(loaded(model))
