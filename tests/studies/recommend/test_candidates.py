"""What the finer pass tries follows from what the coarse pass could measure."""

import pytest

from eigencache.studies.recommend.candidates import Search, fine_plans
from planted_sweeps import series, sweep

POINTS = ((4, 4.0, 0.05, 0.001), (16, 2.0, 0.001, 0.001))


@pytest.mark.parametrize("heads", [True, False])
def test_full_rank_in_8_bits_is_tried_where_every_head_had_a_basis(heads: bool) -> None:
    found = [series("kv", *POINTS, scope="all"), *([series("kv", *POINTS, scope="head")] if heads else [])]
    plans = fine_plans(sweep(*found), 0.01, Search())
    whole = [plan for plan in plans if plan.ranks == (32,) and plan.settings.metric == "frobenius"]
    assert len(whole) == heads
    assert all(plan.settings.scope == "head" and plan.bits == 8 for plan in whole)
    assert len(plans) > heads
