"""An installed wheel does what the checkout does, with every data file and without a path to the sources."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = """
import sys
from pathlib import Path
import eigencache
from eigencache.cli.app import main
from eigencache.kernels import compiled
from eigencache.kernels.packed import vnni
from eigencache.models.load import load
from eigencache.fitting.eigen import EigenSettings
from eigencache.fitting.fit import LiveGoal


def run(arguments):
    try:
        main(arguments)
    except SystemExit as end:
        assert not end.code, arguments


assert Path(eigencache.__file__).is_relative_to(sys.argv[1]), eigencache.__file__
assert all(source.is_file() for source in vnni._SOURCES)
few = ["--tokens", "2048", "--max-length", "128"]
run(["probe", "ref-llama", *few, "-o", "probe.json"])
run(["report", "ref-llama", *few, "--held-out", "none", "-o", "report"])
own = load("ref-llama", device="cpu")
settings = EigenSettings("layer", "frobenius", text=False)
eigencache.fit(
    own.model, own.tokenizer, tokens=4096, max_length=256, bits=2.0, settings=settings, live=LiveGoal(bits=6)
).save("codec")
codec = eigencache.CacheCodec.load("codec", own.model, own.tokenizer)
cache = eigencache.CompressedCache(own.model, codec)
ids = own.tokenizer("import os\\n" * 40, return_tensors="pt")["input_ids"]
own.model.generate(ids, past_key_values=cache, max_new_tokens=4, pad_token_id=0)
assert cache.compressed_layers[0].blocks and cache.nbytes
run(["generate", "ref-llama", "--codec", "codec", "--prompt", "import os", "--max-new-tokens", "2"])
print("used:", cache.backend)
"""


@pytest.mark.slow
def test_a_wheel_is_used_outside_of_the_checkout(tmp_path: Path) -> None:
    checkout, site, elsewhere = tmp_path / "checkout", tmp_path / "site", tmp_path / "elsewhere"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        checkout.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, checkout)
    shutil.copytree(ROOT / "src", checkout / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "wheel", *options, "--no-build-isolation", "-w", tmp_path, checkout], check=True, capture_output=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = (path.relative_to(checkout / "src") for path in (checkout / "src").rglob("*") if path.is_file())
    sources = {str(file) for file in files}
    assert packed == {name for name in sources if ".egg-info/" not in name}
    subprocess.run([*pip, "install", *options, "--target", site, wheel], check=True, capture_output=True)
    elsewhere.mkdir()
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT / "src"]
    env = dict(os.environ) | {
        "PYTHONPATH": os.pathsep.join([str(site), *inherited]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", USE, str(site)]
    used = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True)
    assert used.returncode == 0, used.stderr
    assert "used: " in used.stdout and (elsewhere / "report" / "report.html").is_file()
