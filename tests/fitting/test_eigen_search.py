"""The search for the step of `eigen`: sizes met by containers, losses kept, and what cannot be had refused."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from eigencache.calibration.session import Session
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.errors import BudgetError
from eigencache.fitting import eigen_search
from eigencache.fitting.eigen import EigenFit
from eigencache.fitting.eigen_search import at_bits, at_loss, fit_target
from planted_eigen import PLAIN, WIDTH, cached, fit_of, gaussian, planted

pytestmark = pytest.mark.slow

# Bits


def fresh(**changes: object) -> EigenFit:
    """The planted fit without a memory of earlier searches."""
    return replace(planted(), sizes={}, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("context", [256, 4096])
@pytest.mark.parametrize("bits", [0.7, 1.0, 2.0, 4.0, 8.0])
def test_a_target_in_bits_is_met_and_real_containers_agree(bits: float, context: int) -> None:
    point = at_bits(fresh(), bits, context=context, name="mine")
    assert planted().bits_per_value(point, context) == pytest.approx(bits, rel=0.005)
    nbytes = point.codec.encode(cached(gaussian(4_000, 1)[:context]), 0).nbytes
    real = 8 * nbytes / (min(context, 4_000) * WIDTH)
    assert real == pytest.approx(bits, rel=0.03) and point.codec.name == "mine"


@pytest.mark.parametrize("bits", [1e-4, 100.0])
def test_a_target_that_no_step_meets_is_refused_with_what_can_be_had(bits: float) -> None:
    limit = "below the minimum of (.*) bits" if bits < 1 else "above the maximum of (.*) bits"
    remedy = r"Use \1 or more, or fewer `sinks`" if bits < 1 else r"Use \1 or less\."
    with pytest.raises(BudgetError, match=rf"{limit} per value at a context of 2,048 tokens\. {remedy}") as refused:
        at_bits(fresh(), bits)
    can_be_had = float(str(refused.value).split(" bits per value")[0].split()[-1])
    assert planted().bits_per_value(at_bits(fresh(), can_be_had), 2_048) == pytest.approx(can_be_had, rel=0.005)


def test_a_target_is_refused_where_coefficients_hold_rounding_and_a_vector_is_an_outlier() -> None:
    x = torch.randn(2_000, WIDTH, generator=torch.Generator().manual_seed(0)) * 1e-4
    x[:, 0] *= 3e4
    far = x.clone()
    far[7, 0] = 500 * 3
    fit = fit_of(x, x, far)
    with pytest.raises(BudgetError, match="above the maximum of") as refused:
        at_bits(fit, 100.0)
    can_be_had = float(str(refused.value).split(" bits per value")[0].split()[-1])
    assert fit.bits_per_value(at_bits(fit, can_be_had), 2_048) == pytest.approx(can_be_had, rel=0.005)


def test_vectors_that_do_not_vary_are_refused() -> None:
    x = torch.ones(500, WIDTH)
    with pytest.raises(BudgetError, match=r"no step codes anything, as the vectors of the fit do not vary\. Use other text"):
        at_bits(fit_of(x, x, x), 1.0)


def test_where_sizes_jump_the_next_smaller_one_is_taken() -> None:
    x = [torch.randn(3_000, WIDTH, generator=torch.Generator().manual_seed(seed)) for seed in (0, 2, 1)]
    for half in x:  # two classes of coefficients, each of which comes or goes at once
        half[:, WIDTH // 2 :] *= 0.5
    fit = fit_of(*x)
    sizes = [fit.bits_per_value(fit.at_step(fit.spread * 2 ** (k / 50)), 2_048) for k in range(75)]
    jumps = [(b, a) for a, b in pairwise(sizes) if b < 0.93 * a]
    assert jumps
    for smaller, larger in jumps:
        found = fit.bits_per_value(at_bits(replace(fit, sizes={}), (smaller + larger) / 2), 2_048)
        assert found == pytest.approx(smaller, rel=0.03)


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_the_unit_of_the_vectors_does_not_matter(factor: float) -> None:
    fit = fit_of(*(factor * gaussian(3_000, seed) for seed in (0, 2, 1)))
    point = at_bits(fit, 2.0)
    assert fit.bits_per_value(point, 2_048) == pytest.approx(2.0, rel=0.005)
    same = at_bits(fit_of(*(gaussian(3_000, seed) for seed in (0, 2, 1))), 2.0)
    assert point.codec.step / factor == pytest.approx(same.codec.step, rel=0.01)


def test_sinks_and_window_are_counted() -> None:
    kept = fresh(sinks=8, settings=replace(PLAIN, window=32))
    plain, dearer = (at_bits(one, 3.0, context=256) for one in (fresh(), kept))
    assert (dearer.codec.kept.sinks, dearer.codec.kept.window, dearer.codec.kept.bits) == (8, 32, 8)
    assert dearer.codec.step > plain.codec.step
    real = 8 * dearer.codec.encode(cached(gaussian(4_000, 1)[:256]), 0).nbytes / (256 * WIDTH)
    assert real == pytest.approx(3.0, rel=0.03)


def test_steps_that_are_fitted_already_shorten_the_search() -> None:
    fit, steps = fresh(), []
    for bits in (0.7, 3.0, 1.5, 2.2):
        before = len(fit.sizes)
        assert fit.bits_per_value(at_bits(fit, bits), 2_048) == pytest.approx(bits, rel=0.005)
        steps.append(len(fit.sizes) - before)
    assert steps[-1] <= 4 < 12 and max(steps) <= 12
    assert fit.sizes[at_bits(fit, 2.2).codec.step] > 0


def test_a_pilot_of_an_eighth_of_the_sequences_leaves_few_steps_for_all_of_them() -> None:
    kinds = gaussian(8_000, 0), gaussian(8_000, 2), gaussian(4_000, 1)
    for bits in (0.7, 2.0, 5.0):
        one, many = fit_of(*kinds), fit_of(*kinds, sequences=40)
        assert one.pilot is None and many.pilot is not None
        assert [len(s.vectors) for s in (many.pilot.fitted, many.pilot.held)] == [1_000, 500]
        for fit in (one, many):
            assert fit.bits_per_value(at_bits(fit, bits), 2_048) == pytest.approx(bits, rel=0.005)
        assert len(many.sizes) <= 4 and len(many.sizes) <= len(one.sizes) and many.pilot.sizes
        found = len(many.sizes)
        at_bits(many, 1.1 * bits)  # what the pilot was off by is known now
        assert len(many.sizes) <= found + 3


@pytest.mark.parametrize("finer", [0.999, 1.001])
def test_known_steps_that_tell_little_do_not_mislead_the_search(finer: float) -> None:
    for bits in (0.7, 2.2, 8.0):
        fit = replace(planted(), sizes={0.3: 100.0, 0.3 * finer: 100.001})
        assert fit.bits_per_value(at_bits(fit, bits), 2_048) == pytest.approx(bits, rel=0.005)


# Loss


def stubbed(
    monkeypatch: pytest.MonkeyPatch, loss: Callable[[float], float], kl: Callable[[float], float] = lambda _: 0.0
) -> list[float]:
    """Scores that are functions of the step; the steps that were scored."""
    seen: list[float] = []

    def score(_loaded, _apart, codecs: dict[str, EigenCodec], *_rest):
        seen.extend(codec.step for codec in codecs.values())
        return {name: SimpleNamespace(delta_nll=loss(codec.step), kl=kl(codec.step)) for name, codec in codecs.items()}

    monkeypatch.setattr(eigen_search, "score_held_out", score)
    return seen


@pytest.mark.parametrize("allowed", [1e-4, 0.02, 0.1, 1.5, 2.5])
def test_the_coarsest_step_within_a_loss_is_found_to_a_quarter_of_an_octave(monkeypatch, allowed: float) -> None:
    seen = stubbed(monkeypatch, lambda step: step)
    step = at_loss(fresh(), Session(None), allowed).codec.step  # type: ignore[arg-type]
    assert step <= allowed < step * 2**0.25 * 1.001
    assert len(seen) <= (12 if allowed > 0.01 else 20)


def test_a_loss_is_kept_by_the_divergence_too(monkeypatch) -> None:
    """By chance a codec may predict a few thousand tokens as well as the model, and predict otherwise all the same."""
    stubbed(monkeypatch, lambda step: -step, lambda step: step)
    assert at_loss(fresh(), Session(None), 0.1).codec.step == pytest.approx(0.1, rel=0.2)  # type: ignore[arg-type]


def test_a_loss_that_even_the_coarsest_step_keeps_gets_it(monkeypatch) -> None:
    seen = stubbed(monkeypatch, lambda step: 0.0)
    assert at_loss(fresh(), Session(None), 0.1).codec.step == max(seen)  # type: ignore[arg-type]


def test_a_coarse_step_that_is_within_the_loss_by_luck_is_not_taken(monkeypatch) -> None:
    stubbed(monkeypatch, lambda step: 0.0 if step > 1 else step)
    assert at_loss(fresh(), Session(None), 0.1).codec.step <= 0.1  # type: ignore[arg-type]


def test_a_loss_that_no_step_keeps_is_refused(monkeypatch) -> None:
    stubbed(monkeypatch, lambda step: 0.25)
    with pytest.raises(BudgetError, match=r"`max_nll`=0\.1 nats cannot be met: the finest step loses 0\.2500 nats"):
        at_loss(fresh(), Session(None), 0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize("targets", [{}, {"bits": 1.0, "max_nll": 0.1}])
def test_one_target_is_asked_for(targets: dict[str, float]) -> None:
    with pytest.raises(BudgetError, match="Give exactly one of `bits` and `max_nll`"):
        fit_target(fresh(), Session(None), **targets)  # type: ignore[arg-type]
