"""`eigencache fold MODEL`: compare the logits of attention on coefficients with those of decoding first."""

from typing import Annotated

import typer

from eigencache.cli.options import (
    Device,
    Dtype,
    Model,
    Text,
)

EXAMPLES = """
[b]Examples[/b]\n
  eigencache fold ref-llama\n
  eigencache fold ref-deepseek --rank 24\n
  eigencache fold ref-gpt2 --rank 32 --dtype float64
"""


def run(
    model: Model,
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Coefficients per head; default: half of the width.")
    ] = None,
    text: Text = "stdlib:held-out",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to compare at most.")] = 2048,
    calibration_tokens: Annotated[int, typer.Option("--calibration-tokens", min=1, help="Calibration tokens.")] = 32_768,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Compare attention on coefficients with decoding first; logits must agree to rounding.

    Attention on coefficients folds the basis of V into W_O, and the basis of K into the query.
    """
    from rich.console import Console

    from eigencache.api import fold
    from eigencache.cli.progress import progress_bar
    from eigencache.corpora.resolve import read_text
    from eigencache.report.folding import folding_table

    with progress_bar(model) as on_progress:
        results = fold(
            model,
            text=read_text(text),
            rank=rank,
            tokens=tokens,
            calibration_tokens=calibration_tokens,
            device=device,
            dtype=dtype,
            on_progress=on_progress,
        )
    Console().print(folding_table(model, results[0].dtype, results))
