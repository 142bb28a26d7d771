"""Register the compression methods of the benchmark, with operating points as recommended by their authors.

To add a method, write its codec or cache maker with a protocol of `codec/base.py`, and add an entry to `METHODS` that
makes one per operating point. The benchmark, its tables and its tests read only `METHODS`.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from eigencache.codec.base import Compressor
from eigencache.codec.baselines.integers import Integers
from eigencache.codec.baselines.kivi import kivi
from eigencache.codec.baselines.kvtc_fit import fit_kvtc
from eigencache.codec.baselines.oscar import fit_oscar
from eigencache.codec.baselines.turboquant import turboquant
from eigencache.codec.baselines.xquant import xquant
from eigencache.codec.sinks_and_window import WithSinksAndWindow
from eigencache.errors import BudgetError, CodecError
from eigencache.fitting.eigen import EigenSettings
from eigencache.fitting.eigen_search import at_bits
from eigencache.fitting.live import fit_live
from eigencache.fitting.pca import PCACalibration, PCASettings
from eigencache.models.caches import hf_quantized, kvpress
from eigencache.models.load import LoadedModel
from eigencache.models.residual import find_sites, weight_rows
from eigencache.studies.bench.context import BenchContext

Codecs = dict[str, Compressor]  # operating point → codec


@dataclass(frozen=True)
class Method:
    """A compression method of the benchmark.

    Args:
        about: Description for readers.
        codecs: Function that makes one codec per operating point.
        refuses: Function that returns why the method does not support a model, or None if it does.
        fitted: Whether the codec depends on the calibration set, so that it is fitted again for every seed.
    """

    about: str
    codecs: Callable[[BenchContext], Codecs]
    refuses: Callable[[LoadedModel], str | None] = lambda _: None
    fitted: bool = True


def _dtype(bench: BenchContext) -> torch.dtype:
    return bench.session.loaded.model.dtype


def _eigen(settings: EigenSettings) -> Callable[[BenchContext], Codecs]:
    def codecs(bench: BenchContext) -> Codecs:
        fit, made = bench.eigen(settings), Codecs()
        for bits in bench.rates:
            with suppress(BudgetError):  # the lowest rates may be below the cost of storing the tokens
                made[f"{bits:g}"] = at_bits(fit, bits).codec
        return made

    return codecs


def _pca_head(frame: str) -> Callable[[BenchContext], Codecs]:
    def codecs(bench: BenchContext) -> Codecs:
        target = "latent" if bench.session.loaded.geometry.mla else "kv"
        settings = PCASettings(target, "head", frame)  # type: ignore[arg-type]
        full = PCACalibration(bench.session, bench.sequences).fit(settings)
        return {f"rank {r}": full.truncated(r) for r in sorted({full.rank * i // 8 for i in (2, 4, 5, 6, 7)})}

    return codecs


def _integers(bench: BenchContext) -> Codecs:
    return {f"{bits}": Integers(bits, _dtype(bench)) for bits in (8, 4, 3, 2)}  # type: ignore[arg-type]


def _kivi(residual: int) -> Callable[[BenchContext], Codecs]:
    return lambda bench: {f"{bits}": kivi(bits, _dtype(bench), residual=residual) for bits in (4, 2)}  # type: ignore[arg-type]


def _turboquant(layers: int) -> Callable[[BenchContext], Codecs]:
    made = lambda bench, bits: turboquant(bench.widths, bits, _dtype(bench), boundary_layers=layers)  # noqa: E731
    return lambda bench: {f"{bits}": made(bench, bits) for bits in (4, 3, 2)}


def _live(bench: BenchContext) -> Codecs:
    fit = bench.once("live", lambda: fit_live(bench.source))
    codecs: dict[str, Compressor] = {f"{bits:g}": fit.at_bits(bits) for bits in (2, 2.5, 2.75, 3.125, 3.5, 4)}
    return codecs | {"safe": fit.safe()}


def _kvtc(**kept: int) -> Callable[[BenchContext], Codecs]:
    fitted = lambda bench: bench.once("kvtc", lambda: fit_kvtc(bench.by_slot, _dtype(bench)))  # noqa: E731
    return lambda bench: {f"{bits:g}": fitted(bench).at(bits, **kept) for bits in bench.rates}


def _oscar_fit(bench: BenchContext, bits: int) -> WithSinksAndWindow:
    fit = lambda: fit_oscar(*bench.moments, _dtype(bench), bits=bits, sample=bench.cached)  # type: ignore[arg-type]  # noqa: E731
    return bench.once(f"oscar {bits}", fit)


def _oscar(sinks: int, window: int) -> Callable[[BenchContext], Codecs]:
    return lambda bench: {f"{b}": replace(_oscar_fit(bench, b), sinks=sinks, window=window) for b in (4, 3, 2)}


def _xquant(bench: BenchContext) -> Codecs:
    loaded = bench.session.loaded
    ids = torch.from_numpy(bench.sequences.ids[0][None, :64]).to(loaded.device)
    weights = {}
    keys, values = (find_sites(loaded.model, loaded.geometry, kind, None, ids) for kind in ("k", "v"))
    for k, v in zip(keys, values, strict=True):
        pairs = [weight_rows(site) for site in (k, v)]
        biases = [bias for _, bias in pairs if bias is not None]
        weights[k.layer_idx] = torch.cat([weight for weight, _ in pairs]), torch.cat(biases) if biases else None
    rotations = {i: (0, rotation) for i, rotation in bench.source.rotations.items()}
    heads = loaded.geometry.num_key_value_heads
    return {f"{bits}": xquant(weights, heads, rotations, bits, _dtype(bench)) for bits in (8, 4, 3, 2)}  # type: ignore[arg-type]


def _quantized(about: str, backend: hf_quantized.Backend, bits: tuple[int, ...], axis: int = 0) -> Method:
    made: Codecs = {f"{b}": hf_quantized.Quantized(backend, b, axis) for b in bits}
    refuses = lambda loaded: hf_quantized.refusal(backend, loaded.model)  # noqa: E731
    return Method(f"QuantizedCache of transformers, {about}", lambda _: made, refuses, fitted=False)


def _press(about: str, press: kvpress.Press) -> Method:
    made: Codecs = {f"{ratio:g}": kvpress.Evicted(press, ratio) for ratio in (0.25, 0.5, 0.75, 0.9)}
    return Method(f"kvpress {about}", lambda _: made, lambda loaded: kvpress.refusal(loaded.model), fitted=False)


def _narrow(loaded: LoadedModel) -> str | None:
    if loaded.geometry.mla or loaded.geometry.width_ratio <= 1:
        return f"keys and values are not wider than the hidden state (ratio {loaded.geometry.width_ratio:.2f})"
    return None


def _latent(loaded: LoadedModel) -> str | None:
    return "it caches a latent, not keys and values" if loaded.geometry.mla else None


METHODS: dict[str, Method] = {
    "eigen": Method("this project: joint basis, Fisher metric, token prediction", _eigen(EigenSettings())),
    "eigen-no-text": Method("eigen without token prediction", _eigen(EigenSettings(text=False))),
    "live": Method("this project's CompressedCache: bit-packed, one basis per head, attention on packed blocks", _live),
    "kvtc": Method("KVTC: all layers, separate K and V, 4 sinks in fp8, last 128 tokens in 16 bits", _kvtc()),
    "kvtc-sinks": Method("KVTC: 4 sinks in fp8, no window", _kvtc(window=0)),
    "kvtc-no-window": Method("KVTC without sinks and window", _kvtc(sinks=0, window=0)),
    "pca_head": Method("PCA per head, 16-bit coefficients, keys before rotation", _pca_head("pre")),
    "int": Method("integers of 8, 4, 3, 2 bits per token and head", _integers, fitted=False),
    "kivi": Method("KIVI, last 128 tokens in 16 bits", _kivi(128), fitted=False),
    "kivi-no-window": Method("KIVI without window", _kivi(0), fitted=False),
    "turboquant": Method("TurboQuant, first and last two layers in 16 bits", _turboquant(2), fitted=False),
    "turboquant-all": Method("TurboQuant on all layers", _turboquant(0), fitted=False),
    "oscar": Method("OSCAR, 64 sinks and last 256 tokens in 16 bits", _oscar(64, 256), _latent),
    "oscar-no-window": Method("OSCAR without sinks and window", _oscar(0, 0), _latent),
    "xquant": Method("XQuant: stores the layer's input, recomputes K and V", _xquant, _narrow, fitted=False),
    "hf-quanto": _quantized("with optimum-quanto", "quanto", (4, 2)),
    "hf-hqq": _quantized("with HQQ, groups along the default axis", "hqq", (8, 4, 2)),
    "hf-hqq-axis-1": _quantized("with HQQ, groups along the recommended axis", "hqq", (8, 4, 2), 1),
    "knorm": _press("KnormPress: keeps keys of small norm", "knorm"),
    "snapkv": _press("SnapKVPress: keeps tokens that the last 64 queries attend to", "snapkv"),
    "expected-attention": _press(
        "ExpectedAttentionPress: keeps tokens that later queries should attend to", "expected-attention"
    ),
}


def chosen_methods(names: str | None) -> list[str]:
    """Return the method names of a comma-separated list such as `eigen,kvtc`, in order, or all for None.

    Raises:
        CodecError: A method does not exist.
    """
    chosen = list(METHODS) if names is None else [name.strip() for name in names.split(",")]
    if unknown := [name for name in chosen if name not in METHODS]:
        raise CodecError(f"`methods` {unknown[0]}: no such method. Choose from {', '.join(METHODS)}.")
    return chosen
