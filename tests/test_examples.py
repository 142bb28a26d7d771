"""The scripts in examples/ and the Python of the README run as they are printed, offline, on few tokens."""

import re
from pathlib import Path

import pytest

import cli_process

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAYS = {
    "encode_cache": "decoded 128 tokens as a DynamicCache",
    "generate_compressed": "read by the backend",
    "probe_model": "rank of keys",
}
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
REAL = '"smollm2"'

pytestmark = pytest.mark.slow


def shown(script: Path, *arguments: object, folder: Path) -> str:
    process = cli_process.run(*arguments, folder=folder, script=str(script))
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_every_example_is_expected_to_say_something() -> None:
    assert sorted(SAYS) == [path.stem for path in EXAMPLES]


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_offline(script: Path, tmp_path: Path) -> None:
    assert SAYS[script.stem] in shown(script, "ref-llama", 8192, folder=tmp_path)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_the_python_of_the_readme_runs(index: int, tmp_path: Path) -> None:
    """A bundled model takes the place of a pretrained one, and the calibration text is shorter."""
    block = BLOCKS[index]
    assert len([line for line in block.splitlines() if line.strip() and not line.startswith(("import", "from"))]) <= 8
    bundled = ROOT / "src" / "eigencache" / "bundled" / "ref-qwen2"
    block = block.replace(REAL, repr(str(bundled)))
    (tmp_path / "example.py").write_text(block.replace("16_384", "8192").replace("32_768", "8192"))
    shown(tmp_path / "example.py", folder=tmp_path)
