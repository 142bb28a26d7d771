"""Which components share a group, and in which format: the least error within a budget of bits, found exactly.

Dynamic programming over components in their order and bits spent. A group is a run of `size` components in one format; a
component that is in no group is dropped. The error of a set of groups is the sum of theirs and of what is dropped.
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
    """A format and a size that groups may have, what one costs, and its error at every start [components − size + 1]."""

    kind: str
    size: int
    bits: int
    errors: np.ndarray


def allocate(dropped: np.ndarray, choices: list[GroupFormat], budget_bits: int) -> tuple[ComponentGroup, ...]:
    """The groups of least error that cost at most `budget_bits`; `dropped`: the error of leaving a component out.

    Time and memory: components × budget, in units of the greatest common divisor of all costs, × choices.
    """
    count = len(dropped)
    choices = [choice for choice in choices if choice.bits <= budget_bits and choice.size <= count]
    if not choices:
        return ()
    unit = math.gcd(*(choice.bits for choice in choices))
    budget = budget_bits // unit
    rows = 1 + max(choice.size for choice in choices)
    least = np.zeros((rows, budget + 1))  # of the first p components with at most b units, in row p mod rows
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
    """The groups that the table's decisions name, from the last component to the first."""
    groups, p = [], len(taken) - 1
    while p:
        if not (chosen := int(taken[p, budget])):
            p -= 1
            continue
        kind, size, bits, _ = choices[chosen - 1]
        p, budget = p - size, budget - bits // unit
        groups.append(ComponentGroup(p, size, kind))
    return tuple(reversed(groups))
