"""An interrupted report resumes after its last finished model, with the records that the model had."""

from pathlib import Path

import pytest

from eigencache.api import report

pytestmark = pytest.mark.slow

MODELS, FEW = ("ref-llama", "ref-deepseek"), {"tokens": 4096, "max_length": 128}


def test_an_interrupted_report_resumes_after_the_last_finished_model(tmp_path: Path) -> None:
    partial, reported, first = tmp_path / "report.partial", list[str](), list[str]()

    def interrupt(what: str, _done: int, _of: int) -> None:
        first.append(what)
        if what.startswith(MODELS[1]):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report(MODELS, held_out=None, partial=partial, on_progress=interrupt, **FEW)
    resumed = report(
        MODELS, held_out=None, partial=partial, on_progress=lambda what, _done, _of: reported.append(what), **FEW
    )
    assert [what for what in reported if what.startswith(MODELS[0])] == ["ref-llama: kept by an interrupted report"]
    assert any(what.startswith(MODELS[1]) for what in reported) and resumed.verdicts == []
    alone = report(MODELS[:1], held_out=None, **FEW)
    kept, measured = (one.probes[0].model_dump(exclude={"run"}) for one in (resumed, alone))
    assert kept == measured
    other = report(MODELS[:1], held_out=None, partial=partial, **(FEW | {"tokens": 2048}))
    assert other.probes[0].corpus.tokens == 2048


def test_a_verdict_is_kept_as_well(tmp_path: Path) -> None:
    partial, few = tmp_path / "report.partial", {**FEW, "held_out": "stdlib:calibration"}  # refused: it is the probed text
    one, again = (report(MODELS[:1], "stdlib:calibration", partial=partial, **few) for _ in range(2))
    assert one == again and one.verdicts[0].reason
