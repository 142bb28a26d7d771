"""Errors of the library name parameters; the command line prints the flags of the command that ran."""

import ast
import re
from pathlib import Path
from typing import Annotated

import pytest
import typer

import eigencache
from eigencache.cli import bench, fit, recommend
from eigencache.cli.app import guarded
from eigencache.cli.flags import flags_of, with_flags
from eigencache.errors import BudgetError

SOURCE = Path(eigencache.__file__).parent
NAMES_FLAGS = {
    "records/advice.py": "the record says how a budget was given",
    "studies/recommend/commands.py": "the record names the commands that make the recommended codecs",
}


def strings_of(path: Path) -> list[str]:
    """Every string of a module but its docstrings, and the spans in backticks, which quote commands or parameters, cut."""
    tree = ast.parse(path.read_text("utf-8"))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    texts = (
        n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs
    )
    return [re.sub(r"`[^`]*`", "", text) for text in texts]


def test_no_message_of_the_library_names_a_flag() -> None:
    library = {p.relative_to(SOURCE).as_posix(): p for p in SOURCE.rglob("*.py") if SOURCE / "cli" not in p.parents}
    naming = {name for name, path in library.items() if any(re.search(r"(^|\s|\()--[a-z]", x) for x in strings_of(path))}
    assert naming == set(NAMES_FLAGS)


@pytest.mark.parametrize(
    ("command", "said", "printed"),
    [
        (
            fit,
            "`max_nll` 0.1: even the finest step loses 0.2500 nats",
            "--max-nll 0.1: even the finest step loses 0.2500 nats",
        ),
        (fit, "raise `tokens` or shorten `max_length`", "raise --tokens or shorten --max-length"),
        (bench, "raise `tokens` (of a bench `calibration_tokens`)", "raise --tokens (of a bench --calibration-tokens)"),
        (recommend, "`model` third: chooses", "--model third: chooses"),
        (fit, "`prompts` is no option of it, `eigencache fit --live` is a command", None),
        (fit, "`text_prediction` switches", "--text-prediction switches"),
        (fit, "`model` is an argument", None),
    ],
)
def test_a_parameter_becomes_the_flag_of_the_command_that_ran(command, said: str, printed: str | None) -> None:
    assert with_flags(said, flags_of(command.run)) == (said if printed is None else printed)


def test_an_option_without_a_spelling_has_that_of_its_name() -> None:
    def run(given: Annotated[int, typer.Option(help="x")] = 1, one_two: Annotated[int, typer.Option("-o")] = 2) -> None: ...

    assert flags_of(run) == {"given": "--given", "one_two": "--one-two"}


def test_a_command_that_fails_prints_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    def run(max_nll: Annotated[float, typer.Option("--max-nll")] = 0.0) -> None:
        raise BudgetError(f"`max_nll` {max_nll:g}: must be above 0, see `other`")

    with pytest.raises(SystemExit) as stopped:
        guarded(run)()
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "eigencache: error: --max-nll 0: must be above 0, see `other`\n"
