"""Fitting the live codec: steps near the best that are known, widths that cost least, and goals met or refused."""

import copy
import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eigencache.calibration.calibration_set import CalibrationSet
from eigencache.calibration.session import Session
from eigencache.codec.live.codec import LiveCodec
from eigencache.corpora.sequences import Sequences
from eigencache.errors import BudgetError, CodecError, StatisticsError
from eigencache.fitting import live_search
from eigencache.fitting.eigen import EigenSettings
from eigencache.fitting.eigen_basis import scaled_metrics
from eigencache.fitting.fit import Goal, LiveGoal, fit_codec, fit_live_codec
from eigencache.fitting.live import SAFE, LiveFit, LiveSettings, _stored_metric, fit_live
from eigencache.fitting.live_search import TRIED, fit_live_target
from eigencache.fitting.live_slot import FittedSlot, fit_slot, fitted_steps, large_mean
from eigencache.kernels.packed.format import BLOCK, GROUP, Widths
from eigencache.models.load import LoadedModel
from eigencache.models.tapped_cache import tapped_cache
from eigencache.spectral.rope import PAIRINGS, Pairing, Rotation, rotate
from stub_codecs import random_sequences, tiny_loaded
from tiny_models import tiny, token_ids

pytestmark = pytest.mark.slow

NAMES = ("llama", "qwen2", "gpt2", "deepseek_v2", "mistral")  # GQA, biases, learned positions, MLA, sliding windows
MODELS = pytest.mark.parametrize("name", NAMES)
PLAIN = LiveSettings(alpha=0.0, sinks=0, reach=40)  # positions as they were captured
Cached = dict[int, tuple[Tensor, Tensor]]


@functools.cache
def source(name: str) -> CalibrationSet:
    return CalibrationSet(Session(tiny_loaded(name)), random_sequences(*(40,) * 24))


@functools.cache
def fitted(name: str, settings: LiveSettings = LiveSettings()) -> LiveFit:  # noqa: B008 - frozen
    return fit_live(source(name), settings)


@torch.no_grad()
def stored(loaded: LoadedModel, ids: Tensor) -> Cached:
    """All that layers store, also those with a window."""
    cache, found = tapped_cache(loaded.model)
    loaded.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    return found


def values_of(fit: LiveFit) -> int:
    return sum(slot.mean.numel() for slot in fit.slots.values())


# Steps


@pytest.mark.parametrize(("bits", "known"), [(2, 0.1188), (4, 0.01154), (6, 0.001041)])
def test_steps_of_normal_coefficients_lose_what_the_best_uniform_quantizer_loses(bits: int, known: float) -> None:
    deviations = torch.tensor([1e-4, 0.03, 1.0, 1.0, 7.0, 1e3]).reshape(2, 3, 1)
    y = torch.randn(2, 3, 40_000, generator=torch.Generator().manual_seed(0)) * deviations
    steps, costs = fitted_steps(y)
    variance = y.square().mean(-1)
    share = costs[bits] / variance
    assert steps[bits].shape == costs[bits].shape == (2, 3)
    assert share.mean() == pytest.approx(known, rel=0.03)
    assert torch.equal(costs[0], y.square().mean(-1).sqrt().square())
    assert torch.allclose(steps[bits] / variance.sqrt(), torch.tensor({2: 0.9957, 4: 0.3352, 6: 0.1041}[bits]), rtol=0.16)


def test_costs_are_the_errors_of_the_steps_and_no_other_step_is_much_better() -> None:
    rng = np.random.default_rng(1)
    y = np.stack([rng.laplace(size=20_000), rng.normal(size=20_000), rng.standard_t(3, 20_000)])
    steps, costs = fitted_steps(torch.from_numpy(y).float()[None])
    for bits in (2, 4, 6, 8):
        c = (2**bits - 1) / 2

        def error(step: np.ndarray, c: float = c) -> np.ndarray:
            u = np.clip(np.round(y / step[:, None] + c), 0, 2 * c)
            return (((u - c) * step[:, None] - y) ** 2).mean(-1)

        found = steps[bits][0].double().numpy()
        np.testing.assert_allclose(costs[bits][0].numpy(), error(found), rtol=1e-3)
        for factor in (0.8, 0.9, 1.12, 1.25) if bits < 6 else ():
            assert (error(found * factor) > 0.97 * error(found)).all(), (bits, factor)
    assert all((costs[more] < costs[fewer]).all() for fewer, more in itertools.pairwise((0, 2, 4, 6, 8)))


