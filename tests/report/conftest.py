"""Synthetic probe records whose numbers agree with each other: drawn vectors, real eigenvalues, real RoPE."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from eigencache.geometry import MLA, Frame, Kind, KVGeometry, Layer, Rope, tensor_name
from eigencache.records.base import Scope
from eigencache.records.probe import ClassicRow, FrameComparison, ProbeRecord, Spectrum
from eigencache.records.run import Corpus, Model, Run
from planted_sinks import planted_sinks

Array = np.ndarray
SEQUENCES = 16


def _points(width: int) -> list[int]:
    return [1 << i for i in range(width.bit_length()) if 1 << i < width] + [width]


def _rank(eigenvalues: Array, share: float) -> int:
    return int((eigenvalues.cumsum() / eigenvalues.sum() < share * (1 - 1e-12)).sum()) + 1


def _entropy(weights: Array) -> float:
    p = weights / weights.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def _held_out(x: Array, centered: bool) -> dict[int, float]:
    """Basis from the even sequences, energy on the odd ones; x [sequences, tokens, p]."""
    width = x.shape[-1]
    halves = [x[start::2].reshape(-1, width) for start in (0, 1)]
    if centered:
        halves = [half - halves[0].mean(0) for half in halves]
    basis = np.linalg.eigh(halves[0].T @ halves[0])[1][:, ::-1]
    energies = np.square(halves[1] @ basis).sum(0)
    return {k: float(energies[:k].sum() / energies.sum()) for k in _points(width)}


def spectrum(
    x: Array, kind: Kind, frame: Frame, scope: Scope, layer_idx: int | None, head: int | None, centered: bool = True
) -> Spectrum:
    """Every statistic of x [sequences, tokens, p], with None where less than one vector per dimension stands behind it."""
    width, vectors = x.shape[-1], x.shape[0] * x.shape[1]
    flat = x.reshape(vectors, width)
    mean = flat.mean(0)
    center = flat - mean if centered else flat
    moment = center.T @ center / vectors
    eigenvalues = np.clip(np.linalg.eigvalsh(moment)[::-1], 0, None)
    distinct = len(np.unique(flat[:, 0].round(9)))
    support = min(0.6 * vectors, distinct) / width
    told = support >= 1
    std = np.sqrt(np.diag(moment))
    edge = moment.trace() / width * (1 + math.sqrt(1 / support)) ** 2
    singular = np.sqrt(eigenvalues)
    flat_below = eigenvalues[-1] < eigenvalues[0] * 1e-12
    rank = _entropy(singular)
    return Spectrum(
        layer_idx=layer_idx,
        head=head,
        kind=kind,
        frame=frame,
        scope=scope,
        centered=centered,
        width=width,
        vectors=vectors,
        effective_vectors=0.6 * vectors if len(x) > 2 else None,
        distinct_contexts=distinct,
        support=support,
        eigenvalues=eigenvalues.tolist(),
        energy={k: float(eigenvalues[:k].sum() / eigenvalues.sum()) for k in _points(width)},
        held_out_energy=_held_out(x, centered) if told else None,
        rank_90=_rank(eigenvalues, 0.9) if told else None,
        rank_95=_rank(eigenvalues, 0.95) if told else None,
        rank_99=_rank(eigenvalues, 0.99) if told else None,
        effective_rank=rank if told else None,
        effective_rank_eigen=_entropy(eigenvalues) if told else None,
        participation_ratio=float(eigenvalues.sum() ** 2 / np.square(eigenvalues).sum()) if told else None,
        stable_rank=float(eigenvalues.sum() / eigenvalues[0]) if told else None,
        condition_number=math.inf if flat_below else float(np.sqrt(eigenvalues[0] / eigenvalues[-1])),
        mean_norm=float(np.linalg.norm(mean)),
        mean_share=float(mean @ mean / np.square(flat).sum(1).mean()),
        spread=float(std.max() / std.min()) if std.min() else math.inf,
        spread_p95_p5=float(np.quantile(std, 0.95) / np.quantile(std, 0.05)),
        null_edge=float(edge) if told else None,
        null_eigenvalues=np.linspace(edge, edge / 9, min(width, 256)).tolist() if told else None,
        above_null=int((eigenvalues > edge).sum()) if told else None,
        split_half=0.9 if told else None,
        intervals={"effective_rank": (rank * 0.97, rank * 1.02)} if told else {},
        refusals=[] if told else ["ranks: 0.4 vectors per dimension, at least 1 is needed"],
        warnings=[] if support >= 10 else [f"support {support:.1f} is below 10: ranks are doubtful"],
    )


def _draw(
    rng: np.random.Generator, tokens: int, heads: int, dim: int, steepness: float, offset: float, unevenness: float = 0.3
) -> Array:
    """[sequences, tokens, heads, dim]: a decaying spectrum in a random basis, uneven dimensions, and a shared mean."""
    width = heads * dim
    scales = np.arange(1, width + 1.0) ** -steepness
    basis = np.linalg.qr(rng.standard_normal((width, width)))[0]
    x = (rng.standard_normal((SEQUENCES, tokens, width)) * scales) @ basis.T
    x *= np.exp(rng.standard_normal(width) * unevenness)
    x += offset * x.std() * rng.standard_normal(width)
    return x.reshape(SEQUENCES, tokens, heads, dim)


def rotate(x: Array) -> Array:
    """RoPE with θ = 100 over the last axis, the two halves paired, positions along axis 1."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * 100.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[None, :, None], np.sin(angle)[None, :, None]
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _spectra(x: Array, kind: Kind, frame: Frame, layer_idx: int) -> list[Spectrum]:
    """Scopes head and layer of x [sequences, tokens, heads, dim]; scope layer uncentered too."""
    heads = [spectrum(x[:, :, h], kind, frame, "head", layer_idx, h) for h in range(x.shape[2])] if x.shape[2] > 1 else []
    joined = x.reshape(*x.shape[:2], -1)
    layer = [spectrum(joined, kind, frame, "layer", layer_idx, None, centered) for centered in (True, False)]
    return [*heads, *layer]


