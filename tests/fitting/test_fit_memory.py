"""The memory of a fit is predicted before it runs; what does not fit is sampled less or refused."""

from typing import get_args

import pytest

from eigencache.calibration.pass_memory import backward_nbytes, forward_nbytes, scoring_nbytes
from eigencache.calibration.session import Session
from eigencache.errors import StatisticsError
from eigencache.fitting.eigen import EigenSettings
from eigencache.fitting.eigen_basis import EigenScope
from eigencache.fitting.fit import Goal, fit_codec
from eigencache.fitting.fit_memory import fit_memory
from stub_codecs import random_sequences, tiny_loaded

TEXT = random_sequences(*[40] * 64)


def of(memory: int, name: str = "llama", **settings):
    return fit_memory(Session(tiny_loaded(name), memory=memory), TEXT, EigenSettings(**settings))


def test_all_vectors_are_sampled_where_they_fit() -> None:
    plan = of(10**9)
    assert plan.sampled == plan.tokens == 64 * 40
    assert plan.needed == plan.fixed + plan.tokens * plan.per_token
    assert "of 0.9 GiB allowed" in plan.describe() and "vectors of" not in plan.describe()


def test_fewer_are_sampled_where_they_do_not() -> None:
    whole = of(10**9)
    plan = of(whole.fixed + 1000 * whole.per_token + whole.per_token // 2)
    assert plan.sampled == 1000 and plan.needed <= plan.allowed
    assert plan.describe().endswith("vectors of 1,000 of 2,560 tokens")


def test_more_vectors_than_are_worth_their_time_are_not_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eigencache.fitting.fit_memory.MOST_VECTORS", 2000)
    plan = of(10**9)
    assert plan.sampled == 2000 and plan.needed == plan.fixed + 2000 * plan.per_token
    monkeypatch.setattr("eigencache.fitting.fit_memory.MOST_VECTORS", 300)
    assert of(10**9).sampled == 300  # fewer than 16 long sequences have is enough


def test_wider_stages_take_more() -> None:
    scopes: tuple[EigenScope, ...] = get_args(EigenScope)
    sizes = {scope: of(10**9, scope=scope, group=1).per_token for scope in scopes}
    assert sizes["head"] < sizes["layer"] < sizes["groups"] < sizes["joint"]
    assert of(10**9, group=100).per_token == sizes["joint"]


def test_the_largest_pass_is_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_loaded("llama")
    passes = forward_nbytes(loaded, 320), backward_nbytes(loaded, 40), scoring_nbytes(loaded, 8, 40)
    assert of(10**9, scope="head").fixed == max(passes)
    assert of(10**9, scope="head", metric="frobenius").fixed == max(passes[0], passes[2])
    monkeypatch.setattr("eigencache.fitting.fit_memory._SQUARES", 10**6)
    assert of(10**13, scope="joint").fixed > of(10**13, scope="head").fixed > max(passes)  # matrices of the columns


@pytest.mark.parametrize("name", ["gpt2", "deepseek_v3", "gemma3_text"])
def test_every_kind_of_cache_has_a_width(name: str) -> None:
    geometry = tiny_loaded(name).geometry
    joint, alone = of(10**9, name, scope="joint"), of(10**9, name, scope="head")
    assert joint.per_token > alone.per_token > 2 * geometry.values_per_token


def test_less_than_a_fit_needs_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    least = of(10**9).fixed + 16 * 40 * of(10**9).per_token
    assert of(least).sampled == 640
    monkeypatch.setattr("eigencache.fitting.fit.CalibrationSet", None)
    words = r"A fit needs about \S+ GiB beside the model, more than a `memory` of \S+ GiB\. Raise `memory`"
    with pytest.raises(StatisticsError, match=words):
        fit_codec(Session(tiny_loaded("llama"), memory=least - 1), TEXT, EigenSettings(), Goal.of(bits=4))


def test_a_fit_says_what_it_will_take_and_keeps_to_it() -> None:
    said: list[str] = []
    whole = of(10**9)
    limit = whole.fixed + 1300 * whole.per_token
    session = Session(tiny_loaded("llama"), memory=limit, on_progress=lambda what, *_: said.append(what))
    fit_codec(session, TEXT, EigenSettings(sinks=0, text=False), Goal.of(bits=6), context=40)
    assert said[0] == of(limit).describe() and "vectors of 1,300 of 2,560 tokens" in said[0]
