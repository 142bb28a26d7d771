"""Register the compression methods of the benchmark, with operating points as recommended by their authors.

A published method is registered by its file in `codec/baselines/`. Anything else is an entry of `METHODS` that makes a codec
or a cache maker of `codec/base.py` per operating point. The benchmark, its tables and its tests read only `METHODS`.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from eigencache.codec.base import Compressor
from eigencache.codec.baselines.registry import baselines
from eigencache.errors import BudgetError, CodecError
from eigencache.fitting.eigen import EigenSettings
from eigencache.fitting.eigen_search import at_bits
from eigencache.fitting.live import fit_live
from eigencache.fitting.pca import PCACalibration
from eigencache.fitting.pca_settings import PCASettings
from eigencache.models.caches import hf_quantized, kvpress
from eigencache.models.load import LoadedModel
from eigencache.studies.bench.context import BenchContext

Codecs = dict[str, Compressor]  # operating point → codec
_TOLERANCE = 0.1  # of the rate of a point: what it holds is counted, and losses are interpolated between points


def _supported(_: LoadedModel) -> str | None:
    return None


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
    codecs: Callable[[BenchContext], Mapping[str, Compressor]]
    refuses: Callable[[LoadedModel], str | None] = _supported
    fitted: bool = True


def _eigen(settings: EigenSettings) -> Callable[[BenchContext], Codecs]:
    def codecs(bench: BenchContext) -> Codecs:
        fit, made = bench.eigen(settings), Codecs()
        for bits in bench.rates:
            with suppress(BudgetError):  # the lowest rates may be below the cost of storing the tokens
                made[f"{bits:g}"] = at_bits(fit, bits, tolerance=_TOLERANCE).codec
        return made

    return codecs


def _pca_head(frame: str) -> Callable[[BenchContext], Codecs]:
    def codecs(bench: BenchContext) -> Codecs:
        target = "latent" if bench.session.loaded.geometry.mla else "kv"
        settings = PCASettings(target, "head", frame)  # type: ignore[arg-type]
        full = PCACalibration(bench.session, bench.sequences).fit(settings)
        return {f"rank {r}": full.truncated(r) for r in sorted({full.rank * i // 8 for i in (2, 4, 5, 6, 7)})}

    return codecs


def _live(bench: BenchContext) -> Codecs:
    fit = bench.once("live", lambda: fit_live(bench.source))
    codecs: dict[str, Compressor] = {f"{bits:g}": fit.at_bits(bits) for bits in (2, 2.5, 2.75, 3.125, 3.5, 4)}
    return codecs | {"safe": fit.safe()}


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


_REFUSALS: dict[str, Callable[[LoadedModel], str | None]] = {
    "oscar": _latent,
    "oscar-no-window": _latent,
    "xquant": _narrow,
}


def _baselines(*names: str) -> dict[str, Method]:
    """Return registered baselines as methods. A checker does not take cached properties of `BenchContext` for properties."""
    registered = {name: baselines()[name] for name in names}
    return {
        name: Method(one.about, one.codecs, _REFUSALS.get(name, _supported), one.fitted)  # type: ignore[arg-type] - cached
        for name, one in registered.items()
    }


METHODS: dict[str, Method] = {
    "eigen": Method("this project: layers predicted from layers and tokens, Fisher metric", _eigen(EigenSettings())),
    "eigen-no-text": Method("eigen without token prediction", _eigen(EigenSettings(text=False))),
    "live": Method("this project's CompressedCache: bit-packed, one basis per head, attention on packed blocks", _live),
    **_baselines("kvtc", "kvtc-sinks", "kvtc-no-window"),
    "pca_head": Method("PCA per head, 16-bit coefficients, keys before rotation", _pca_head("pre")),
    **_baselines("int", "kivi", "kivi-no-window", "turboquant", "turboquant-all", "oscar", "oscar-no-window", "xquant"),
    "hf-quanto": _quantized("with optimum-quanto", "quanto", (4, 2)),
    "hf-hqq": _quantized("with HQQ, groups along the default axis", "hqq", (8, 4, 2)),
    "hf-hqq-axis-1": _quantized("with HQQ, groups along the recommended axis", "hqq", (8, 4, 2), 1),
    "knorm": _press("KnormPress: keeps keys of small norm", "knorm"),
    "snapkv": _press("SnapKVPress: keeps tokens that the last 64 queries attend to", "snapkv"),
    "expected-attention": _press(
        "ExpectedAttentionPress: keeps tokens that later queries should attend to", "expected-attention"
    ),
}
METHODS |= _baselines(*(name for name in baselines() if name not in METHODS))


def chosen_methods(names: str | None) -> list[str]:
    """Return the method names of a comma-separated list such as `eigen,kvtc`, in order, or all for None.

    Raises:
        CodecError: A method does not exist.
    """
    chosen = list(METHODS) if names is None else [name.strip() for name in names.split(",")]
    if unknown := [name for name in chosen if name not in METHODS]:
        raise CodecError(f"`methods` {unknown[0]}: no such method. Choose from {', '.join(METHODS)}.")
    return chosen