def _classic(kind: str, layers: list[Array]) -> list[ClassicRow]:
    """Both texts: what was drawn, and four rows of it repeated over and over."""
    rows = []
    for text in ("this text", "four repeated sentences"):
        energies = {16: [], 32: []}
        ranks = []
        for x in layers:
            flat = x.reshape(-1, x.shape[2] * x.shape[3])
            flat = np.tile(flat[:40], (4, 1)) if text != "this text" else flat
            eigenvalues = np.clip(np.linalg.eigvalsh(np.cov(flat.T))[::-1], 0, None)
            for k, found in energies.items():
                found.append(eigenvalues[:k].sum() / eigenvalues.sum())
            ranks.append(_rank(eigenvalues, 0.99))
        row = ClassicRow(
            kind=kind,
            text=text,
            vectors=160 if text != "this text" else layers[0].shape[0] * layers[0].shape[1],
            energy_16=float(np.mean(energies[16])),
            energy_32=float(np.mean(energies[32])),
            rank_99=float(np.mean(ranks)),
            assessment="Compressible" if np.mean(energies[32]) > 0.8 else "Not compressible",
        )
        rows.append(row)
    return rows


def _frame(pre: Array, post: Array, kind: str, layer_idx: int) -> FrameComparison:
    pre, post = (x.reshape(-1, x.shape[2] * x.shape[3]) for x in (pre, post))
    rms = np.sqrt(np.square(pre).mean(0))
    variance_pre, variance_post = float(pre.var(0).sum()), float(post.var(0).sum())
    return FrameComparison(
        layer_idx=layer_idx,
        kind=kind,
        spread_post_rope=float(post.std(0).max() / post.std(0).min()),
        spread_pre_rope=float(pre.std(0).max() / pre.std(0).min()),
        spread_pre_rope_uncentered=float(rms.max() / rms.min()),
        variance_post_rope=variance_post,
        variance_pre_rope=variance_pre,
        rotated_mean_share=(variance_post - variance_pre) / variance_post,
        rank_90_post_rope=_rank(np.linalg.eigvalsh(np.cov(post.T))[::-1], 0.9),
        rank_90_pre_rope=_rank(np.linalg.eigvalsh(np.cov(pre.T))[::-1], 0.9),
    )


