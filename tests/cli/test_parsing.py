"""What the parser of the command line refuses ends in one line with the value and where help is."""

import re

import pytest

from eigencache.cli.app import main

REFUSED = {
    ("probe", "ref-llama", "--tokens", "abc"): r"--tokens abc: .* integer \(see eigencache probe --help\)",
    ("probe", "ref-llama", "--tokens=0"): "--tokens 0: .* greater than or equal to 1",
    ("probe", "ref-llama", "--scope", "foo"): "--scope foo: 'foo' is not one of 'head', 'layer', 'all' ",
    ("probe", "ref-llama", "--scope", "foo", "--scope", "all"): "[Ii]nvalid value for '--scope': .*'foo'",
    ("probe", "ref-llama", "--foo"): "no such option: --foo",
    ("probe",): "missing argument 'model' ",
    ("probe", "ref-llama", "-o"): "option '-o' requires an argument",
    ("generat",): r"no such command 'generat'.*generate.*\(see eigencache --help\)",
    ("sweep", "ref-llama", "--uncentred"): "--uncentred .*--uncentered",
    ("bench", "--speed", "llama-3-8b", "--contexts", "1024"): "is now a command of its own: eigencache speed",
}


@pytest.mark.parametrize(("arguments", "expected"), REFUSED.items(), ids=[" ".join(given) for given in REFUSED])
def test_a_refusal_of_the_parser_is_one_line(arguments: tuple[str, ...], expected: str, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    out, err = capsys.readouterr()
    assert end.value.code == 2 and not out and err.count("\n") == 1 and err.startswith("eigencache: error: ")
    assert re.search(expected, err), err


@pytest.mark.parametrize(("arguments", "code"), [((), 2), (("--help",), 0), (("probe", "--help"), 0), (("--version",), 0)])
def test_help_and_version_are_printed(arguments: tuple[str, ...], code: int, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        main(list(arguments))
    assert end.value.code == code and capsys.readouterr().out.strip()
