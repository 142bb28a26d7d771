"""The bench gives back what was planted: bytes, losses, seeds and refusals; interrupted, it ends in the same record."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from eigencache.calibration.session import Session
from eigencache.codec.base import Encoded
from eigencache.corpora.resolve import read_text
from eigencache.corpora.sequences import Sequences, pack
from eigencache.errors import (
    BudgetError,
    CodecError,
    CorpusError,
    ModelError,
    NonFiniteError,
    StatisticsError,
    UnsupportedArchitectureError,
)
from eigencache.evaluate import prefix as prefix_module
from eigencache.evaluate.prefix import read_prefix
from eigencache.records.bench import BenchRecord
from eigencache.studies.bench import run as bench_module
from eigencache.studies.bench.context import BenchContext
from eigencache.studies.bench.methods import Method
from eigencache.studies.bench.run import BenchSettings, bench_model, chosen
from stub_codecs import Identity, Zeros, bundled, random_sequences, tiny_loaded

pytestmark = pytest.mark.slow

SCORED, CONTEXTS = 8, (16, 24)  # the first of the scored tokens is read, not predicted
VALUES = 3 * 2 * 2 * 16  # numbers per token of the tiny llama: layers, slots, heads, dim
CALIBRATION = random_sequences(*[32] * 24, seed=1)


@dataclass(frozen=True)
class Share(Identity):
    """The values shrunk by a share: the more, the worse. Its bytes are said by hand: `bits` per number held."""

    lost: float = 0.0
    bits: int = 16
    nbytes: int = 77

    def encode(self, cached, start: int) -> Encoded:
        encoded = super().encode(cached, start)
        return Planted(encoded.tensors, start, encoded.tokens, bits=self.bits)

    def decode(self, encoded: Encoded) -> dict[int, tuple[Tensor, Tensor]]:
        return {i: (k, v * (1 - self.lost)) for i, (k, v) in super().decode(encoded).items()}


@dataclass(frozen=True, eq=False)
class Planted(Encoded):
    bits: int = 16

    @property
    def nbytes(self) -> int:
        return sum(t.numel() for t in self.tensors.values()) * self.bits // 8

    def select(self, rows: Tensor) -> "Planted":
        return replace(self, tensors={name: t[rows] for name, t in self.tensors.items()})


@dataclass
class Made:
    """Methods whose every fit is counted, with the first ids of what it was fitted on."""

    fits: list[tuple[str, int]] = field(default_factory=list)

    def method(self, name: str, codecs: dict | Exception, **options) -> Method:
        def fit(bench: BenchContext) -> dict:
            self.fits.append((name, int(np.concatenate(bench.sequences.ids).sum())))
            if isinstance(codecs, Exception):
                raise codecs
            return codecs

        return Method(name, fit, **options)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    made = Made()
    ladder = {f"{bits}": Share(lost=0.8 / bits, bits=bits) for bits in (1, 2, 4, 8)}
    methods = {
        "identity": made.method("identity", {"whole": Identity()}, fitted=False),
        "zeros": made.method("zeros", {"nothing": Zeros()}),
        "ladder": made.method("ladder", ladder),
        "not here": made.method("not here", {}, refuses=lambda loaded: f"{loaded.name} has no such thing"),
        "odd": made.method("odd", UnsupportedArchitectureError("keys are normed")),
        "narrow": made.method("narrow", CodecError("no full rank")),
        "scarce": made.method("scarce", StatisticsError("too few tokens")),
        "large": made.method("large", BudgetError("no such rate")),
        "broken": made.method("broken", NonFiniteError("layer 1 holds NaN")),
        "no point": made.method("no point", {}),
    }
    monkeypatch.setattr(bench_module, "METHODS", methods)
    return made


def held_out(contexts: tuple[int, ...] = CONTEXTS, sequences: int = 12) -> dict[int, Sequences]:
    return {c: random_sequences(*[c + SCORED] * sequences, seed=100 + c) for c in contexts}


def bench(methods: tuple[str, ...] = ("identity", "zeros", "ladder"), **options) -> BenchRecord:
    chosen_settings = options.pop("settings", {})
    settings = BenchSettings(methods=methods, scored=SCORED, **({"seeds": (0, 1)} | chosen_settings))
    options = {"calibration": CALIBRATION, "tokens": 16 * 32, "held_out": held_out()} | options
    loaded = tiny_loaded(options.pop("model", "llama"))
    progress = {name: options.pop(name) for name in ("on_progress",) if name in options}
    session = Session(loaded, batch_size=4, **progress)
    return bench_model(session, options.pop("calibration"), options.pop("tokens"), settings=settings, **options)


def test_bytes_and_losses_are_those_that_were_planted(made: Made) -> None:
    record = bench()
    whole = {p.context: p for p in record.points if p.method == "identity"}
    assert {c: p.bits_per_value for c, p in whole.items()} == dict.fromkeys(CONTEXTS, 32)
    assert all(p.quality.delta_nll == 0 and p.excess == [0.0] * 12 for p in whole.values())
    for point in (p for p in record.points if p.method == "ladder"):
        assert point.bits_per_value == int(point.point)
        assert point.quality.encoded_nbytes == 12 * point.context * VALUES * int(point.point) // 8
        assert (point.quality.basis_nbytes, point.quality.tokens) == (77, 12 * (SCORED - 1))
        assert point.quality.delta_nll == pytest.approx(sum(point.excess) / (12 * (SCORED - 1)))
        assert point.quality.nll - record.uncompressed_nll[point.context] == pytest.approx(point.quality.delta_nll)
    kl = [p.quality.kl for p in record.points if p.method == "ladder" and p.seed == 0 and p.context == 16]
    assert kl == sorted(kl, reverse=True) and kl[-1] > 0
    assert record.refused == {} and set(record.corpora) == set(record.uncompressed_nll) == set(CONTEXTS)


def test_in_steps_the_last_piece_is_read_behind_all_that_came_before_it_held(made: Made) -> None:
    record, at_once = bench(settings={"step": 3}), bench()
    assert (record.step, at_once.step) == (3, 0)
    held = {p.context: p.quality.encoded_nbytes for p in record.points if p.method == "identity"}
    assert held == {c: 12 * (c + 6) * VALUES * 4 for c in CONTEXTS}  # pieces of 3, 3 and 2
    assert record.uncompressed_nll == pytest.approx(at_once.uncompressed_nll, rel=1e-5)
    for a, b in zip(record.points, at_once.points, strict=True):
        assert a.quality.tokens == b.quality.tokens and a.bits_per_value == b.bits_per_value
        assert a.method == "identity" or a.quality.kl != b.quality.kl


def test_equal_losses_are_read_off_every_methods_own_curve(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "LOSSES", (0.01,))
    record = bench(("identity", "ladder"))
    found = {(one.method, one.context): one for one in record.equal_loss}
    assert set(found) == {(m, c) for m in ("identity", "ladder") for c in CONTEXTS}
    assert found["identity", 16].why == "loses 0.0000 at its fewest, 32 bits"
    assert [len(found[m, 16].by_seed) for m in ("identity", "ladder")] == [1, 2]
    for context in CONTEXTS:
        one = found["ladder", context]
        if one.bits_per_value is not None:
            assert 1 < one.bits_per_value < 8 and one.by_seed[0] == pytest.approx(one.by_seed[1])
        else:
            assert one.why.startswith("loses ")


def test_what_calibration_does_not_decide_is_scored_for_the_first_seed_only(made: Made) -> None:
    record = bench(settings={"seeds": (3, 5, 7)})
    seeds = {m: {p.seed for p in record.points if p.method == m} for m in ("identity", "zeros", "ladder")}
    assert seeds == {"identity": {3}, "zeros": {3, 5, 7}, "ladder": {3, 5, 7}}
    assert [name for name, _ in made.fits] == ["identity", "zeros", "ladder", "zeros", "ladder", "zeros", "ladder"]
    assert record.run.seed == 3


def test_what_a_model_cannot_have_is_listed_with_the_reason_and_the_rest_is_scored(made: Made) -> None:
    record = bench(("not here", "odd", "scarce", "large", "broken", "identity", "narrow", "no point"))
    assert record.refused == {
        "not here": "llama has no such thing",
        "odd": "keys are normed",
        "scarce": "too few tokens",
        "large": "no such rate",
        "broken": "layer 1 holds NaN",
        "narrow": "no full rank",
        "no point": "it has no operating point at the requested rates",
    }
    assert {p.method for p in record.points} == {one.method for one in record.equal_loss} == {"identity"}
    assert "not here" not in {name for name, _ in made.fits}


def test_a_bench_of_which_nothing_is_left_is_a_record_anyway(made: Made) -> None:
    record = bench(("not here", "no point"))
    assert (record.points, record.equal_loss, len(record.refused)) == ([], [], 2)
    assert record.uncompressed_nll[16] > 0


def test_a_record_survives_its_file(made: Made, tmp_path: Path) -> None:
    record = bench()
    record.save(tmp_path / "r.json")
    assert BenchRecord.load(tmp_path / "r.json") == record


def test_prefixes_are_read_once_for_all_methods_and_seeds(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    monkeypatch.setattr(prefix_module, "read_prefix", lambda *args: reads.append(1) or read_prefix(*args))
    plenty = bench()
    assert len(reads) == 3 * len(CONTEXTS)  # batches of 4 of 12 sequences
    monkeypatch.setattr(bench_module, "_PREFIXES", 0)
    scarce = bench()
    assert len(reads) == 3 * len(CONTEXTS) * (1 + 1 + 5)  # the uncompressed cache, and methods of both seeds
    assert scarce.points == plenty.points


# Seeds


def test_a_seed_chooses_other_sequences_reproducibly_and_in_the_texts_order() -> None:
    found = [chosen(CALIBRATION, 10 * 32, seed) for seed in (0, 1, 0)]
    assert [len(one.ids) for one in found] == [10, 10, 10]
    of = lambda one: [next(i for i, row in enumerate(CALIBRATION.ids) if row is ids) for ids in one.ids]  # noqa: E731
    assert of(found[0]) == of(found[2]) == sorted(of(found[0])) != of(found[1])
    assert all(a is b for a, b in zip(chosen(CALIBRATION, 10**9, 4).ids, CALIBRATION.ids, strict=True))
    assert len(chosen(CALIBRATION, 1, 0).ids) == 1


def test_every_seed_is_fitted_on_its_own_sequences(made: Made) -> None:
    bench(("ladder",), settings={"seeds": (0, 1, 2)})
    again = Made(list(made.fits))
    made.fits.clear()
    bench(("ladder",), settings={"seeds": (0, 1, 2)})
    assert made.fits == again.fits and len(set(made.fits)) == 3


# Texts that overlap


def test_a_text_that_overlaps_the_calibration_is_refused_and_with_force_it_is_said(made: Made) -> None:
    calibration = random_sequences(*[64] * 24, seed=1)
    same = {56: random_sequences(*[64] * 24, seed=1)}
    with pytest.raises(CorpusError, match="occur in the calibration text: results would be too optimistic"):
        bench(calibration=calibration, held_out=same)
    assert not made.fits
    record = bench(("identity",), calibration=calibration, held_out=same, force=True)
    assert any(warning.startswith("OVERLAP") for warning in record.warnings)
    assert record.run.settings["forced"] is True


def test_a_text_longer_than_the_models_positions_is_refused_before_any_fit(made: Made) -> None:
    with pytest.raises(ModelError, match="64 positions"):
        bench(model="gpt2", held_out=held_out((16, 60)))
    assert not made.fits


# Interruptions


def interrupted_at(line: int) -> Callable[[str, int, int], None]:
    """Progress that is interrupted when scoring begins for the `line`-th time."""
    begun: list[str] = []

    def on_progress(name: str, done: int, of: int) -> None:
        if name.endswith("scoring") and done == 0:
            begun.append(name)
        if len(begun) == line:
            raise KeyboardInterrupt

    return on_progress


GENERATION = {"prompts": 2, "tasks": ("copy",)}


@pytest.fixture
def generation(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Generation without a model: which codecs it was asked for."""
    asked: list[tuple[str, ...]] = []

    def measure(loaded, sequences, codecs, **options) -> list:
        asked.append(tuple(codecs))
        return []

    monkeypatch.setattr(bench_module, "measure_divergence", measure)
    monkeypatch.setattr(bench_module, "evaluate_retrieval", lambda *_, **__: [])
    return asked


