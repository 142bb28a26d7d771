"""`eigencache fold MODEL`: attention on coefficients against decode-then-attend, logit by logit."""

from typing import Annotated

import typer

from eigencache.cli.options import Device, Dtype, Text

EXAMPLES = """
[b]Examples[/b]\n
  eigencache fold ref-llama\n
  eigencache fold ref-deepseek --rank 24\n
  eigencache fold ref-gpt2 --rank 32 --dtype float64
"""


def run(
    model: Annotated[str, typer.Argument(help="A bundled model, a folder, a .gguf file or a hub name.")],
    rank: Annotated[
        int | None, typer.Option("--rank", min=1, help="Coefficients per head; default half of its width.")
    ] = None,
    text: Text = "stdlib:held-out",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to compare at most.")] = 2048,
    calibration_tokens: Annotated[
        int, typer.Option("--calibration-tokens", min=1, help="Tokens that bases rest on.")
    ] = 32_768,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Fold the bases of V into W_O and of K into the query: the same logits as decoding first, to rounding."""
    from rich.console import Console

    from eigencache.cli.measuring import load_with_text, pack_with_progress
    from eigencache.cli.progress import progress_bar
    from eigencache.fitting.pca import PCACalibration, PCASettings
    from eigencache.report.folding import folding_table
    from eigencache.studies.folding import measure_folding

    loaded, held_out = load_with_text(model, text=text, tokens=tokens, device=device, dtype=dtype)
    calibration_text = pack_with_progress(loaded, "stdlib", calibration_tokens, held_out.corpus.max_length)
    with progress_bar(model) as on_progress:
        calibration = PCACalibration(loaded, calibration_text, on_progress=on_progress)
        targets = ("latent",) if loaded.geometry.mla else ("v", "k", "kv")
        results = []
        for done, target in enumerate(targets, 1):
            full = calibration.fit(PCASettings(target, frame="post"))
            codec = full.truncated(rank or max(1, full.groups[0].transform.rank // 2))
            results.append(measure_folding(loaded, held_out, codec))
            on_progress("comparing logits", done, len(targets))
    Console().print(folding_table(loaded.name, str(loaded.model.dtype).removeprefix("torch."), results))
