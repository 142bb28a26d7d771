"""The latent's cache says what the expanded one says, and the expanded ones compressed lose what they should."""

import pytest
import torch

from eigencache.calibration.session import Session
from eigencache.errors import UnsupportedArchitectureError
from eigencache.models.mla_expanded import expanded_codec
from eigencache.report.mla import latent_table
from eigencache.studies.mla import compare_caches, fit_expanded, sweep_expanded

NAMES = ("deepseek_v2", "deepseek_v3")


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_same_and_bytes_are_not(name: str, loaded, sequences) -> None:
    one = loaded(name)
    found = compare_caches(one, sequences(40, 40, 30), 20)
    assert found.tokens == 20 + 20 + 10
    assert found.largest_difference < 1e-4 * found.largest_logit
    assert found.latent_nbytes == 2 * 3 * (20 + 8)  # layers, latent, rotary key
    assert found.expanded_nbytes == 2 * 3 * 4 * (10 + 8 + 14)  # layers, heads, nope, rope, v
    assert latent_table("m", found).rows[1][1] == f"{found.expanded_nbytes:,}"


@pytest.mark.parametrize("target", ["k", "v"])
@pytest.mark.parametrize("name", NAMES)
def test_full_rank_costs_nothing_low_rank_does_and_bytes_are_counted(name: str, target: str, loaded, sequences) -> None:
    one, text = loaded(name), sequences(*(40,) * 4, seed=1)
    fitted = fit_expanded(Session(one), sequences(*(64,) * 8))
    series = sweep_expanded(Session(one), text, fitted, target, (0.2, 1.0), 20)
    low, full = series.points
    width, other = (10, 14) if target == "k" else (14, 10)
    assert (low.rank, full.rank) == (round(0.2 * width), width)
    assert abs(full.quality.delta_nll) < 1e-3
    assert low.quality.kl > 10 * max(full.quality.kl, 1e-6)
    for point in series.points:
        per_token = 2 * 3 * (4 * (point.rank + other) + 8)
        assert point.quality.encoded_nbytes == per_token * 4 * 20
        assert point.quality.sixteen_bit_nbytes == 2 * 3 * (20 + 8) * 4 * 20


def test_hooks_are_gone_after_an_error_and_other_models_are_refused(loaded, sequences) -> None:
    one = loaded("deepseek_v2")
    with pytest.raises(KeyboardInterrupt), expanded_codec(one, {}, 5):
        raise KeyboardInterrupt
    assert not any(module._forward_hooks for module in one.model.modules())
    with pytest.raises(UnsupportedArchitectureError, match="is not an MLA model"):
        compare_caches(loaded("llama"), sequences(40), 20)
    with pytest.raises(UnsupportedArchitectureError, match="no latent to expand"), expanded_codec(loaded("llama"), {}, 5):
        pass


def test_what_is_recorded_is_what_the_expansion_gives(loaded, sequences) -> None:
    from eigencache.models.mla_expanded import recorded_expansion

    one = loaded("deepseek_v2")
    ids = torch.from_numpy(sequences(12).ids[0])[None]
    with recorded_expansion(one) as kept:
        one.model(ids)
    assert sorted(kept) == [0, 1, 2]
    assert kept[0].shape == (1, 1, 12, 4 * (10 + 14))
