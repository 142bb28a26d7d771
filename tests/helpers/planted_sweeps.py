"""Records of sweeps whose numbers were written down, so that the right advice is known."""

from eigencache.geometry import KVGeometry, geometry_from_config
from eigencache.models.load import with_evidence
from eigencache.records.quality import Quality, ReadingProtocol, SweepPoint, SweepRecord, SweepSeries
from eigencache.records.run import Corpus, Model, Run
from tiny_models import tiny

PROTOCOL = ReadingProtocol(kind="prefix", length=512)
CORPUS = Corpus(
    name="planted",
    sha256="0" * 64,
    tokens=40_960,
    sequences=40,
    max_length=1024,
    distinct_token_ids=4000,
    distinct_8grams=40_000,
    repetition=0.0,
)
RUN = Run(
    eigencache="0",
    python="3",
    torch="2",
    transformers="5",
    numpy="2",
    machine="none",
    seed=0,
    settings={},
    started="2026-01-01T00:00:00+00:00",
    wall_s=1.0,
    forward_s=1.0,
    peak_memory_mb=1.0,
)
TOKENS, SIXTEEN_BIT = 1000, 256_000  # 256 bytes per token


def model(geometry: KVGeometry | None = None, parameters: int = 8_000_000) -> Model:
    return Model(
        name="planted-model",
        architecture="LlamaForCausalLM",
        dtype="float32",
        device="cpu",
        parameters=parameters,
        sha256="1" * 64,
        adapter="the cache itself",
        geometry=geometry or with_evidence(geometry_from_config(tiny("llama").config), tiny("llama")),
    )


def quality(
    name: str, ratio: float, delta: float, half: float | None, kl: float | None = None, basis: int = 6400
) -> Quality:
    """ΔNLL `delta` ± `half`; without `half` there is no interval."""
    return Quality(
        codec=name,
        tokens=20_000,
        sequences=40,
        nll=2.0 + delta,
        delta_nll=delta,
        delta_nll_interval=None if half is None else (delta - half, delta + half),
        kl=max(delta, 1e-6) if kl is None else kl,
        top1_agreement=0.99,
        encoded_tokens=TOKENS,
        encoded_nbytes=round(SIXTEEN_BIT / ratio),
        sixteen_bit_nbytes=SIXTEEN_BIT,
        basis_nbytes=basis,
    )


def series(
    target: str = "v",
    *points: tuple[int, float, float, float | None],
    scope: str = "head",
    metric: str = "fisher",
    frame: str = "pre",
    bits: int = 8,
    basis: str = "fitted",
    width: int = 32,
) -> SweepSeries:
    """`points`: rank, ratio, ΔNLL, half of the interval."""
    name = f"{target} · {scope} · {frame} · {metric} · {basis} · {bits} bit"
    return SweepSeries(
        name=name,
        target=target,
        scope=scope,
        frame=frame,
        metric=metric,
        centered=True,
        alpha=1.0,
        basis=basis,
        bits=bits,
        width=width,
        points=[
            SweepPoint(rank=rank, target_ratio=2 * ratio, quality=quality(f"{name} · rank {rank}", ratio, delta, half))
            for rank, ratio, delta, half in points
        ],
    )


def sweep(*found: SweepSeries, geometry: KVGeometry | None = None, nll: float = 2.0) -> SweepRecord:
    return SweepRecord(
        model=model(geometry),
        corpus=CORPUS,
        calibration=CORPUS,
        protocol=PROTOCOL,
        run=RUN,
        uncompressed_nll=nll,
        series=list(found),
        warnings=[],
    )
