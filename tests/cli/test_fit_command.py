"""`fit` from text to a folder in a process of its own, and `evaluate` from that folder; mistakes are one line."""

import shutil
from pathlib import Path

import pytest

from cli_process import run, shown
from eigencache.cli.app import main
from eigencache.codec.saved.folder import CARD, TENSORS, load_codec

pytestmark = pytest.mark.slow

FEW = ("--tokens", "4096", "--max-length", "128")
PLAIN = ("--metric", "frobenius", "--no-text-prediction", "--batch-size", "16")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A folder with the codec that `fit` wrote, `deep/codec`, and what it printed."""
    folder = tmp_path_factory.mktemp("fit")
    options = ("--ratio", "8", "--sinks", "2", "--window", "16", "--kept-bits", "16", "--block", "64")
    groups = ("--scope", "groups", "--group", "2", "--amortize", "5000")
    result = run("fit", "ref-deepseek", *FEW, *PLAIN, *options, *groups, "-o", "deep/codec", folder=folder)
    return folder, shown(result), result.stderr


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    """The one line of a mistake, and what stands on stderr before it."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    *before, last = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and last.startswith("eigencache: error: "), last
    return last, "\n".join(before)


# From text to a folder


def test_a_codec_is_fitted_shown_and_written(fitted: tuple[Path, str, str]) -> None:
    folder, out, err = fitted
    assert {path.name for path in (folder / "deep" / "codec").iterdir()} == {CARD, TENSORS}
    assert {path.name for path in folder.rglob("*")} == {"deep", "codec", CARD, TENSORS}
    for words in ("ref-deepseek: eigen · groups of 2 · frobenius", "Ratio", "2 sinks and a window of 16", "16 bits"):
        assert words in out, words
    assert "held-out tokens, too few for an interval; the first half" in " ".join(out.split()) and out.rstrip().endswith(
        "written: deep/codec"
    )
    for stage in ("tokenizing", "vectors", "held-out vectors", "preparing the fit", "scoring a codec"):
        assert f"ref-deepseek: {stage}" in err, stage


def test_an_interrupted_fit_resumes_and_clears_what_it_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fit", "ref-deepseek", *FEW, *PLAIN, "--ratio", "8", "-o", str(tmp_path / "codec")]

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr("eigencache.fitting.fit.fit_target", interrupted)
        main(command)
    assert [path.name for path in tmp_path.iterdir()] == ["codec.partial"]
    said = capsys.readouterr().err.splitlines()[-2:]
    assert said[0] == f"kept: {tmp_path / 'codec.partial'}: start the same command again to resume, or delete it"
    assert said[1] == "eigencache: error: interrupted: no result was written"
    mistake(capsys, *command, "--dtype", "float61")  # refusing another command keeps them
    with pytest.raises(SystemExit, match="0"):
        main(command)
    assert "vectors, kept by an interrupted fit" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["codec"]


def test_settings_and_goal_are_those_that_were_asked_for(fitted: tuple[Path, str, str]) -> None:
    saved = load_codec(fitted[0] / "deep" / "codec")
    codec, settings = saved.codec, saved.card.settings
    assert (codec.kept.sinks, codec.kept.window, codec.kept.bits, codec.block) == (2, 16, 16, 64)
    assert (settings.scope, settings.group, settings.amortize) == ("groups", 2, 5000)
    assert (settings.metric, codec.text) == ("frobenius", None)
    predicted = [stage.prediction is not None for stage in codec.transform.stages]
    assert predicted == [False] + [True] * (len(predicted) - 1) and len(predicted) == 3
    assert saved.card.expected.bits_per_value == pytest.approx(2, rel=0.01)
    assert saved.card.origin.model == "ref-deepseek" and saved.card.origin.dtype == "float32"


def test_evaluate_reads_what_fit_wrote(fitted: tuple[Path, str, str], monkeypatch, capsys) -> None:
    monkeypatch.chdir(fitted[0])
    monkeypatch.setenv("COLUMNS", "200")
    few = ("--tokens", "1024", "--max-length", "128", "--prompts", "0", "--tasks", "none", "--window", "16")
    with pytest.raises(SystemExit) as exit_:
        main(["evaluate", "ref-deepseek", "--codec", "deep/codec", *few])
    out = capsys.readouterr().out
    assert exit_.value.code == 0 and "eigen · groups of 2 · frobenius" in out
    assert "likelihood" in out and "bytes of one sequence" in out


