"""The command line: one file per subcommand; a user's mistake ends in one line on stderr and exit code 2."""

import functools
import io
import itertools
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from eigencache.cli import (
    adapter,
    bench,
    compare,
    evaluate,
    fit,
    fold,
    generate,
    mla,
    probe,
    recommend,
    report,
    score,
    speed,
    sweep,
)
from eigencache.cli.flags import flags_of, with_flags
from eigencache.errors import EigencacheError


def fail(message: str) -> None:
    """One line on stderr, exit code 2."""
    print(f"eigencache: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def guarded(run: Callable[..., None]) -> Callable[..., None]:
    """The command, with a user's mistakes and interruptions turned into one line and exit code 2."""

    @functools.wraps(run)
    def command(*args: Any, **kwargs: Any) -> None:
        try:
            run(*args, **kwargs)
        except EigencacheError as error:
            fail(with_flags(str(error), flags_of(run)))
        except KeyboardInterrupt:
            fail("interrupted: no result was written")  # `options.keeping` says what can be resumed

    return command


app = typer.Typer(
    name="eigencache",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_MODULES = (report, probe, compare, sweep, recommend, fit, generate, evaluate, bench, speed, fold, mla, adapter, score)
COMMANDS = {module.__name__.rsplit(".", 1)[1]: module for module in _MODULES}
for name, command in COMMANDS.items():
    app.command(name=name, epilog=command.EXAMPLES)(guarded(command.run))


def _show_version(wanted: bool) -> None:
    if wanted:
        import eigencache

        print(f"eigencache {eigencache.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Measure and compress the KV cache of language models."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, by default on `sys.argv`; a traceback from here is always a defect of the program.

    What a terminal's encoding cannot show is shown as a question mark, instead of ending a command after its work.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["bench"] and "--speed" in arguments:
        fail("bench --speed is now a command of its own: eigencache speed [GEOMETRY…] takes its options")
    try:
        code = app(arguments, prog_name="eigencache", standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # no error of Typer's parser
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            raise SystemExit(2) from None
        fail(_parse_error(error, arguments))
    raise SystemExit(code or 0)


def _parse_error(error: Any, arguments: list[str]) -> str:
    """Return one line for an error of Typer's parser, with the value that was given and where help is."""
    command = f"eigencache {arguments[0]}" if arguments[0] in COMMANDS else "eigencache"
    flags = getattr(getattr(error, "param", None), "opts", ())
    words = [word for argument in arguments for word in argument.split("=", 1)]
    values = [f"{flag} {value}: " for flag, value in itertools.pairwise(words) if flag in flags]
    given = values[0] if len(values) == 1 else ""
    text = (error.message.removeprefix("Value error, ") if given else error.format_message()).rstrip(".")
    return f"{given}{text[:1].lower()}{text[1:]} (see {command} --help)"
