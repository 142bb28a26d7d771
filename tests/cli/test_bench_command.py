"""`bench` end to end in a process of its own: tables, folder, what was refused; mistakes are one line before any work."""

import shutil
import sys
from pathlib import Path

import pytest

from cli_process import run, shown
from eigencache.cli.app import main
from eigencache.records.bench import BenchRecord
from eigencache.studies.bench.methods import METHODS

pytestmark = pytest.mark.slow

FEW = ("--lengths", "64,72", "--scored", "16", "--tokens", "720", "--calibration-tokens", "8192", "--batch-size", "16")
METHODS_HERE = "int,kvtc-no-window,oscar,int"


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The folder of a bench on two seeds, and what it printed."""
    folder = tmp_path_factory.mktemp("bench")
    options = ("--methods", METHODS_HERE, "--points", "0.5,2", "--seeds", "2", "-o", "deep/board")
    result = run("bench", "ref-deepseek", *FEW, *options, folder=folder)
    return folder / "deep" / "board", shown(result), result.stderr


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a mistake, with nothing on stderr before it."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    (line,) = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and line.startswith("eigencache: error: ")
    return line


def test_the_folder_holds_page_plot_and_record_and_nothing_else(board: tuple[Path, str, str]) -> None:
    folder, out, _ = board
    names = {"README.md", "bench.html", "ref-deepseek.svg", "ref-deepseek.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert all(f"written: deep/board/{name}" in out for name in names)
    readme = (folder / "README.md").read_text()
    assert "Printed by `eigencache bench ref-deepseek --lengths 64,72 --scored 16" in readme
    assert readme.count("| int |") == 4 and "oscar does not support this model: it caches a latent" in readme


def test_the_record_is_that_of_what_was_asked_for(board: tuple[Path, str, str]) -> None:
    record = BenchRecord.load(board[0] / "ref-deepseek.json")
    assert set(record.corpora) == {48, 56} and record.scored == 16
    assert {(p.method, p.seed) for p in record.points} == {("int", 0), ("kvtc-no-window", 0), ("kvtc-no-window", 1)}
    assert {p.point for p in record.points if p.method == "kvtc-no-window"} == {"0.5", "2"}
    assert list(record.refused) == ["oscar"] and len(record.equal_loss) == 2 * 2 * 4
    assert record.run.settings["calibration_tokens"] == 8192


def test_tables_and_stages_are_printed(board: tuple[Path, str, str]) -> None:
    _, out, err = board
    assert "ref-deepseek, context 48 tokens: bits per value at equal ΔNLL" in out and "context 56 tokens" in out
    for stage in ("seed 0: fitting kvtc-no-window", "seed 1: vectors", "seed 1, 48 tokens, kvtc-no-window: scoring"):
        assert f"ref-deepseek: {stage}" in err, stage


def test_help_shows_examples(capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0 and "Examples" in out and "eigencache bench --output leaderboard" in out
    assert "an interrupted run resumes when it is started again" in " ".join(out.split())


def test_an_interrupted_bench_continues(board, tmp_path, monkeypatch, capsys) -> None:
    """What was kept before is neither fitted nor scored again, and the file of it is gone in the end."""
    from eigencache.evaluate.codec_scoring import score_codecs
    from eigencache.studies.bench import run as bench_module

    monkeypatch.chdir(tmp_path)
    calls: list[int] = []

    def once(session, text, codecs, protocol, **options):
        calls.append(protocol.length)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return score_codecs(session, text, codecs, protocol, **options)

    monkeypatch.setattr(bench_module, "score_codecs", once)
    command = ["bench", "ref-deepseek", *FEW, "--methods", "int", "--seeds", "1", "-o", "out"]
    with pytest.raises(SystemExit) as exit_:
        main(command)
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and err.splitlines()[-1] == "eigencache: error: interrupted: no result was written"
    assert [path.name for path in Path("out").iterdir()] == ["ref-deepseek.partial"]
    with pytest.raises(SystemExit) as exit_:
        main(command)
    assert exit_.value.code == 0 and calls == [48, 56, 48, 56, 56]  # uncompressed, then `int`, whose last is repeated
    assert "ref-deepseek.partial" not in {path.name for path in Path("out").iterdir()}
    found, whole = (BenchRecord.load(folder / "ref-deepseek.json") for folder in (Path("out"), board[0]))
    assert found.points == [p for p in whole.points if p.method == "int"]
    shutil.rmtree("out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--methods", "eigen,nuqx"), "--methods nuqx: no such method. Choose from " + ", ".join(METHODS)),
        (("--points", "0.5,x"), "--points 0.5,x: give numbers with commas between them, such as 0.1,0.5"),
        (("--points", "0,1"), "--points 0,1: every number must be above 0"),
        (("--points", "inf"), "--points inf: every number must be above 0"),
        (("--points", ""), "--points : give numbers"),
        (
            ("--lengths", "2048,130"),
            "--lengths 130: the last 128 tokens are scored, and at least 8 more have to be held",
        ),
        (("--lengths", "64", "--scored", "60"), "are scored, and at least 8 more have to be held. Use 68 or more."),
        (("--lengths", "long"), "--lengths long: give numbers"),
        (("--tasks", "juggle"), "juggle"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_that_make_no_sense_are_refused_before_any_work(options, words, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in mistake(capsys, "bench", "ref-deepseek", "-o", "out", *options)
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_is_refused_before_any_work(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    assert "file: is a file: name a folder" in mistake(capsys, "bench", "ref-deepseek", "-o", "file")
    assert "file" in mistake(capsys, "bench", "ref-deepseek", "-o", "file/new")


def test_a_length_beyond_the_models_positions_is_refused_before_anything_is_fitted(capsys) -> None:
    options = ("--lengths", "2056", "--tokens", "2056", "--calibration-tokens", "8192", "--seeds", "1")
    with pytest.raises(SystemExit) as exit_:
        main(["bench", "ref-gpt2", *options])
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and "fitting" not in err
    assert "ref-gpt2 has 2048 positions, but 2056 tokens are needed. Use shorter contexts" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("ref-llama",), "`geometries` ref-llama: no such geometry. Use llama-3-8b, qwen2.5-7b, deepseek-v2-lite."),
        (("llama-3-8b", "--live-bits", "3"), "--live-bits 3: not available. Use 2.5, 3.125, 4, 8 bits per packed value."),
        (("llama-3-8b", "--live-bits", "-1"), "--live-bits -1: every number must be above 0"),
        (("llama-3-8b", "--contexts", "1024,0"), "--contexts 0: must be 1 or more"),
        (("llama-3-8b", "--batches", "1.5"), "--batches 1.5: give numbers with commas between them"),
        (("llama-3-8b", "--dtype", "int8"), "--dtype int8: choose one of float32, bfloat16, float16"),
        (("llama-3-8b", "--device", "tape"), "--device tape: no such kind of device"),
        (("llama-3-8b", "--device", "auto"), "--device auto: a timing runs on one device. Use cpu or cuda."),
    ],
)
def test_mistakes_of_speed_are_found_before_anything_is_timed(
    arguments: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in mistake(capsys, "speed", *arguments)


def test_speed_checks_folder_and_package_before_anything_is_timed(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    assert "file: is a file: name a folder" in mistake(capsys, "speed", "-o", "file")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "plots need matplotlib" in mistake(capsys, "speed", "-o", "out")


@pytest.mark.parametrize("command", ["bench", "score", "report"])
def test_all_models_are_checked_before_the_first_is_measured(command: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert "ref-lama: no such folder" in mistake(capsys, command, "ref-llama", "ref-lama")
    assert "ref-lama: no such folder" in mistake(capsys, "mla", "--against", "ref-lama")


def test_speed_is_printed_and_written(tmp_path: Path) -> None:
    few = ("--contexts", "128", "--prefill", "64", "--repeats", "1", "--live-bits", "3.125", "--generated", "8")
    result = run("speed", "deepseek-v2-lite", *few, "--dtype", "float32", "-o", "speed", folder=tmp_path)
    out = shown(result)
    assert "deepseek-v2-lite: a whole decode step" in out and "live, 3.125 bits" in out and "live, 16 bits" in out
    assert "deepseek-v2-lite: prefill" in out and "written: speed/README.md" in out and "written: speed/speed.json" in out
    assert "speed: deepseek-v2-lite" in result.stderr  # what it is at