def test_what_was_written_before_is_replaced_and_nothing_is_left_beside_it(fitted, tmp_path, monkeypatch, capsys) -> None:
    folder = Path(shutil.copytree(fitted[0], tmp_path / "own"))  # others look at what was written before
    monkeypatch.chdir(folder)
    before = (folder / "deep" / "codec" / TENSORS).read_bytes()
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "ref-deepseek", *FEW, *PLAIN, "--bits", "1", "-o", "deep/codec"])
    said = capsys.readouterr()
    assert exit_.value.code == 0, said.err
    assert "replaced: the codec that was in deep/codec." in said.out and "replaced" not in fitted[1]
    assert (folder / "deep" / "codec" / TENSORS).read_bytes() != before
    assert [path.name for path in (folder / "deep").iterdir()] == ["codec"]
    assert load_codec(folder / "deep" / "codec").card.expected.bits_per_value == pytest.approx(1, rel=0.01)


def test_help_explains_options_and_shows_examples(capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0 and "Examples" in out
    assert "eigencache fit ref-llama -o llama-codec" in out and "eigencache evaluate ref-llama --codec llama-codec" in out
    asked = (
        "--bits",
        "--ratio",
        "--max-nll",
        "--context",
        "--scope",
        "--group",
        "--amortize",
        "--metric",
        "--sinks",
        "--window",
    )
    for option in (*asked, "--output"):
        assert option in out, option


# Mistakes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--bits", "1", "--ratio", "8"), "cannot be combined. Give only one of --bits, --ratio and --max-nll."),
        (("--bits", "1", "--max-nll", "0.1"), "--bits and --max-nll cannot be combined"),
        (("--bits", "0"), "--bits=0 must be a number above 0"),
        (("--ratio", "-1"), "--ratio=-1 must be a number above 0"),
        (("--max-nll", "nan"), "--max-nll=nan must be a number above 0"),
        (("--max-nll", "1e-9"), "--max-nll=1e-09 nats is below 1e-06, a loss that may be rounding"),
        (("--scope", "row"), "--scope row does not exist. Use one of head, layer, groups, joint."),
        (("--scope", "kind"), "--scope kind does not exist. Use one of"),
        (("--kept-bits", "4"), "--kept-bits 4 does not exist. Use one of 8, 16."),
    ],
    ids=" ".join,
)
def test_settings_that_make_no_sense_are_refused_before_any_work(options, words, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    said, before = mistake(capsys, "fit", "ref-deepseek", "-o", "new", *options)
    assert words in said and not before
    assert not list(tmp_path.iterdir())


def test_outputs_that_cannot_be_are_refused_before_any_work(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine", "thesis.txt").write_text("mine")
    Path("file").write_text("mine")
    for output, words in (
        ("mine", "mine: holds other files than a codec and was not changed: name another folder"),
        ("file", "file: is a file: name a folder"),
        ("file/new", "file: is a file: name a folder"),
    ):
        said, before = mistake(capsys, "fit", "ref-deepseek", "-o", output)
        assert words in said and not before, said
    assert Path("mine", "thesis.txt").read_text() == Path("file").read_text() == "mine"


@pytest.mark.parametrize(
    "option",
    [
        ("--alpha", "3"),
        ("--window", "-1"),
        ("--block", "70000"),
        ("--group", "0"),
        ("--amortize", "0"),
        ("--metric", "none"),
    ],
)
def test_numbers_out_of_range_are_named_by_their_option(option: tuple[str, str], tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "ref-deepseek", "-o", str(tmp_path / "new"), *option])
    assert exit_.value.code == 2 and option[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--tokens", "1024", "--max-length", "128"), "8 sequences are too few: 16 are needed"),
        (("--bits", "100"), "--bits=100 would not be smaller than the 16-bit cache. Use bits below 16."),
        (("--ratio", "1"), "--ratio=1 would not be smaller than the 16-bit cache. Use a ratio above 1."),
        ((*FEW, *PLAIN, "--bits", "0.3", "--window", "1000"), ", or fewer --sinks and a shorter --window."),
        (("--text", "absent.txt"), "absent.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_fitted_says_what_to_do_and_writes_nothing(options, words, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    said, _ = mistake(capsys, "fit", "ref-deepseek", "-o", "new", *options)
    assert words in said
    assert not list(tmp_path.iterdir())


def test_a_text_that_repeats_itself_is_warned_of(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop.py").write_text("for i in range(10):\n    print(i, i * i)\n" * 800)
    options = ("--text", "loop.py", *FEW, *PLAIN, "--bits", "1", "-o", "new")
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "ref-deepseek", *options])
    assert exit_.value.code == 0 and "REPETITIVE" in capsys.readouterr().out
