"""Gradient energy by position, and the first tokens that it singles out, on planted gradients."""

import numpy as np
import pytest
import torch

from eigencache.calibration.gradient_energy import FAR_ABOVE, POSITIONS, GradientEnergy
from eigencache.codec.sinks_and_window import FIRST_EXACT

LENGTHS = (60, 33, 60, 41, 60)


def planted(factors: dict[int, float], lengths: tuple[int, ...] = LENGTHS, *, only: int | None = None) -> GradientEnergy:
    """Gradients of E|g|² = 1 times the factor of a position, in two layers of different scale; `only` in one sequence."""
    generator, energy = torch.Generator().manual_seed(1), GradientEnergy()
    for row, length in enumerate(lengths):
        slots = []
        for scale in (1.0, 1e-3):
            for heads, dim in ((2, 8), (2, 6)):
                g = torch.randn(1, heads, max(lengths), dim, generator=generator) * scale
                for position, factor in factors.items():
                    if only is None or row == only:
                        g[:, :, position] *= factor**0.5
                g[:, :, length:] = 0.0
                slots.append(g)
        energy.add({0: (slots[0], slots[1]), 4: (slots[2], slots[3])}, [length])
    return energy


def test_energies_are_sums_in_numpy() -> None:
    generator = torch.Generator().manual_seed(2)
    batch = torch.randn(3, 2, 40, 5, generator=generator)
    lengths = [40, 9, 22]
    for row, length in enumerate(lengths):
        batch[row, :, length:] = 0
    energy = GradientEnergy()
    energy.add({7: (batch, 2 * batch)}, lengths)
    squared = batch.double().numpy() ** 2
    total = squared.sum((1, 3))
    first = [np.mean([total[row, p] for row in range(3) if lengths[row] > p]) for p in range(POSITIONS)]
    np.testing.assert_allclose(energy.by_position((7, 0)), first, rtol=1e-12)
    np.testing.assert_allclose(energy.by_position((7, 1)), np.multiply(first, 4), rtol=1e-6)
    assert energy.rest((7, 0)) == pytest.approx(total[:, POSITIONS:].sum() / (24 + 6))
    assert energy.share((7, 0)) == pytest.approx(total[:, :FIRST_EXACT].sum() / total.sum())


@pytest.mark.parametrize(
    ("factors", "sinks"),
    [
        ({}, FIRST_EXACT),
        ({0: 5000.0, 1: 300.0}, FIRST_EXACT),
        ({4: 500.0}, 5),
        ({4: 500.0, 5: 500.0, 6: 500.0}, 7),
        ({5: 500.0}, FIRST_EXACT),
        ({4: 500.0, 6: 500.0}, 5),
        ({4: FAR_ABOVE / 3}, FIRST_EXACT),
        (dict.fromkeys(range(30), 500.0), POSITIONS),
    ],
)
def test_sinks_are_the_four_first_tokens_and_those_after_them_that_stand_out_without_a_gap(factors, sinks) -> None:
    if max(factors, default=0) >= POSITIONS:  # energy of the later tokens must stay small
        factors = {position: factor for position, factor in factors.items() if position < POSITIONS}
    assert planted(factors).sinks == sinks


def test_a_position_of_one_sequence_alone_is_no_sink() -> None:
    energy = planted({4: 1e5}, only=2)
    assert energy.sinks == FIRST_EXACT
    assert energy.by_position((0, 0))[4] / energy.rest((0, 0)) > 1000  # the mean over sequences would be misled


def test_relative_energy_weighs_layers_and_slots_alike_whatever_their_scale() -> None:
    relative = planted({0: 400.0}, (200,) * 30).relative()
    assert relative[0] == pytest.approx(400, rel=0.15)
    np.testing.assert_allclose(relative[1:].numpy(), 1, atol=0.35)


def test_sequences_without_later_tokens_tell_nothing() -> None:
    energy = planted({4: 500.0}, (POSITIONS, 9))
    assert energy.sinks == FIRST_EXACT and energy.relative().isnan().all() and energy.rest((0, 0)) is None
    assert len(energy.by_position((0, 0))) == POSITIONS
    assert GradientEnergy().sinks == FIRST_EXACT


def test_a_slot_without_gradient_is_left_out() -> None:
    energy = planted({4: 500.0})
    zeros = torch.zeros(1, 2, 60, 8)
    for length in LENGTHS:
        energy.add({9: (zeros, zeros)}, [length])
    energy.tokens //= 2  # the sequences were the same
    assert energy.sinks == 5 and energy.share((9, 0)) == 0.0