def _record(
    name: str,
    geometry: KVGeometry,
    tokens: int,
    spectra: list[Spectrum],
    classic: list[ClassicRow],
    frames: list[FrameComparison],
) -> ProbeRecord:
    corpus = Corpus(
        name="synthetic prose",
        sha256="ab" * 32,
        tokens=tokens * SEQUENCES,
        sequences=SEQUENCES,
        max_length=tokens,
        distinct_token_ids=900,
        distinct_8grams=tokens * SEQUENCES - 7,
        repetition=0.01,
    )
    model = Model(
        name=name,
        architecture="SyntheticForCausalLM",
        dtype="float32",
        device="cpu",
        parameters=3_700_000,
        sha256="cd" * 32,
        adapter="hooks",
        geometry=geometry,
    )
    run = Run(
        eigencache="0.1.0",
        python="3.11.2",
        torch="2.11.0",
        transformers="5.17.0",
        numpy="2.4.6",
        machine="x86_64, 2 cores",
        seed=0,
        settings={"batch_size": 8, "layers": None},
        started="2026-01-01T00:00:00Z",
        wall_s=12.5,
        forward_s=9.1,
        peak_memory_mb=812.0,
    )
    return ProbeRecord(model=model, corpus=corpus, run=run, spectra=spectra, classic=classic, frames=frames)


def _geometry(
    attention: str, layers: int, heads: int, dim: int, hidden: int, rope: Rope | None, mla: MLA | None = None
) -> KVGeometry:
    return KVGeometry(
        model_type="synthetic",
        attention=attention,  # type: ignore[arg-type]
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads * (4 if attention == "GQA" else 1),
        num_key_value_heads=heads,
        head_dim=dim,
        layers=tuple(
            Layer(layer_idx=i, attention="full", num_key_value_heads=heads, head_dim=dim, v_head_dim=dim)
            for i in range(layers)
        ),
        rope=rope,
        mla=mla,
    )


def gqa_record(
    name: str = "acme/rope-gqa",
    *,
    layers: int = 2,
    heads: int = 2,
    dim: int = 32,
    tokens: int = 128,
    key_steepness: float = 0.7,
    value_steepness: float = 0.2,
    seed: int = 0,
) -> ProbeRecord:
    """A model with RoPE and grouped heads: `keys_pre_rope`, `keys_post_rope`, `values`."""
    rng = np.random.default_rng(seed)
    spectra, frames, post_keys, all_values = [], [], [], []
    for i in range(layers):
        keys = _draw(rng, tokens, heads, dim, key_steepness * (1 + 0.2 * i / layers), 1.6 / (1 + i), 0.8)
        values = _draw(rng, tokens, heads, dim, value_steepness, 0.1)
        post = rotate(keys)
        spectra += _spectra(keys, "keys", "pre_rope", i) + _spectra(post, "keys", "post_rope", i)
        spectra += _spectra(values, "values", "unrotated", i)
        frames.append(_frame(keys, post, "keys", i))
        post_keys.append(post)
        all_values.append(values)
    joined = np.concatenate([v.reshape(*v.shape[:2], -1) for v in all_values], -1)
    spectra.append(spectrum(joined, "values", "unrotated", "all", None, None))
    geometry = _geometry("GQA", layers, heads, dim, heads * dim * 4, Rope(rope_type="default", theta=100.0, rotary_dim=dim))
    classic = _classic("keys", post_keys) + _classic("values", all_values)
    record = _record(name, geometry, tokens, spectra, classic, frames)
    return record.model_copy(update={"sinks": planted_sinks(layers, heads)})


