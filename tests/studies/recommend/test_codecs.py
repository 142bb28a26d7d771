"""Codecs are measured at every rate, chosen within the budget, refused with a reason, and not measured again."""

from collections.abc import Callable
from pathlib import Path

import pytest

from eigencache.calibration.session import Session
from eigencache.errors import CorpusError, StatisticsError
from eigencache.records.advice import Advice, Budget, CodecAdvice
from eigencache.records.quality import ReadingProtocol
from eigencache.studies.recommend import codecs as study
from eigencache.studies.recommend.candidates import Search
from eigencache.studies.recommend.codecs import CodecSearch, measure_codecs, partial_names
from eigencache.studies.recommend.commands import Recipe
from eigencache.studies.recommend.recommend import CODEC_FAMILIES, partial_paths, recommend_model

pytestmark = pytest.mark.slow

PROTOCOL = ReadingProtocol(kind="prefix", length=80)
RATES = {"eigen": (1.0, 4.0), "live": (2.0, 6.875)}
RECIPE, LOOSE = Recipe("tiny", "stdlib", 2_048, 64), Budget(nats=10.0, given="loose")
SCORING = "stored codec: choosing: scoring"


@pytest.fixture
def searched(sequences) -> Callable[..., CodecSearch]:
    """Random ids: 16 sequences to fit on, 8 to choose on and 8 to state on."""

    def search(**changes: object) -> CodecSearch:
        settings = {
            "calibration": sequences(*(140,) * 16),
            "choosing": sequences(*(100,) * 8, seed=1),
            "stating": sequences(*(100,) * 8, seed=2),
            "budget": LOOSE,
            "protocol": PROTOCOL,
            "recipe": RECIPE,
            "rates": RATES,
        }
        return CodecSearch(**(settings | changes))  # type: ignore[arg-type]

    return search


def measured(session: Session, search: CodecSearch, folder: Path | None = None) -> dict[str, CodecAdvice]:
    paths = partial_paths(folder and folder / "p")
    return {one.family: one for one in measure_codecs(session, search, CODEC_FAMILIES, paths)}


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


# Measuring


@pytest.mark.parametrize("name", ["llama", "deepseek_v2"])
def test_every_rate_is_measured_and_the_smallest_within_the_budget_is_stated(name: str, loaded, searched) -> None:
    model = loaded(name)
    values = model.geometry.values_per_token
    for family, one in measured(Session(model, batch_size=4), searched()).items():
        assert [c.choosing.sequences for c in one.candidates] == [8, 8] and not one.left_out
        assert one.chosen == max(one.candidates, key=lambda c: c.choosing.compression_ratio)
        assert [c.stating is not None for c in one.candidates] == [c == one.chosen for c in one.candidates]
        assert one.nearest is None and one.uncompressed_nll and one.calibration
        for candidate, wanted in zip(one.candidates, RATES[family], strict=True):
            assert candidate.rate == pytest.approx(wanted, rel=0.035)
            assert candidate.longer.sixteen_bit_nbytes == 2 * 2048 * values
            assert candidate.command == RECIPE.codec(family, candidate.rate)  # type: ignore[arg-type]
            low, high = candidate.choosing.kl_interval  # type: ignore[misc]
            assert low <= candidate.choosing.kl <= high
            if family == "eigen":
                assert 8 * candidate.longer.payload_nbytes / (2048 * values) == pytest.approx(candidate.rate, rel=0.01)


def test_nothing_within_the_budget_names_the_nearest(loaded, searched) -> None:
    session = Session(loaded("llama"), batch_size=4)
    one = measured(session, searched(budget=Budget(nats=-1.0, given="impossible")))["eigen"]
    assert one.chosen is None and one.nearest
    assert one.nearest.upper_nats == min(c.upper_nats for c in one.candidates)
    assert all(c.stating is None for c in one.candidates)