@pytest.mark.parametrize(
    ("scorings", "lines", "fits_left"), [(2, 1, 7), (3, 2, 7), (5, 4, 7), (6, 5, 7), (7, 11, 3), (8, 12, 3)]
)
def test_an_interrupted_bench_continues_and_ends_in_the_same_record(
    made: Made, generation, tmp_path, scorings: int, lines: int, fits_left: int
) -> None:
    """Scored are two contexts uncompressed, then identity and ladder (seed 0), then ladder (seed 1), two contexts each."""
    methods = ("identity", "ladder", "odd", "no point")
    whole = bench(methods, settings=GENERATION)
    fits = list(made.fits)
    made.fits.clear()
    partial = tmp_path / "partial"
    with pytest.raises(KeyboardInterrupt):
        bench(methods, settings=GENERATION, partial=partial, on_progress=interrupted_at(scorings))
    kept, before = partial.read_text(), list(made.fits)
    resumed = bench(methods, settings=GENERATION, partial=partial)
    assert resumed.model_copy(update={"run": whole.run}) == whole
    assert partial.read_text().startswith(kept)
    assert len(kept.splitlines()) == 1 + lines  # the key, and what was measured, found impossible, or generated
    assert made.fits[len(before) :] == fits[-fits_left:]  # for generation, codecs of the first seed are needed again
    assert len(generation) == 2 and generation[0] == generation[1]  # once in each of the two benches


