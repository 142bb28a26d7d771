"""Exact bit allocation of `kvtc`: which components share a group, in which format, for the least error within a budget.

Dynamic programming over components, in order, and bits spent. A group is a run of `size` components in one format; a
component in no group is dropped. The error is the sum of the errors of groups and of dropped components.
"""

import math
from typing import NamedTuple

import numpy as np


class ComponentGroup(NamedTuple):
    """Components `start` … `start + size − 1` in the format `kind`."""

    start: int
    size: int
    kind: str


class GroupFormat(NamedTuple):
    """A format and size of groups, the bits of one group, and its error at every start [components − size + 1]."""

    kind: str
    size: int
    bits: int
    errors: np.ndarray


def allocate(dropped: np.ndarray, choices: list[GroupFormat], budget_bits: int) -> tuple[ComponentGroup, ...]:
    """Return the groups of least error within a budget.

    Time and memory are proportional to components × budget (in units of the greatest common divisor of all costs) × choices.

    Args:
        dropped: Error of dropping every component [components].
        choices: Formats and sizes that groups may have.
        budget_bits: Largest total of bits.
    """
    count = len(dropped)
    choices = [choice for choice in choices if choice.bits <= budget_bits and choice.size <= count]
    if not choices:
        return ()
    unit = math.gcd(*(choice.bits for choice in choices))
    budget = budget_bits // unit
    rows = 1 + max(choice.size for choice in choices)
    least = np.zeros((rows, budget + 1))  # error of the first p components with at most b units, in row p mod rows
    taken = np.zeros((count + 1, budget + 1), dtype=np.uint8)  # 0: dropped, 1 + i: choice i
    for p in range(1, count + 1):
        best = least[p % rows]
        np.add(least[(p - 1) % rows], dropped[p - 1], out=best)
        for i, (_, size, bits, errors) in enumerate(choices):
            if size > p:
                continue
            cost = bits // unit
            with_group = least[(p - size) % rows][: budget + 1 - cost] + errors[p - size]
            better = with_group < best[cost:]
            np.copyto(best[cost:], with_group, where=better)
            np.copyto(taken[p, cost:], np.uint8(i + 1), where=better)
    return _groups(taken, choices, budget, unit)


def _groups(taken: np.ndarray, choices: list[GroupFormat], budget: int, unit: int) -> tuple[ComponentGroup, ...]:
    """Follow the decisions of the table from the last component to the first, and return the groups in order."""
    groups, p = [], len(taken) - 1
    while p:
        if not (chosen := int(taken[p, budget])):
            p -= 1
            continue
        kind, size, bits, _ = choices[chosen - 1]
        p, budget = p - size, budget - bits // unit
        groups.append(ComponentGroup(p, size, kind))
    return tuple(reversed(groups))