def test_coefficients_beyond_the_range_of_their_width_are_counted() -> None:
    x = torch.randn(2, 4000, 16, generator=torch.Generator().manual_seed(0))
    eye = torch.eye(16).expand(2, 16, 16)
    slot = fit_slot(x, torch.arange(4000), None, eye, eye, 16)
    centered = (x - slot.mean[:, None]).double()
    y = torch.einsum("bcd,bnd->bcn", slot.encoder.double(), centered)
    for bits, steps in slot.steps.items():
        codes = (y / steps[..., None] + (2**bits - 1) / 2).round()
        outside = ((codes < 0) | (codes > 2**bits - 1)).double().mean(-1)
        torch.testing.assert_close(slot.saturated[bits].double(), outside, atol=1e-3, rtol=0)
    assert 0 < slot.saturated[2].mean() < 0.2
    assert slot.saturated[8].mean() < 0.001


def test_the_share_of_saturated_coefficients_is_that_of_the_widths_of_the_codec() -> None:
    fit = fitted("llama")
    shares = [fit.saturated(bits) for bits in (2, 4, SAFE)]
    assert shares == sorted(shares, reverse=True)
    assert 0 <= shares[-1] < shares[0] < 0.3


def test_a_coefficient_that_is_always_zero_costs_nothing_and_has_a_step() -> None:
    steps, costs = fitted_steps(torch.zeros(1, 8, 100))
    for bits in (2, 4, 6, 8):
        assert (steps[bits] > 0).all() and steps[bits].isfinite().all() and (costs[bits] < 1e-20).all()
    assert not costs[0].any()


# Means that turn

PAIRS, DIM, COUNT = 6, 16, 3000
PLANTED = ((0, 1, 9.0), (0, 4, 5.0), (1, 4, 6.0))  # head, pair, how large


def places(pairing: Pairing, pair: int) -> tuple[int, int]:
    return (pair, pair + PAIRS) if pairing == "half" else (2 * pair, 2 * pair + 1)


def keys(pairing: Pairing, scale: float, planted: tuple[tuple[int, int, float], ...] = PLANTED):
    """Rotated keys [heads, n, dim] with variance 1 before rotation, their positions, rotation and mean before it."""
    generator = torch.Generator().manual_seed(0)
    mean = 0.8 * torch.ones(2, DIM)  # a square below the limit; and a large one where nothing turns
    mean[:, 2 * PAIRS :] = 50
    for head, pair, size in planted:
        mean[head, places(pairing, pair)] = torch.tensor([0.6, -0.8]) * size
    positions = torch.randint(0, 500, (COUNT,), generator=generator)
    rotation = Rotation(1.0 / 10 ** (torch.arange(PAIRS, dtype=torch.float64) / 4), scale, pairing)
    before = torch.randn(2, COUNT, DIM, generator=generator) + mean[:, None]
    return rotate(before[None], rotation.angles(positions), pairing)[0], positions, rotation, mean


@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_large_means_are_found_in_their_pairs_and_nowhere_else(pairing: Pairing, scale: float) -> None:
    x, positions, rotation, mean = keys(pairing, scale)
    found = large_mean(x, positions, rotation)
    assert found is not None and found.rotation.pairing == pairing and found.rotation.scale == scale
    expected = torch.zeros_like(mean)
    for head, pair, _ in PLANTED:
        at = places(pairing, pair)
        expected[head, at] = mean[head, at]
    assert torch.equal(found.mean != 0, expected != 0)
    torch.testing.assert_close(found.mean, expected, rtol=0, atol=0.12)
    left = x - found.rotated_to(positions[None])[0]
    assert float(left[:, :, : 2 * PAIRS].square().mean()) < 1.8 * scale**2


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_means_that_are_not_large_are_left_where_they_are(pairing: Pairing) -> None:
    assert large_mean(*keys(pairing, 1.2, ())[:3]) is None


