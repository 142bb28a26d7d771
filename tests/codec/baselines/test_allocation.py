"""The groups are those of least error that any choice within the budget has: found by trying them all."""

import itertools

import numpy as np
import pytest

from eigencache.codec.baselines.allocation import ComponentGroup, GroupFormat, allocate


def planted(count: int, seed: int) -> tuple[np.ndarray, list[GroupFormat]]:
    rng = np.random.default_rng(seed)
    dropped = np.sort(rng.exponential(size=count) ** 3)[::-1]
    choices = []
    for size, (kind, bits) in itertools.product((1, 2, 4), (("int2", 2), ("int4", 4), ("fp8", 8))):
        energy = np.convolve(dropped, np.ones(size), "valid")
        choices.append(GroupFormat(kind, size, bits * size + 6, energy * rng.uniform(0.2, 1.5, len(energy)) / 4**bits))
    return dropped, choices


def every(count: int, choices: list[GroupFormat], at: int = 0):
    """All sets of groups of components from `at` on."""
    if at >= count:
        yield ()
        return
    for rest in every(count, choices, at + 1):
        yield rest
    for choice in choices:
        if at + choice.size <= count:
            for rest in every(count, choices, at + choice.size):
                yield (ComponentGroup(at, choice.size, choice.kind), *rest)


def price(groups, dropped: np.ndarray, choices: list[GroupFormat]) -> tuple[float, int]:
    known = {(choice.kind, choice.size): choice for choice in choices}
    error, bits, kept = 0.0, 0, np.zeros(len(dropped), dtype=bool)
    for group in groups:
        choice = known[group.kind, group.size]
        error += choice.errors[group.start]
        bits += choice.bits
        assert not kept[group.start : group.start + group.size].any()
        kept[group.start : group.start + group.size] = True
    return error + float(dropped[~kept].sum()), bits


@pytest.mark.parametrize("seed", range(3))
def test_no_other_groups_within_the_budget_have_less_error(seed: int) -> None:
    dropped, choices = planted(5, seed)
    tried = [price(groups, dropped, choices) for groups in every(5, choices)]
    for budget in (0, 7, 8, 13, 20, 31, 45, 70, 500):
        error, bits = price(allocate(dropped, choices, budget), dropped, choices)
        assert bits <= budget
        assert error == pytest.approx(min(e for e, b in tried if b <= budget), rel=1e-12)


def test_more_bits_never_err_more_and_nothing_is_bought_twice() -> None:
    dropped, choices = planted(60, 1)
    errors = []
    for budget in range(0, 700, 50):
        groups = allocate(dropped, choices, budget)
        error, bits = price(groups, dropped, choices)
        assert bits <= budget
        assert [g.start for g in groups] == sorted(g.start for g in groups)
        errors.append(error)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(dropped.sum())


def test_a_budget_that_buys_nothing_buys_nothing() -> None:
    dropped, choices = planted(4, 0)
    assert allocate(dropped, choices, 7) == ()
