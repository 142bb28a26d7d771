"""`eigencache mla MODEL`: the latent against what it expands to, compressed either way, and standard attention beside it."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from eigencache.cli.options import BatchSize, CalibrationText, CalibrationTokens, Device, Dtype, Seed, Text, check_writable
from eigencache.cli.probe import ScopeName

EXAMPLES = """
[b]Examples[/b]\n
  eigencache mla ref-deepseek\n
  eigencache mla ref-deepseek --against ref-llama --scope all\n
  eigencache mla deepseek-ai/DeepSeek-V2-Lite --text wikitext2 --calibration-text wikitext2:train -o mla.json
"""


def run(
    model: Annotated[str, typer.Argument(help="An MLA model: ref-deepseek, a folder or a hub name.")] = "ref-deepseek",
    against: Annotated[str | None, typer.Option("--against", help="A model with keys and values, at equal bytes.")] = None,
    scope: Annotated[ScopeName, typer.Option("--scope", help="One basis per head, per layer, or for all layers.")] = (
        ScopeName.head
    ),
    text: Text = "stdlib:held-out",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of the held-out text at most.")] = 32_768,
    max_length: Annotated[int, typer.Option("--max-length", min=16, help="Tokens per sequence.")] = 1024,
    calibration_text: CalibrationText = "stdlib",
    calibration_tokens: CalibrationTokens = 131_072,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the sweep of the latent as JSON.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: BatchSize = 8,
    seed: Seed = 0,
) -> None:
    """Measure MLA: bytes and logits of both caches, low rank of the latent in three metrics, of K or V alone expanded."""
    check_writable(output)
    from rich.console import Console

    from eigencache.cli.measuring import load_with_text, pack_with_progress
    from eigencache.cli.progress import progress_bar
    from eigencache.fitting.pca import PCACalibration, PCASettings
    from eigencache.records.quality import ReadingProtocol
    from eigencache.report.mla import equal_bytes_table, latent_table
    from eigencache.report.quality.sweep_table import safety_table, sweep_table
    from eigencache.studies.mla import check_latent, compare_caches, fit_expanded, sweep_expanded
    from eigencache.studies.sweep import Plan, sweep_model

    shares = tuple(eighth / 8 for eighth in range(1, 9))
    protocol = ReadingProtocol(kind="prefix", length=max_length // 2)
    latent = [PCASettings("latent", scope.value, metric=metric) for metric in ("frobenius", "attention", "fisher")]
    latent.append(PCASettings("key_rope", scope.value, metric="fisher"))
    ways = {model: latent} | ({against: [PCASettings("kv", scope.value, metric="fisher")]} if against else {})
    records = []
    for name, settings in ways.items():
        loaded, held_out = load_with_text(name, text=text, tokens=tokens, max_length=max_length, device=device, dtype=dtype)
        if name == model:
            check_latent(loaded)
        fitted_on = pack_with_progress(loaded, calibration_text, calibration_tokens, min(512, max_length))
        with progress_bar(name) as on_progress:
            calibration = PCACalibration(loaded, fitted_on, scopes=(scope.value,), seed=seed, on_progress=on_progress)
            plans = [Plan(one, shares=shares) for one in settings]
            records.append(
                sweep_model(loaded, held_out, calibration, plans, protocol, batch_size=batch_size, on_progress=on_progress)
            )
            if name != model:
                continue
            compared = compare_caches(loaded, held_out, protocol.length)
            fitted = fit_expanded(loaded, fitted_on, on_batch=partial(on_progress, "expanded moments"))
            for target in ("k", "v"):
                step = partial(on_progress, f"{target} expanded")
                records[0].series.append(
                    sweep_expanded(
                        loaded, held_out, fitted, target, shares, protocol.length, batch_size=batch_size, on_batch=step
                    )
                )
    if output:
        records[0].save(output)
    console = Console()
    console.print(latent_table(model, compared))
    console.print(sweep_table(records[0]))
    console.print(safety_table(records[0]))
    if against:
        console.print(equal_bytes_table(records))
    if output:
        console.print(f"written: {output}", markup=False, highlight=False)