def mha_record(name: str = "acme/learned-mha", seed: int = 1) -> ProbeRecord:
    """A model with learned positions: `keys` and `values`, nothing is rotated, the cache wider than the hidden state."""
    rng = np.random.default_rng(seed)
    spectra, layers = [], []
    for i in range(2):
        keys, values = _draw(rng, 128, 2, 32, 0.4, 2.0, 0.7), _draw(rng, 128, 2, 32, 0.9, 0.1)
        spectra += _spectra(keys, "keys", "unrotated", i) + _spectra(values, "values", "unrotated", i)
        layers.append((keys, values))
    classic = _classic("keys", [k for k, _ in layers]) + _classic("values", [v for _, v in layers])
    return _record(name, _geometry("MHA", 2, 2, 32, 64, None), 128, spectra, classic, [])


def mla_record(name: str = "acme/latent-mla", seed: int = 2) -> ProbeRecord:
    """A model with latent attention: the latent, the rotary key before and after rotation, and what they expand to."""
    rng = np.random.default_rng(seed)
    kinds: dict[str, list[Array]] = {"latent": [], "keys": [], "values": []}
    spectra, frames = [], []
    for i in range(2):
        latent = _draw(rng, 128, 1, 40, 0.5, 0.2)
        latent /= latent.std((0, 1))
        rotary = _draw(rng, 128, 1, 8, 0.8, 3.0)
        nope = (latent[:, :, 0] @ rng.standard_normal((40, 48)) * np.exp(rng.standard_normal(48))).reshape(
            SEQUENCES, 128, 2, 24
        )
        values = (latent[:, :, 0] @ rng.standard_normal((40, 48))).reshape(SEQUENCES, 128, 2, 24)
        post = rotate(rotary)
        for x, kind, frame in (
            (latent, "latent", "unrotated"),
            (rotary, "key_rope", "pre_rope"),
            (post, "key_rope", "post_rope"),
            (nope, "keys_nope", "unrotated"),
            (values, "values", "unrotated"),
        ):
            spectra += _spectra(x, kind, frame, i)
        frames.append(_frame(rotary, post, "key_rope", i))
        kinds["latent"].append(latent)
        kinds["keys"].append(np.concatenate([nope, np.repeat(post, 2, 2)], -1))
        kinds["values"].append(values)
    mla = MLA(kv_lora_rank=40, qk_rope_head_dim=8, qk_nope_head_dim=24, v_head_dim=24)
    geometry = _geometry("MLA", 2, 2, 32, 96, Rope(rope_type="default", theta=100.0, rotary_dim=8), mla)
    classic = [row for kind, arrays in kinds.items() for row in _classic(kind, arrays)]
    return _record(name, geometry, 128, spectra, classic, frames)


def scarce_record(name: str = "acme/too-little") -> ProbeRecord:
    """Three tokens per sequence: ranks refused, condition numbers infinite, and the probe says so."""
    record = gqa_record(name, tokens=2)
    warnings = ["too little text: 32 tokens for layers of width 48", "condition numbers are infinite"]
    return record.model_copy(update={"warnings": warnings})


@pytest.fixture(scope="session")
def gqa() -> ProbeRecord:
    return gqa_record()


@pytest.fixture(scope="session")
def mha() -> ProbeRecord:
    return mha_record()


@pytest.fixture(scope="session")
def mla() -> ProbeRecord:
    return mla_record()


@pytest.fixture(scope="session")
def scarce() -> ProbeRecord:
    return scarce_record()


@pytest.fixture(scope="session")
def all_records(gqa: ProbeRecord, mha: ProbeRecord, mla: ProbeRecord, scarce: ProbeRecord) -> list[ProbeRecord]:
    return [gqa, mha, mla, scarce]


@pytest.fixture
def edited() -> Callable[..., ProbeRecord]:
    """A function that changes the centered layer spectra of one tensor: edited(record, "values", support=3.0)."""

    def edit(record: ProbeRecord, name: str, **changes: object) -> ProbeRecord:
        def changed(s: Spectrum) -> Spectrum:
            hit = tensor_name(s.kind, s.frame) == name and s.scope == "layer" and s.centered
            return s.model_copy(update=changes) if hit else s

        return record.model_copy(update={"spectra": [changed(s) for s in record.spectra]})

    return edit
