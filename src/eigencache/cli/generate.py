"""`eigencache generate MODEL`: generate text with a compressed cache, and print its bytes and speed."""

from pathlib import Path
from typing import Annotated

import typer

from eigencache.cli.options import (
    Device,
    Dtype,
    Model,
)

EXAMPLES = """
[b]Examples[/b]\n
  eigencache fit ref-llama --live -o llama-codec\n
  eigencache generate ref-llama --codec llama-codec --prompt "def mean(numbers):"\n
  eigencache generate ref-llama --codec llama-codec --prompt-file module.py --max-new-tokens 256 --compare\n
"""


def run(
    model: Model,
    codec: Annotated[Path, typer.Option("--codec", help="A folder that `eigencache fit --live` wrote.")],
    prompt: Annotated[str | None, typer.Option("--prompt", help="Prompt text.")] = None,
    prompt_file: Annotated[Path | None, typer.Option("--prompt-file", help="File with the prompt text.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", min=0, max=100, help="Sampling temperature, 0.01 or more; 0 takes the likeliest token."
        ),
    ] = 0.0,
    compare: Annotated[
        bool, typer.Option("--compare", help="Run the plain cache as well, and show where the answers differ.")
    ] = False,
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend", help="Backend that reads packed blocks: vnni, cpu, triton or reference; default: the fastest."
        ),
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of sampling.")] = 0,
) -> None:
    """Generate text with a compressed cache, then print its bytes, ratio and tokens per second."""
    import sys

    from eigencache.api import generate
    from eigencache.codec.saved.folder import load_live
    from eigencache.errors import CorpusError
    from eigencache.evaluate.generation import parted_at
    from eigencache.models.load import load
    from eigencache.report.generation import comparison_lines, cost_line

    if (prompt is None) == (prompt_file is None):
        raise CorpusError("give one of --prompt and --prompt-file")
    try:
        text = prompt if prompt is not None else prompt_file.read_text(encoding="utf-8-sig")  # type: ignore[union-attr]
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{prompt_file}: cannot be read as text ({error}): name another file") from error
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise CorpusError("--prompt: is not UTF-8: give text, or a file with --prompt-file")
    saved = load_live(codec)  # before the model: a wrong folder is reported at once
    loaded = load(model, device=device, dtype=dtype)
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}

    def show(words: str) -> None:
        sys.stdout.write(words)
        sys.stdout.flush()

    found = generate(loaded, text, saved, on_text=show, backend=backend, **options)  # type: ignore[arg-type]
    print("\n")
    print(cost_line(found, "compressed cache"))
    if compare:
        plain = generate(loaded, text, None, **options)  # type: ignore[arg-type]
        dtype = loaded.dtype_name
        print(*comparison_lines(found, plain, parted_at(found, plain), dtype, loaded.tokenizer.decode), sep="\n")