def test_an_interruption_before_generation_does_not_lose_it(made: Made, monkeypatch, tmp_path: Path) -> None:
    asked: list[tuple[str, ...]] = []

    def measure(loaded, sequences, codecs, **options) -> list:
        asked.append(tuple(codecs))
        if len(asked) == 1:
            raise KeyboardInterrupt
        return []

    monkeypatch.setattr(bench_module, "measure_divergence", measure)
    partial = tmp_path / "partial"
    with pytest.raises(KeyboardInterrupt):
        bench(("identity", "zeros"), settings={"prompts": 2}, partial=partial)
    bench(("identity", "zeros"), settings={"prompts": 2}, partial=partial)
    assert len(asked) == 2 and asked[0] == asked[1] and "identity whole" in asked[0]


def test_another_choice_of_methods_keeps_what_was_scored_and_shows_what_was_chosen(made: Made, tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    bench(("identity", "zeros", "odd"), partial=partial)
    made.fits.clear()
    record = bench(("ladder", "identity"), partial=partial)
    assert {name for name, _ in made.fits} == {"ladder"} and record.refused == {}
    assert {p.method for p in record.points} == {one.method for one in record.equal_loss} == {"identity", "ladder"}
    assert record.equal_loss == bench(("ladder", "identity")).equal_loss


def test_a_finished_bench_is_read_and_nothing_is_fitted(made: Made, tmp_path: Path) -> None:
    first = bench(partial=tmp_path / "partial")
    made.fits.clear()
    again = bench(partial=tmp_path / "partial")
    assert not made.fits and again.points == first.points and again.equal_loss == first.equal_loss


@pytest.mark.parametrize("change", [{"tokens": 17 * 32}, {"settings": {"rates": (1.0,)}}, {"held_out": held_out((16,))}])
def test_other_settings_or_texts_begin_anew(made: Made, tmp_path: Path, change: dict) -> None:
    bench(partial=tmp_path / "partial")
    made.fits.clear()
    bench(partial=tmp_path / "partial", **change)
    assert made.fits


# Generation and retrieval


def test_generation_and_retrieval_look_at_the_cheapest_point_that_diverges_little(made: Made) -> None:
    loaded = bundled("ref-llama")
    calibration = pack(read_text("stdlib"), loaded.tokenizer, tokens=2048, max_length=128)
    text = pack(read_text("stdlib:held-out"), loaded.tokenizer, tokens=1024, max_length=96 + SCORED)
    settings = BenchSettings(
        methods=("identity", "zeros", "ladder"), scored=SCORED, seeds=(0,), tasks=("copy",), prompts=2, examples=6
    )
    said: list[str] = []
    record = bench_model(
        Session(loaded, on_progress=lambda name, *_: said.append(name)),
        calibration,
        2048,
        {96: text},
        settings,
    )
    generated = {one.codec: one for one in record.divergence}
    assert "identity whole" in generated and not any(name.startswith("zeros") for name in generated)
    assert generated["identity whole"].never_parted == 2 == len(generated["identity whole"].agreement)
    (cheapest,) = [name for name in generated if name.startswith("ladder")] or ["ladder 8"]
    within = [p for p in record.points if p.method == "ladder" and p.quality.kl <= bench_module.COMPARABLE]
    assert not within or cheapest == f"ladder {min(within, key=lambda p: p.bits_per_value).point}"
    assert {one.depth for one in record.retrieval} == {0.0, 0.5, 1.0}
    for one in record.retrieval:
        assert one.length == 97 and (not one.applicable or {r.codec for r in one.results} == set(generated))
    assert {"generation", "retrieval", "seed 0: fitting zeros", "seed 0, 96 tokens, zeros: scoring"} <= set(said)
