"""A verdict follows the numbers of the record, and is withheld where the data do not carry it."""

import pytest

from eigencache.report.probe.assess import UNSUPPORTED, assess


def with_energy(edited, record, name: str, energy: float, support: float = 60.0):
    """The record with this held-out energy at every k and this support."""
    held_out = {k: energy for k in record.select(name, "layer")[0].energy}
    return edited(record, name, held_out_energy=held_out, support=support)


@pytest.mark.parametrize(
    ("before", "after", "values", "verdict"),
    [
        (0.95, 0.9, 0.9, "K and V compressible"),
        (0.95, 0.5, 0.9, "V compressible, K pre-RoPE only"),
        (0.5, 0.5, 0.9, "V compressible, K not compressible"),
        (0.5, 0.5, 0.4, "neither K nor V compressible"),
    ],
)
def test_the_verdict_changes_with_the_numbers(edited, gqa, before: float, after: float, values: float, verdict: str) -> None:
    record = with_energy(edited, gqa, "keys_pre_rope", before)
    record = with_energy(edited, record, "keys_post_rope", after)
    record = with_energy(edited, record, "values", values)
    found = assess(record)
    assert found.verdict == verdict
    assert f"{values:.3f}" in " ".join(found.reasons)


def test_too_little_data_gets_no_verdict(edited, gqa) -> None:
    record = with_energy(edited, gqa, "values", 0.99, support=9.9)
    found = assess(record)
    assert UNSUPPORTED in found.verdict
    assert not found.supported
    assert any("9.9 independent vectors per dimension" in reason for reason in found.reasons)


def test_mla_is_judged_by_its_latent(edited, mla) -> None:
    assert assess(with_energy(edited, mla, "latent", 0.9)).verdict == "latent compressible"
    assert assess(with_energy(edited, mla, "latent", 0.3)).verdict == "latent not compressible"


def test_the_verdict_does_not_depend_on_the_models_name(gqa) -> None:
    renamed = gqa.model_copy(update={"model": gqa.model.model_copy(update={"name": "another"})})
    assert assess(renamed) == assess(gqa)
