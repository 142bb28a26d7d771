"""`fit --live` writes two codecs, `generate` goes on from a prompt with one of them; mistakes are one line."""

import re
import shutil
from pathlib import Path

import pytest

from cli_process import run, shown
from eigencache.cli.app import main
from eigencache.codec.eigen.codec import EigenCodec
from eigencache.codec.live.codec import LiveCodec
from eigencache.codec.saved.eigen import EigenCard
from eigencache.codec.saved.folder import CARD, LIVE, TENSORS, load_codec, load_live
from eigencache.evaluate.generation import generate_text
from eigencache.models.load import load

pytestmark = pytest.mark.slow

FEW = ("--tokens", "8192", "--max-length", "256")
PLAIN = ("--metric", "frobenius", "--no-text-prediction", "--bits", "1")
VALUES = 7 * 2 * 2 * 32  # that a token of ref-llama has: layers, keys and values, heads, numbers
PROMPT = "def mean(numbers):\n    return sum(numbers) / len(numbers)\n\n\n" * 7 + "def median("
COST = re.compile(
    r"^(.+): ([\d,]+) bytes for ([\d,]+) tokens, ratio to 16 bits ([\d.]+)"
    r"(?:; side information ([\d,]+) bytes, stored once)?; prompt ([\d.]+) s(.*)$",
    re.M,
)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with the codecs that `fit --live` wrote, `codec`, and what it printed."""
    folder = tmp_path_factory.mktemp("generate")
    return folder, shown(run("fit", "ref-llama", *FEW, *PLAIN, "--live", "--live-bits", "4", "-o", "codec", folder=folder))


@pytest.fixture
def here(fitted: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(fitted[0])
    return fitted[0]


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that goes well prints."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert exit_.value.code == 0, captured.err
    return captured.out


def generated(capsys: pytest.CaptureFixture[str], *options: object) -> tuple[str, str]:
    """The text, and the lines under it."""
    out = said(capsys, "generate", "ref-llama", "--codec", "codec", *options)
    text, _, under = out.rpartition("\n\ncompressed cache: ")
    return text, "compressed cache: " + under


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    """The one line of a mistake, and everything else that was printed."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    *before, last = captured.err.splitlines()
    assert exit_.value.code == 2 and last.startswith("eigencache: error: "), last
    return last, "\n".join(before) + captured.out


# From text to two codecs in a folder


def test_fit_shows_both_codecs_and_writes_the_live_one_beside_the_other(fitted: tuple[Path, str]) -> None:
    folder, out = fitted
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert found == {f"codec/{CARD}", f"codec/{TENSORS}", f"codec/{LIVE}/{CARD}", f"codec/{LIVE}/{TENSORS}"}
    stored, live = out.index("ref-llama: eigen · groups of 3 · frobenius"), out.index("ref-llama: live · ")
    assert stored < live < out.index("written: codec")
    words = " ".join(out.split())
    assert words.count("held-out tokens, too few for an interval; the first half") == 2
    assert words.count("bytes, stored once for all sequences") == 2
    assert "bits per packed value" in out[live:] and "most recent tokens are stored in 16 bits" in out[live:]


