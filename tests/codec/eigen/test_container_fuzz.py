"""Thousands of mutated containers, by every operator: each is read as it was written, or refused with a `CodecError`."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eigencache.codec.eigen import container as codec
from fuzz.fuzz_container import FORGING, HONEST, RIGHT, Operator, attempt, outcome, random_container, run, sealed, summary


@pytest.mark.parametrize("operator", HONEST + FORGING, ids=lambda operator: operator.__name__)
@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**64 - 1))
def test_a_mutated_container_is_right_or_refused(operator: Operator, seed: int) -> None:
    rng = Random(seed)
    attempt(operator, rng, (random_container(rng), random_container(rng)))


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_behind_a_right_beginning_are_right_or_refused(tail: bytes) -> None:
    data = b"\x89EKV\x01\x00" + tail
    outcome(data)
    outcome(sealed(data))


def test_each_defect_is_reached() -> None:
    counts = run(3000, seed=0)
    assert set(counts) == {
        RIGHT,
        "ContainerChecksumError",
        "ContainerHeaderError",
        "ContainerVersionError",
        "NotAContainerError",
        "OverlongContainerError",
        "TruncatedContainerError",
    }
    assert summary(counts).startswith("3,000 mutated containers: ")


def test_a_wrong_answer_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = Random(0)
    pair = random_container(rng), random_container(rng)
    data = bytearray(codec.write(pair[0]))
    data[-1] ^= 1  # of the last section
    monkeypatch.setattr(codec.Reader, "section", lambda self, i: self._data[self._offsets[i] : self._offsets[i + 1]])
    with pytest.raises(AssertionError, match="another section"):
        outcome(bytes(data), pair)