def test_the_limit_is_a_square_of_eight_variances() -> None:
    for size, within in ((8**0.5 * 1.1, True), (8**0.5 * 0.9, False)):
        x, positions, rotation, _ = keys("half", 1.0, ((1, 2, size),))
        assert (large_mean(x, positions, rotation) is not None) == within


def test_a_large_bias_of_a_models_keys_is_taken_out_of_the_layer_that_has_it() -> None:
    model = copy.deepcopy(tiny("qwen2"))
    bias = model.model.layers[1].self_attn.k_proj.bias
    with torch.no_grad():
        bias[16 + 3], bias[16 + 8 + 3] = 60.0, -40.0  # pair 3 of the second head
    fit = fit_live(CalibrationSet(Session(replace(tiny_loaded("qwen2"), model=model)), random_sequences(*(40,) * 24)))
    assert [at for at, slot in fit.slots.items() if slot.rotated_mean] == [(1, 0)]
    turning = fit.slots[1, 0].rotated_mean
    assert turning is not None and turning.mean.nonzero().tolist() == [[1, 3], [1, 11]]
    assert turning.mean[1, [3, 11]].tolist() == pytest.approx([60, -40], abs=5)
    plain = fitted("qwen2").slots[1, 0]
    assert float(fit.slots[1, 0].costs[0].sum()) < 5 * float(plain.costs[0].sum())
    assert [heads.rotated_mean is None for both in fit.safe().layers.values() for heads in both] == [
        True,
        True,
        False,
        *[True] * 3,
    ]


# Widths