@pytest.mark.parametrize(("codec", "noted"), [("codec", True), (f"codec/{LIVE}", False)])
def test_evaluate_says_which_of_both_codecs_it_leaves_out(
    here: Path, codec: str, noted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("--tokens", 2048, "--max-length", 256, "--prompts", 0, "--tasks", "none")
    out = said(capsys, "evaluate", "ref-llama", "--codec", codec, *few)
    assert (f"The live codec of codec was not evaluated. For it, give --codec codec/{LIVE}" in out) is noted
    assert ("eigen · groups" in out) is noted


def test_each_folder_holds_what_was_asked_for(fitted: tuple[Path, str]) -> None:
    stored, live = load_codec(fitted[0] / "codec"), load_live(fitted[0] / "codec")
    assert isinstance(stored.codec, EigenCodec) and isinstance(live.codec, LiveCodec)
    assert isinstance(stored.card, EigenCard) and stored.card.expected.bits_per_value == pytest.approx(1, rel=0.01)
    assert live.codec.bits_per_value == pytest.approx(4, rel=0.02) and live.codec.bits_per_value <= 4
    assert live.card.origin == stored.card.origin and live.card.origin.model == "ref-llama"


# From a prompt to text


def test_text_goes_to_stdout_with_its_cost_and_the_plain_cache_beside_it(fitted: tuple[Path, str]) -> None:
    folder = fitted[0]
    options = ("--codec", "codec", "--prompt", PROMPT, "--max-new-tokens", "20", "--compare")
    out = shown(run("generate", "ref-llama", *options, folder=folder))

    expected = generate_text(load("ref-llama", device="cpu"), PROMPT, load_live(folder / "codec").codec, max_new_tokens=20)
    assert out.startswith(f"{expected.text}\n\ncompressed cache: ")
    compressed, plain = COST.findall(out)
    held = expected.prompt_tokens + 20 - 1
    assert held > 150
    for what, nbytes, (name, shown_nbytes, tokens, ratio, side, _, speed) in (
        ("compressed cache", expected.nbytes, compressed),
        ("plain cache in float32", 4 * VALUES * held, plain),
    ):
        assert (name, shown_nbytes, tokens) == (what, f"{nbytes:,}", f"{held:,}")
        assert float(ratio) == pytest.approx(2 * VALUES * held / nbytes, abs=0.006)
        assert re.fullmatch(r", [\d.]+ tokens per second \(median\)(; backend (vnni|cpu))?", speed)
        assert side == ("" if name.startswith("plain") else f"{expected.side_nbytes:,}")
        assert ("backend" in speed) == (name == "compressed cache")
    assert float(compressed[3]) > 1.5
    assert re.search(
        r"^(all 20 tokens are equal|the first \d+ tokens are equal, then the texts differ:\n"
        r"  compressed: .+\n  plain:      .+)$",
        out,
        re.M,
    )


def test_a_file_is_a_prompt_too(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompt.py").write_text(PROMPT)
    few = ("--max-new-tokens", "6")
    text, under = generated(capsys, "--prompt-file", "prompt.py", *few)
    assert text and text == generated(capsys, "--prompt", PROMPT, *few)[0]
    assert len(COST.findall(under)) == 1 and "plain" not in under


def test_a_temperature_draws_by_the_seed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--prompt", PROMPT, "--max-new-tokens", "12")
    drawn = [generated(capsys, *options, "--temperature", "1.5", "--seed", seed)[0] for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    greedy = [generated(capsys, *options, "--seed", seed)[0] for seed in (3, 4)]
    assert greedy[0] == greedy[1] not in drawn


def test_one_token_has_no_speed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "per second" not in generated(capsys, "--prompt", "def", "--max-new-tokens", "1")[1]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("generate", ("--codec", "--prompt", "--prompt-file", "--max-new-tokens", "--temperature", "--compare", "--seed")),
        ("fit", ("--live", "--live-bits", "--safe")),
    ],
)
def test_help_explains_options_and_shows_examples(command: str, words: tuple[str, ...], capsys) -> None:
    out = " ".join(said(capsys, command, "--help").split())
    for word in (*words, "Examples", "eigencache fit ref-llama --live -o llama-codec"):
        assert word in out, word
    if command == "generate":
        assert 'eigencache generate ref-llama --codec llama-codec --prompt "def mean(numbers):"' in out


# Mistakes


def test_one_prompt_has_to_be_given(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("prompt.txt").write_text("def")
    for prompts in ((), ("--prompt", "def", "--prompt-file", "prompt.txt")):
        line, before = mistake(capsys, "generate", "ref-llama", "--codec", "codec", *prompts)
        assert "give one of --prompt and --prompt-file" in line and not before


def test_a_prompt_that_cannot_be_read_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("image.png").write_bytes(b"\x89PNG\r\n\xff\xfe")
    Path("empty.txt").write_text("")
    for options, words in (
        (("--prompt-file", "absent.txt"), "absent.txt: cannot be read as text (.*No such file.*): name another file"),
        (("--prompt-file", "image.png"), "image.png: cannot be read as text (.*): name another file"),
        (("--prompt-file", "codec"), "codec: cannot be read as text (.*): name another file"),
        (("--prompt-file", "empty.txt"), "the prompt has no tokens. Use a non-empty text"),
        (("--prompt", ""), "the prompt has no tokens. Use a non-empty text"),
    ):
        line, before = mistake(capsys, "generate", "ref-llama", "--codec", "codec", *options)
        pattern = re.escape(words).replace(r"\.\*", ".*")
        assert re.search(pattern, line) and not before, line


def test_a_folder_without_a_live_codec_says_how_to_fit_one(here: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree("codec", tmp_path / "stored", ignore=shutil.ignore_patterns(LIVE))
    (tmp_path / "empty").mkdir()
    for folder, words in (
        (tmp_path / "stored", "stored: has no codec for a live cache: fit it again with `eigencache fit --live`"),
        (tmp_path / "absent", "holds no codec: fit one"),
        (tmp_path / "empty", "holds no codec: fit one"),
    ):
        line, before = mistake(capsys, "generate", "ref-llama", "--codec", folder, "--prompt", "def")
        assert str(folder) in line and words in line and not before


def test_damage_is_named(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("codec", tmp_path / "damaged")
    tensors = tmp_path / "damaged" / LIVE / TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x7f")
    line, _ = mistake(capsys, "generate", "ref-llama", "--codec", tmp_path / "damaged", "--prompt", "def")
    assert f"{LIVE}/{TENSORS}: does not match {CARD} (" in line


def test_the_codec_of_another_model_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, options, words in (
        ("ref-qwen2", (), "fitted on ref-llama"),
        ("ref-llama", ("--dtype", "bfloat16"), "fitted on ref-llama in float32, ref-llama is loaded in bfloat16"),
    ):
        line, _ = mistake(capsys, "generate", model, "--codec", "codec", "--prompt", "def", *options)
        assert words in line and str(Path("codec", LIVE)) in line


@pytest.mark.parametrize("option", [("--max-new-tokens", "0"), ("--temperature", "-1"), ("--temperature", "nan")])
def test_numbers_out_of_range_are_named_by_their_option(option: tuple[str, str], here: Path, capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["generate", "ref-llama", "--codec", "codec", "--prompt", "def", *option])
    assert exit_.value.code == 2 and option[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--live-bits", "4"), "--live-bits is an option of the live codec: add --live"),
        (("--safe",), "--safe is an option of the live codec: add --live"),
        (("--live", "--live-bits", "4", "--safe"), "--live-bits and --safe both set the size of the live codec"),
        (("--live", "--live-bits", "9"), "--live-bits=9 is out of range"),
        (("--live-only", "--group", "2", "--no-text-prediction"), "--group, --text-prediction cannot be combined with"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_live_options_that_make_no_sense_are_refused_before_any_work(options, words, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    line, before = mistake(capsys, "fit", "ref-llama", "-o", "new", *options)
    assert words in line and not before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", ["9", "0"])
def test_widths_that_a_live_codec_does_not_have_are_refused(bits: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    few = ("--tokens", "1024", "--max-length", "64", *PLAIN)
    line, _ = mistake(capsys, "fit", "ref-llama", *few, "-o", "new", "--live", "--live-bits", bits)
    assert f"--live-bits={bits} is out of range: use more than 0 and at most 8 bits per packed value." in line
    assert not list(tmp_path.iterdir())
