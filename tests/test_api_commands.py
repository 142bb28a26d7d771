"""Every command has a function of the same name, and a live codec can be fitted, saved and loaded alone."""

from pathlib import Path

import pytest
import torch

from eigencache import api
from eigencache.api import CacheCodec, CompressedCache, bench, compare, fit, generate, mla, report, research, speed
from eigencache.cli.app import app
from eigencache.codec.saved.folder import load_live
from eigencache.errors import BudgetError, CodecError, CorpusError, ModelError, RecordError
from eigencache.fitting.fit import LiveGoal
from eigencache.studies.bench.run import BenchSettings
from stub_codecs import bundled

FEW = {"text": "stdlib", "tokens": 8192, "max_length": 256}


def test_every_command_has_a_function_of_its_name() -> None:
    names = [command.name for command in app.registered_commands]
    assert names and all(callable(getattr(api, str(name))) for name in names)
    assert set(map(str, names)) <= set(api.__all__)


def test_a_live_codec_is_fitted_saved_and_loaded_without_the_stored_one(tmp_path: Path) -> None:
    loaded = bundled("ref-llama")
    codec = fit("ref-llama", **FEW, stored=False, live=LiveGoal(bits=4.0))  # type: ignore[arg-type]
    assert codec.codec is None and codec.live is not None
    codec.save(tmp_path / "live")
    again = CacheCodec.load(tmp_path / "live", "ref-llama")
    assert again.codec is None and again.live is not None
    assert load_live(tmp_path / "live").codec.name == codec.live.name
    ids = torch.arange(200)[None] % 500
    with torch.no_grad():
        first, second = (
            one.loaded.model(ids, past_key_values=CompressedCache(one.loaded.model, one.live), use_cache=True).logits
            for one in (codec, again)
        )
    assert torch.equal(first, second) and loaded.name == "ref-llama"
    with pytest.raises(CodecError, match="only the live codec was fitted"):
        again.decode(b"")


def test_a_fit_of_nothing_and_goals_of_what_is_left_out_are_refused() -> None:
    with pytest.raises(BudgetError, match="no codec is left to fit"):
        fit("ref-llama", stored=False)
    with pytest.raises(BudgetError, match="`bits` is a goal of the stored codec"):
        fit("ref-llama", stored=False, live=True, bits=1.0)


# Mistakes that are found before any work


def test_a_temperature_or_a_number_of_tokens_out_of_range_is_refused() -> None:
    for temperature in (-1.0, 0.001, float("nan")):
        with pytest.raises(CorpusError, match=r"`temperature` is .*Use 0, or 0.01 or more"):
            generate("ref-llama", "def", None, temperature=temperature)
    with pytest.raises(CorpusError, match=r"`max_new_tokens` is 0\. Use 1 or more"):
        generate("ref-llama", "def", None, max_new_tokens=0)


def test_methods_and_lengths_of_a_bench_are_checked_first() -> None:
    for methods in (("eigen", "nuqx"), "eigen,nuqx", "nuqx"):
        with pytest.raises(CodecError, match="`methods` nuqx: no such method"):
            bench("ref-llama", settings=BenchSettings(methods))  # type: ignore[arg-type]
    for lengths in ((2048, 100), 100):
        with pytest.raises(CorpusError, match=r"`lengths` 100: the last 128 tokens are scored.*Use 136 or more\."):
            bench("ref-llama", settings=BenchSettings(("int",)), lengths=lengths)  # type: ignore[arg-type]


def test_the_other_model_and_every_model_of_a_report_are_checked_first() -> None:
    with pytest.raises(ModelError, match="ref-lama: no such folder"):
        mla("ref-deepseek", against="ref-lama")
    with pytest.raises(ModelError, match="ref-lama: no such folder"):
        report(["ref-llama", "ref-lama"])


def test_a_timing_runs_on_one_device() -> None:
    with pytest.raises(ModelError, match=r"`device` auto: a timing runs on one device\. Use cpu or cuda"):
        speed("llama-3-8b", device="auto")


# One value in place of several, and strings in place of paths


def test_a_single_name_is_not_read_letter_by_letter() -> None:
    with pytest.raises(ModelError, match="ref-lama: no such folder"):
        report("ref-lama")
    with pytest.raises(RecordError, match=r"absent\.json: cannot be read"):
        compare("absent.json")
    with pytest.raises(ModelError, match="`geometries` llama-9: no such geometry"):
        speed("llama-9", device="cpu")


@pytest.mark.slow
def test_partial_may_be_a_string(tmp_path: Path) -> None:
    few = {"tokens": 2048, "max_length": 128, "held_out": None}
    place = tmp_path / "report.partial"
    record = report("ref-gpt2", partial=str(place), **few)  # type: ignore[arg-type]
    kept: list[str] = []
    again = report("ref-gpt2", partial=place, on_progress=lambda what, _done, _of: kept.append(what), **few)  # type: ignore[arg-type]
    assert again == record and kept == ["kept by an interrupted report"]
    assert compare(record.probes[0]).rows == compare(record.probes).rows

    settings = BenchSettings(("int",), seeds=(0,), scored=16)
    place = tmp_path / "bench.partial"
    bench("ref-gpt2", settings=settings, lengths=(64,), tokens=512, calibration_tokens=4096, partial=str(place))
    assert place.exists()


def test_an_overlap_in_mla_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    forced: list[bool] = []

    def sweep_model(*_: object, force: bool) -> None:
        forced.append(force)
        raise KeyboardInterrupt

    monkeypatch.setattr(research, "sweep_model", sweep_model)
    for options in ({}, {"force": True}):
        with pytest.raises(KeyboardInterrupt):
            mla(tokens=512, calibration_tokens=2048, max_length=128, **options)
    assert forced == [False, True]