def drawn_slot(seed: int, heads: int = 1, bundles: int = 1, groups: int = 2) -> FittedSlot:
    """Costs that fall with the width; E, D and steps that tell coefficients apart."""
    generator = torch.Generator().manual_seed(seed)
    count = GROUP * groups
    costs, left = {}, 100 * torch.rand(bundles, count, generator=generator)
    for bits in (0, 2, 4, 6, 8):
        costs[bits] = left
        left = left * torch.rand(bundles, count, generator=generator)
    matrices = torch.randn(2, bundles, count, heads // bundles * count, generator=generator)
    steps = {bits: torch.rand(bundles, count, generator=generator) + bits for bits in (2, 4, 6, 8)}
    return FittedSlot(torch.zeros(heads, count), None, matrices[0], matrices[1], steps, costs, {})


def test_digits_stand_by_width_and_carry_step_and_place() -> None:
    """Of 6 bits the higher digit is the last of 4 bits, four times as much worth, and the lower the first of 2 bits."""
    slot = drawn_slot(0, heads=2, bundles=2, groups=4)
    first = torch.tensor([8] * 8 + [6, 4, 2, 0] * 4 + [2, 4] * 4)
    heads = slot.at(torch.stack([first, torch.tensor([0] * 8 + [4] * 16 + [0] * 8)]))
    assert heads.widths == (Widths(8, 12, 12), Widths(0, 16, 0)) and heads.six == (4, 0)
    at = {bits: (first == bits).nonzero().flatten().tolist() for bits in (8, 6, 4, 2)}
    rows = [(8, c, 1) for c in at[8]] + [(4, c, 1) for c in at[4]] + [(6, c, 4) for c in at[6]]
    rows += [(6, c, 1) for c in at[6]] + [(2, c, 1) for c in at[2]]
    for row, (bits, c, place) in enumerate(rows):
        step = float(slot.steps[bits][0, c])
        torch.testing.assert_close(heads.encoder[0, row], slot.encoder[0, c] / step)
        torch.testing.assert_close(heads.decoder[0, row], slot.decoder[0, c] * step * place)
    assert not heads.encoder[1, 16:].any() and not heads.decoder[1, 16:].any()
    nothing = slot.at(torch.zeros(2, 32, dtype=torch.int64))
    assert nothing.widths == (Widths(0, 0, 0),) * 2 and nothing.encoder.shape == (2, 0, 32)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("price", [0.001, 0.3, 3.0, 100.0])
def test_digits_come_in_groups_and_go_where_they_save_most(seed: int, price: float) -> None:
    slot = drawn_slot(seed, bundles=2, heads=2, groups=3)
    for own in slot.widths(price):
        digits = [int((own == 8).sum()), int(((own == 4) | (own == 6)).sum()), int(((own == 2) | (own == 6)).sum())]
        assert all(count % GROUP == 0 for count in digits) and set(own.tolist()) <= {0, 2, 4, 6, 8}
    spent = torch.stack([slot.costs[bits] + price * bits for bits in (0, 2, 4, 6, 8)])
    chosen = spent.gather(0, (slot.widths(price) // 2)[None])[0].sum()
    assert float(chosen) >= float(spent.amin(0).sum()) - 1e-4  # what could be had without groups
    alike = min(float(spent[i].sum()) for i in range(5))
    assert float(chosen) <= alike + 1e-4  # nothing is gained by one width for all


def test_without_a_price_all_have_8_bits_and_at_any_price_none() -> None:
    slot = drawn_slot(1, groups=3)
    assert slot.widths(0.0).unique().tolist() == [8] and slot.widths(1e30).unique().tolist() == [0]


@MODELS
def test_bits_are_at_most_what_was_asked_for_and_short_of_it_by_one_group(name: str) -> None:
    fit = fitted(name)
    for bits in (0.3, 1.7, 4.5, 8.0):
        found = fit.at_bits(bits).bits_per_value
        assert found <= bits and bits - found <= 3 * 8 * GROUP / values_of(fit), bits


@pytest.mark.parametrize("bits", [0.0, -1.0, 8.01, 9.0, float("nan")])
def test_bits_that_no_width_gives_are_refused(bits: float) -> None:
    with pytest.raises(BudgetError, match=r"is out of range: use more than 0 and at most 8 bits per packed value"):
        fitted("llama").at_bits(bits)


@MODELS
def test_safe_is_nearly_seven_bits_where_they_are_of_most_use(name: str) -> None:
    codec = fitted(name).safe()
    assert codec.name == "live · safe" and 6 < codec.bits_per_value <= SAFE == 6.875


def test_the_power_of_the_metric_is_that_of_models_with_their_kind_of_positions() -> None:
    assert [fitted(name).settings.alpha for name in NAMES] == [0.75, 0.75, 1.0, 0.75, 0.75]


def test_names_and_what_is_kept_are_as_settings_say() -> None:
    fit = fitted("llama", LiveSettings(alpha=0.5, sinks=3, window=7))
    codec = fit.at_bits(2.5)
    assert codec.name == "live · fisher^0.5 · 2.5 bits" and fit.at_bits(2.5, "mine").name == "mine"
    assert (codec.sinks, codec.window, codec.dtype) == (3, 7, torch.float32)
    assert list(codec.layers) == [0, 1, 2] and fit.safe().window == 7


# Bases


@pytest.mark.parametrize(
    ("name", "shared", "bundles"),
    [
        ("llama", 1, 2), ("llama", 31, 2), ("llama", 32, 1), ("llama", 128, 1),
        ("gpt2", 12, 4), ("gpt2", 24, 2), ("gpt2", 36, 2), ("gpt2", 48, 1), ("deepseek_v2", 1, 1),
    ],
)  # fmt: skip
def test_heads_share_a_basis_while_they_have_so_few_numbers(name: str, shared: int, bundles: int) -> None:
    fit = fitted(name, LiveSettings(shared=shared))
    for slot in fit.slots.values():
        heads, dim = slot.mean.shape
        numbers = heads // bundles * dim
        padded = -(-numbers // GROUP) * GROUP
        assert slot.encoder.shape == slot.decoder.shape == (bundles, padded, numbers)
        assert {x.shape for x in (*slot.steps.values(), *slot.costs.values())} == {(bundles, padded)}
        unity = slot.decoder.double().mT @ slot.encoder.double()
        torch.testing.assert_close(unity, torch.eye(numbers).double().expand_as(unity), rtol=0, atol=1e-3)
    apart, own = (
        sum(float(s.costs[0].sum()) for s in f.slots.values()) for f in (fitted(name, LiveSettings(shared=1)), fit)
    )
    assert own == pytest.approx(apart, rel=1e-4)  # a turn changes no sum of variances
    volumes = [
        sum(float(s.costs[0][:, : s.encoder.shape[2]].double().log().sum()) for s in f.slots.values())
        for f in (fitted(name, LiveSettings(shared=1)), fit)
    ]
    assert volumes[1] < volumes[0] or bundles == heads_of_first(fit)  # Fischer's inequality: correlations are used


def heads_of_first(fit: LiveFit) -> int:
    return len(next(iter(fit.slots.values())).mean)


def in_blocks(name: str) -> tuple[Cached, Tensor]:
    """All that everything was fitted on, a block for each sequence, which ends in zeros; and the positions."""
    sequences = source(name).fitted_on
    found = stored(source(name).session.loaded, torch.from_numpy(np.stack(sequences.ids)))

    def filled(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, 0, 0, BLOCK - x.shape[2]))

    positions = torch.arange(BLOCK).expand(len(sequences.ids), -1)
    return {i: (filled(k), filled(v)) for i, (k, v) in found.items()}, positions


def weighed_errors(name: str, codec: LiveCodec, alpha: float) -> dict[tuple[int, int], float]:
    """Mean squared error in the metric of every slot, of everything that was fitted on."""
    metrics = _stored_metric(source(name), 40)
    roots = dict(zip(sorted(metrics), scaled_metrics([metrics[at] for at in sorted(metrics)], alpha)[0], strict=True))
    cached, positions = in_blocks(name)
    errors = {}
    for i, both in cached.items():
        for slot, x in enumerate(both):
            heads = codec.layers[i][slot]
            back = heads.decode(heads.encode(x, positions), positions)
            lost = ((back - x)[:, :, :40].transpose(0, 1).flatten(1, 2) @ roots[i, slot]).double()
            errors[i, slot] = float(lost.square().sum(-1).mean(-1).sum())
    return errors


@pytest.mark.parametrize("alpha", [0.0, 0.75])
@MODELS
def test_what_decoding_loses_is_what_the_fit_says_it_costs(name: str, alpha: float) -> None:
    fit = fitted(name, LiveSettings(alpha=alpha, sinks=0, reach=40))
    for price in (1e-6, 1e-2):
        widths = {at: slot.widths(price * float(slot.costs[0].mean())) for at, slot in fit.slots.items()}
        for at, error in weighed_errors(name, fit._codec(widths, "some"), alpha).items():
            costs = torch.stack([fit.slots[at].costs[bits] for bits in (0, 2, 4, 6, 8)])
            assert error == pytest.approx(float(costs.gather(0, (widths[at] // 2)[None]).sum()), rel=5e-3), at
    nothing = fit._codec(fit._widths(1e30), "nothing")
    assert nothing.bits_per_value == 0
    with pytest.raises(BudgetError, match=r"too few for one group of 8 coefficients. Use more"):
        fit.at_bits(1e-3)
    for at, error in weighed_errors(name, nothing, alpha).items():
        assert error == pytest.approx(float(fit.slots[at].costs[0].sum()), rel=1e-3), at


@MODELS
def test_more_bits_never_lose_more(name: str) -> None:
    fit = fitted(name, LiveSettings(alpha=0.75, reach=40))
    lost = [sum(weighed_errors(name, fit.at_bits(bits), 0.75).values()) for bits in (0.5, 1.5, 3, 5, 8)]
    assert lost == sorted(lost, reverse=True) and lost[-1] < 1e-2 * lost[0]


@MODELS
def test_of_text_that_was_not_fitted_on_little_is_lost_at_8_bits_and_more_at_fewer(name: str) -> None:
    fit, cached = fitted(name, PLAIN), stored(tiny_loaded(name), token_ids(2, 64))

    def lost(codec: LiveCodec) -> float:
        back = codec.decode(codec.encode(cached))
        parts = [(back[i][slot] - x, x) for i, both in cached.items() for slot, x in enumerate(both)]
        return float(sum(d.square().sum() for d, _ in parts) / sum((x - x.mean(2, True)).square().sum() for _, x in parts))

    found = [lost(fit.at_bits(bits)) for bits in (1, 2, 4, 8)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.02 and found[0] > 0.1
    assert (fit.safe().packed_of(64, 0)) == (0, 64)


# Goals


class Scored:
    """Stands for scoring: `loss` and `kl` of bits per value; remembers what it was given."""

    def __init__(self, loss: Callable[[float], float], kl: Callable[[float], float]) -> None:
        self.loss, self.kl = loss, kl
        self.codecs: Mapping[str, LiveCodec] = {}
        self.session: Session | None = None
        self.held_out: Sequences | None = None

    def __call__(self, session: Session, held_out: Sequences, codecs: Mapping[str, LiveCodec]) -> dict[str, Any]:
        self.session, self.held_out, self.codecs = session, held_out, codecs
        same = {"tokens": 100, "delta_nll_interval": (-0.5, 0.5), "top1_agreement": 0.75}
        bits = {name: codec.bits_per_value for name, codec in codecs.items()}
        return {name: SimpleNamespace(delta_nll=self.loss(b), kl=self.kl(b), **same) for name, b in bits.items()}


AT_BITS = functools.cache(LiveFit.at_bits)  # the same for every loss


def reached(
    monkeypatch: pytest.MonkeyPatch,
    loss: Callable[[float], float],
    kl: Callable[[float], float] = lambda _: 0.0,
    **goal: Any,
):
    scored = Scored(loss, kl)
    monkeypatch.setattr(LiveFit, "at_bits", AT_BITS)
    monkeypatch.setattr(live_search, "score_held_out", scored)
    own = source("llama")
    apart = replace(own.held_out, corpus=own.held_out.corpus.model_copy(update={"max_length": 256}))
    found = fit_live_target(fitted("llama"), Session(own.session.loaded, batch_size=3), apart, context=1000, **goal)
    assert scored.session and scored.session.loaded is own.session.loaded and scored.session.batch_size == 3
    assert scored.held_out and all(np.array_equal(a, b) for a, b in zip(scored.held_out.ids, own.held_out.ids, strict=True))
    return found, scored


@pytest.mark.parametrize(
    "goal", [{"bits": 2.0, "max_nll": 0.1}, {"bits": 2.0, "safe": True}, {"max_nll": 0.1, "safe": True}]
)
def test_several_goals_are_refused(goal: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BudgetError, match="Give only one of `bits`, `max_nll` and `safe`"):
        reached(monkeypatch, lambda _: 0.0, **goal)


def test_bits_and_safety_are_scored_once_and_taken_whatever_they_lose(monkeypatch: pytest.MonkeyPatch) -> None:
    for goal, name, bits in (({"bits": 2.5}, "live · fisher^0.75 · 2.5 bits", 2.5), ({"safe": True}, "live · safe", 7.0)):
        (codec, expected), scored = reached(monkeypatch, lambda _: 9.0, **goal)
        assert codec.name == name and codec.bits_per_value == pytest.approx(bits, abs=0.34)
        assert list(scored.codecs.values()) == [codec] and expected.delta_nll == 9


def test_the_promise_is_what_was_scored_and_the_bytes_of_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    (codec, expected), _ = reached(monkeypatch, lambda _: 0.125, lambda _: 0.25, bits=3.0)
    values = 3 * 2 * 2 * 16
    assert 0 < (expected.out_of_range or 0) < 0.1
    assert expected.model_dump(exclude={"out_of_range"}) == {
        "context": 1000,
        "bits_per_value": 8 * codec.nbytes_of(1000) / (1000 * values),
        "coded_bits": codec.bits_per_value * values,
        "tokens": 100,
        "delta_nll": 0.125,
        "delta_nll_interval": (-0.5, 0.5),
        "kl": 0.25,
        "top1_agreement": 0.75,
        "chosen_by_loss": False,
    }
    assert codec.bits_per_value < expected.bits_per_value < 16


@pytest.mark.parametrize("goal", [{}, {"max_nll": 0.01}, {"max_nll": 0.3}, {"max_nll": 2.0}])
def test_the_smallest_codec_within_the_loss_is_taken(goal: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    (codec, expected), scored = reached(monkeypatch, lambda bits: 4.0**-bits, **goal)
    limit = goal.get("max_nll", 0.01)
    sizes = sorted(c.bits_per_value for c in scored.codecs.values())
    assert len(sizes) >= 10 and sizes[0] <= 1.5 and sizes[-1] <= 8
    assert codec.bits_per_value == min(b for b in sizes if 4.0**-b <= limit)
    assert expected.delta_nll == 4.0**-codec.bits_per_value and expected.chosen_by_loss


def test_a_loss_is_kept_by_the_divergence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """By chance a codec may predict a few thousand tokens as well as the model, and predict otherwise all the same."""
    codec = reached(monkeypatch, lambda _: -0.5, lambda bits: 4.0**-bits)[0].codec
    assert codec.bits_per_value > 3.25
    with pytest.raises(BudgetError, match=r"`max_nll`=0\.02 nats cannot be met: 8 bits lose 0\.0500 nats"):
        reached(monkeypatch, lambda _: -0.5, lambda _: 0.05, max_nll=0.02)


def test_a_codec_below_one_that_loses_more_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By chance one of 2 bits may lose little where one of 3 loses much."""
    codec = reached(monkeypatch, lambda bits: 1.0 if 2.6 < bits <= 3.1 else 0.0)[0].codec
    assert 3.1 < codec.bits_per_value <= 3.25


def test_a_loss_that_even_8_bits_exceed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BudgetError, match=r"`max_nll`=0\.02 nats cannot be met: 8 bits lose 0\.0500 nats"):
        reached(monkeypatch, lambda _: 0.05, max_nll=0.02)
    with pytest.raises(BudgetError, match=r"`max_nll`=0\.01 nats cannot be met: 8 bits lose 0\.0700 nats"):
        reached(monkeypatch, lambda bits: 0.07 if bits > 7 else 0.0)
    assert TRIED[-1] == 8 and list(TRIED) == sorted(TRIED)


def test_sequences_too_short_for_a_block_promise_nothing() -> None:
    own = source("llama")
    words = r"Sequences of 40 tokens are too short: no block of 64 tokens is ever packed\. Use `max_length` ≥ 136\."
    with pytest.raises(StatisticsError, match=words):
        fit_live_target(fitted("llama"), Session(own.session.loaded), own.held_out, bits=2.0)
    started: list[str] = []
    session = Session(own.session.loaded, on_progress=lambda what, _done, _of: started.append(what))
    for fit in (
        lambda: fit_live_codec(session, own.sequences, LiveGoal()),
        lambda: fit_codec(session, own.sequences, EigenSettings(), Goal(bits=1.0), live=LiveGoal()),
    ):
        with pytest.raises(StatisticsError, match=words):
            fit()
    assert not started


@pytest.mark.parametrize("wrong", [{"shared": 0}, {"reach": 0}, {"window": -1}, {"sinks": -1}, {"alpha": -1.0}])
def test_settings_below_their_least_value_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(CodecError, match=f"`{next(iter(wrong))}`=.* must be at least"):
        LiveSettings(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [0.0, -1.0, float("nan"), float("inf")])
def test_a_loss_that_is_no_number_above_0_is_refused(loss: float) -> None:
    with pytest.raises(BudgetError, match="must be a number above 0"):
        fit_live_target(fitted("llama"), Session(source("llama").session.loaded), source("llama").held_out, max_nll=loss)


def test_more_sinks_than_tokens_are_refused() -> None:
    with pytest.raises(StatisticsError, match=r"No sequence is longer than 100 sinks. Lower `sinks`"):
        fitted("llama", LiveSettings(sinks=100))
