"""A user's mistake ends in one clear line on stderr and exit code 2, and nothing is left behind."""

import copy
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

import cli_process
from cli_process import error_of, shown
from eigencache.models.sources import bundled_path
from tiny_models import tiny

pytestmark = pytest.mark.slow

REFERENCE = bundled_path("ref-llama")
ENOUGH = "import os\n" * 2000


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return cli_process.run(*arguments, folder=Path.cwd(), env={"COLUMNS": "200"})


def run_with_hub(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """In a Python of its own: where the hub is, is read when its package is imported."""
    command = [sys.executable, "-m", "eigencache", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=_environment(env))


def _environment(extra: dict[str, str] | None) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "COLUMNS": "200"} | (extra or {})


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """A model on disk with the bundled tokenizer."""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(REFERENCE).save_pretrained(folder)
    return folder


def test_a_missing_model_names_what_there_is() -> None:
    assert "no/such/folder: no such folder, and no known model (ref-gpt2" in error_of(run("probe", "no/such/folder"))


def test_a_hub_that_cannot_be_reached_is_said_at_once() -> None:
    assert "org/model: the hub cannot be reached" in error_of(run_with_hub("probe", "org/model"))


class _Hub(BaseHTTPRequestHandler):
    """Answers every request like the hub does for one kind of repository."""

    code, reason = 403, "GatedRepo"

    def do_GET(self) -> None:
        self.send_response(self.code)
        self.send_header("X-Error-Code", self.reason)
        self.send_header("X-Error-Message", "no")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(params=[(403, "GatedRepo", "gated on the hub"), (404, "RepoNotFound", "not a model on the hub")])
def hub(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    code, reason, says = request.param
    server = HTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"code": code, "reason": reason}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", says
    server.shutdown()


def test_a_gated_and_a_missing_repository_are_told_apart(hub: tuple[str, str]) -> None:
    endpoint, says = hub
    assert f"org/model: {says}" in error_of(run_with_hub("probe", "org/model", env={"HF_ENDPOINT": endpoint}))


@pytest.mark.parametrize(
    ("layers", "says"),
    [("0,99", "no layer 99: the model has layers 0 to 6"), ("zero", "--layers zero: give numbers with commas")],
)
def test_a_layer_that_does_not_exist_is_named(layers: str, says: str, tmp_path: Path) -> None:
    output = tmp_path / "out.json"
    assert says in error_of(run("probe", "ref-llama", "--layers", layers, "--tokens", 1024, "--output", output))
    assert not list(tmp_path.iterdir())


def test_a_text_shorter_than_one_sequence_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too little")
    says = error_of(run("probe", "ref-llama", "--text", tmp_path / "short.txt"))
    assert "fewer than one sequence of 512" in says


def test_a_missing_text_names_the_kinds_of_text(tmp_path: Path) -> None:
    assert "stdlib" in error_of(run("probe", "ref-llama", "--text", tmp_path / "absent.txt"))


def test_an_unwritable_output_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run("probe", "ref-llama", "--output", tmp_path / "file" / "out.json")
    assert "cannot be written" in error_of(result)
    assert "capturing" not in result.stderr
    assert "is a folder" in error_of(run("probe", "ref-llama", "--plot", tmp_path))
    result = run("probe", "ref-llama", "--plot", tmp_path / "x.foo")
    assert (
        "a figure cannot be written with suffix .foo: use .png, .svg, .pdf" in error_of(result)
        and "capturing" not in result.stderr
    )
    assert "is a file" in error_of(run("report", "ref-llama", "-o", tmp_path / "file"))


@pytest.mark.parametrize("options", [("--device", "cuda"), ("--device", "nonsense"), ("--dtype", "int3")])
def test_a_device_or_dtype_that_is_not_there_is_named(options: tuple[str, str]) -> None:
    if options[1] == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has one")
    assert " ".join(options) in error_of(run("probe", "ref-llama", *options))


def test_nan_activations_are_located(tmp_path: Path) -> None:
    model = copy.deepcopy(tiny("llama"))
    model.resize_token_embeddings(4096)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[-1] = float("nan")
    (tmp_path / "text.py").write_text(ENOUGH)
    folder = saved(model, tmp_path / "broken")
    says = error_of(run("probe", folder, "--text", tmp_path / "text.py", "--max-length", 64, "--tokens", 1024))
    assert "values: layer 1, head 1 holds NaN or infinite values" in says


def test_a_model_without_a_cache_is_refused(tmp_path: Path) -> None:
    assert "mamba has no KV cache" in error_of(run("probe", saved(tiny("mamba"), tmp_path / "mamba")))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    says = error_of(run("probe", saved(tiny("llama"), tmp_path / "small")))
    assert "4096 entries" in says
    assert "embeds only 128" in says


def test_weights_that_are_missing_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(tiny("llama"), tmp_path / "partial")
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.layers.1.self_attn.k_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "missing from the checkpoint, such as model.layers.1.self_attn.k_proj.weight" in error_of(run("probe", folder))


def test_sequences_longer_than_the_learned_positions_are_refused() -> None:
    assert "Use --max-length" in error_of(run("probe", "ref-gpt2", "--max-length", 4096, "--tokens", 8192))


def test_damaged_and_missing_records_are_named(tmp_path: Path) -> None:
    (tmp_path / "damaged.json").write_text('{"schema_version": "eigencache.probe/1", "model": 3')
    assert "damaged.json: not a record" in error_of(run("compare", tmp_path / "damaged.json"))
    assert "absent.json: cannot be read" in error_of(run("compare", tmp_path / "absent.json"))


def test_a_text_that_is_probed_and_held_out_is_named_by_flags(tmp_path: Path) -> None:
    texts = ("--text", "stdlib:calibration", "--held-out", "stdlib:calibration")
    out = shown(run("report", "ref-gpt2", *texts, "--tokens", 2048, "--max-length", 128, "-o", tmp_path / "report"))
    assert "ref-gpt2: compression was not measured: " in out
    assert "choose another --text or --held-out" in " ".join(out.split())


def _accept_interrupts() -> None:
    """A process started in the background may inherit that it ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_an_interrupted_run_leaves_no_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "eigencache", "probe", "ref-llama", "--tokens", "2000000", "-o", tmp_path / "out.json"]
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=_environment(None), preexec_fn=_accept_interrupts, **pipes) as process:
        assert any("capturing" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        try:
            _, rest = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 2
    assert rest.strip() == "eigencache: error: interrupted: no result was written"
    assert not list(tmp_path.iterdir())