def test_rates_and_families_that_do_not_suit_a_model_have_their_reason(loaded, searched, sequences) -> None:
    session = Session(loaded("gpt2"), batch_size=4)  # 64 learned positions
    short = {"choosing": sequences(*(60,) * 8, seed=1), "protocol": ReadingProtocol(kind="prefix", length=40)}
    rates = {"eigen": (0.001, 4.0), "live": (2.0,)}
    fitted_on = sequences(*(64,) * 32)
    found = measured(session, searched(**short, calibration=fitted_on, stating=None, rates=rates))
    assert len(found["eigen"].candidates) == 1 and found["eigen"].chosen and found["eigen"].chosen.stating is None
    (reason,) = found["eigen"].left_out
    assert reason.startswith("eigen at 0.001 bits per value: `bits`=0.001 (a ratio of 16,000.0) is below the minimum of")
    assert found["live"].candidates == [] and found["live"].chosen is None
    assert found["live"].left_out == [
        "live: a prefix of 40 tokens is too short: no block of 64 tokens is ever packed. Use `prefix` ≥ 68."
    ]
    rotating = measured(Session(loaded("llama"), batch_size=4), searched(calibration=fitted_on))
    assert rotating["eigen"].chosen and rotating["live"].left_out == [
        "live: calibration sequences of 64 tokens are too short to fit a live codec. Use `max_length` ≥ 136."
    ]
    few = measured(session, searched(calibration=sequences(*(64,) * 15)))
    assert all("15 sequences are too few: 16 are needed" in reason for one in few.values() for reason in one.left_out)


@pytest.mark.parametrize("shared", [False, True])
def test_the_metric_is_measured_once_and_vectors_once_where_they_are_shared(shared: bool, loaded, searched) -> None:
    calls: list[tuple[str, int, int]] = []
    session = Session(loaded("llama"), batch_size=4, on_progress=lambda *call: calls.append(call))
    measured(session, searched(shared=shared))
    finished = [what for what, done, of in calls if done == of and what.endswith("fisher metric")]
    assert len(finished) == 1
    names = {what for what, _, _ in calls if what.endswith(": vectors")}
    assert names == ({"codecs: vectors"} if shared else {"stored codec: vectors", "live cache: vectors"})


# Resuming


def test_a_finished_family_is_not_measured_again_unless_the_budget_changes(loaded, searched, tmp_path, monkeypatch) -> None:
    session, search = Session(loaded("llama"), batch_size=4), searched()
    monkeypatch.setattr(study, "fit_live", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measured(session, search, tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {f"p.{name}" for name in partial_names("eigen")}
    monkeypatch.undo()
    monkeypatch.setattr(study, "fit_eigen", interrupted)
    resumed = measured(session, search, tmp_path)
    assert resumed == measured(session, search, tmp_path) and resumed["eigen"].chosen
    assert {path.name for path in tmp_path.iterdir()} == files | {f"p.{name}" for name in partial_names("live")}
    with pytest.raises(KeyboardInterrupt):
        measured(session, searched(budget=Budget(nats=9.0, given="other")), tmp_path)


def test_batches_that_were_scored_before_an_interruption_are_not_scored_again(loaded, searched, tmp_path) -> None:
    def stop(what: str, done: int, _of: int) -> None:
        if (what, done) == (SCORING, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measured(Session(loaded("llama"), batch_size=4, on_progress=stop), searched(), tmp_path)
    calls: list[tuple[str, int, int]] = []
    measured(Session(loaded("llama"), batch_size=4, on_progress=lambda *call: calls.append(call)), searched(), tmp_path)
    assert [call[1:] for call in calls if call[0] == SCORING] == [(1, 2), (2, 2)]


# Whole recommendations


def test_families_are_left_out_by_name_and_an_old_record_is_read(loaded, sequences, tmp_path: Path) -> None:
    session, text = Session(loaded("llama"), batch_size=4), sequences(*(100,) * 16, seed=1)
    search = Search(rates={"eigen": (2.0,), "live": (4.0,)})
    one = {"families": ("eigen",), "search": search}
    advice = recommend_model(session, text, sequences(*(64,) * 32), LOOSE, PROTOCOL, RECIPE, **one)
    assert [found.family for found in advice.codecs] == ["eigen"] and not advice.sweeps and advice.chosen is None
    assert "not measured: PCA (not asked for)" in advice.unknown
    chosen = advice.codecs[0].chosen
    assert chosen and chosen.holds(advice.budget) and advice.uncompressed_nll == advice.codecs[0].uncompressed_nll
    advice.save(tmp_path / "advice.json")
    assert Advice.load(tmp_path / "advice.json") == advice
    old = advice.model_dump(mode="json", exclude={"codecs", "pca_refusal"})
    assert Advice.model_validate(old).codecs == []


def test_a_text_that_suits_no_family_is_refused_and_an_overlap_is_an_error(loaded, sequences) -> None:
    session, held_out = Session(loaded("llama"), batch_size=4), sequences(*(100,) * 16, seed=1)
    with pytest.raises(StatisticsError, match="cannot carry a basis"):
        recommend_model(session, held_out, sequences(20), LOOSE, PROTOCOL, RECIPE)
    with pytest.raises(CorpusError, match="`force`"):
        recommend_model(session, held_out, held_out, LOOSE, PROTOCOL, RECIPE, families=("live",))
