"""`eigencache score [MODEL…]`: measure held-out loss and in-context copying, the figures of the model cards."""

from pathlib import Path
from typing import Annotated

import typer

from eigencache.cli.options import (
    Device,
    Dtype,
    Memory,
    Seed,
    Text,
    Tokens,
    check_writable,
    in_bytes,
    unique,
)

EXAMPLES = """
[b]Examples[/b]\n
  eigencache score\n
  eigencache score ref-llama --text stdlib:held-out --tokens 65536 --output scores.json
"""


def run(
    models: Annotated[list[str] | None, typer.Argument(help="Models; default: the four bundled ones.")] = None,
    text: Text = "stdlib:held-out",
    tokens: Tokens = 131_072,
    max_length: Annotated[int, typer.Option("--max-length", min=8, help="Tokens per sequence.")] = 2048,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the scores as JSON.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    memory: Memory = None,
) -> None:
    """Score how well models predict held-out text, by position, and whether they copy from their context."""
    check_writable(output)
    from pydantic import TypeAdapter
    from rich.console import Console

    from eigencache.api import score
    from eigencache.cli.progress import progress_bar
    from eigencache.corpora.resolve import read_text
    from eigencache.inputs import check_names
    from eigencache.models.sources import BUNDLED
    from eigencache.records.base import write_whole
    from eigencache.records.probe import ScoreRecord
    from eigencache.report.quality.score import score_table

    names = unique(models or BUNDLED)
    check_names(names)
    source, records, limit = read_text(text), [], in_bytes(memory)
    for model in names:
        with progress_bar(model) as on_progress:
            options = {"device": device, "dtype": dtype, "seed": seed, "memory": limit, "on_progress": on_progress}
            records.append(score(model, text=source, tokens=tokens, max_length=max_length, **options))
    if output:
        write_whole(output, TypeAdapter(list[ScoreRecord]).dump_json(records, indent=1))
    Console().print(score_table(records))
