"""Drawn codecs of `eigen`, saved in folders."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codec_folders import ORIGIN, WINDOWS
from eigencache.codec.eigen.codec import EigenCodec, SinksAndWindow
from eigencache.codec.eigen.entropy_tables import fit_tables
from eigencache.codec.eigen.quantizer import DeadZone
from eigencache.codec.eigen.token_features import EmbeddingFeatures
from eigencache.codec.eigen.token_predictor import TokenPredictor
from eigencache.codec.eigen.transform import Prediction, Stage, StagedTransform
from eigencache.codec.layout import Layout, Part
from eigencache.codec.saved.card import CodecOrigin
from eigencache.codec.saved.eigen_card import EigenCardSettings
from eigencache.codec.saved.folder import save_codec
from eigencache.fitting.eigen import EigenSettings
from eigencache.fitting.eigen_basis import EigenScope, spans_of
from eigencache.records.fit import Expected
from eigencache.spectral.rope import Pairing, Rotation

SCOPES: tuple[EigenScope, ...] = ("head", "layer", "groups", "joint")
LAYERS, HEADS, KEYS, VALUES = 2, 2, 4, 6  # numbers of a key and of a value
EXPECTED = Expected(
    context=512,
    bits_per_value=1.25,
    coded_bits=33.3,
    tokens=4000,
    delta_nll=0.01,
    delta_nll_interval=(-0.005, 0.02),
    kl=0.02,
    top1_agreement=0.95,
)
VOCABULARY, EMBEDDING, FEATURES, RANK, PLACES = 11, 5, 3, 2, 2
EMBEDDINGS = torch.randn(VOCABULARY, EMBEDDING, generator=torch.Generator().manual_seed(7))
Cached = dict[int, tuple[Tensor, Tensor]]


def planted(
    scope: EigenScope = "joint",
    *,
    text: bool = True,
    metric: torch.dtype | None = torch.float16,
    rank: int = 3,
    fine: int = 1,
    kept: SinksAndWindow = SinksAndWindow(2, 3, 8),  # noqa: B008 - frozen
    pairing: Pairing = "half",
    seed: int = 0,
) -> EigenCodec:
    """All tensors drawn.

    Where there are several stages, the first has no coefficient, and all others but those at the border of a layer are
    predicted; groups are of one layer, and predicted.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    parts = [Part(i, slot, (0, HEADS), (KEYS, VALUES)[slot]) for i in range(LAYERS) for slot in (0, 1)]
    rotation = Rotation(10.0 ** (-torch.arange(KEYS // 2, dtype=torch.float64)), 1.1, pairing)
    layout = Layout(tuple(parts), dict.fromkeys(range(LAYERS), (0, rotation)))
    spans = spans_of(layout, scope, 1)
    stages: list[Stage] = []
    for a, b in spans:
        before = stages[-1].stop - stages[-1].start if stages and (scope == "groups" or a != layout.width // LAYERS) else 0
        prediction = Prediction.of(drawn(before, b - a), drawn(before).abs() + 0.1) if before else None
        rows = drawn(rank if a or len(spans) == 1 else 0, b - a)
        stages.append(Stage.of(a, rows, min(fine, len(rows)), prediction))
    blocks = (torch.eye(p.dim) + 0.1 * drawn(HEADS, p.dim, p.dim) for p in parts)
    transform = StagedTransform(drawn(layout.width), tuple(stages), tuple(b.to(metric) for b in blocks) if metric else ())
    count = transform.coefficients
    symbols = (4 * drawn(count + text, 500)).int().numpy()
    predictor = TokenPredictor(
        EmbeddingFeatures(
            torch.randperm(VOCABULARY, generator=generator).int(),
            drawn(EMBEDDING, FEATURES).half(),
            drawn(FEATURES),
            EMBEDDINGS.__getitem__,
        ),
        drawn(2 * FEATURES, RANK).half(),
        drawn(RANK, spans[0][1]).half(),
        torch.tensor([4], dtype=torch.int32),
        drawn(HEADS * KEYS, PLACES),
        drawn(FEATURES, PLACES),
    )
    return EigenCodec(
        name="planted – ünïcode",
        layout=layout,
        transform=transform,
        step=0.3,
        quantizer=DeadZone(*(torch.linspace(a, b, count) for a, b in ((0.5, 1.2), (-0.2, 0.4), (-0.9, 0.5), (0.0, 0.7)))),
        tables=fit_tables(symbols, np.arange(count + text) // 2),
        lanes=4,
        kept=kept,
        block=16,
        dtype=torch.float32,
        text=predictor if text else None,
    )


def about(codec: EigenCodec, **changed: Any) -> EigenCardSettings:
    said = EigenSettings(
        metric="fisher" if codec.transform.inverse_roots else "frobenius",
        text=codec.text is not None,
        window=codec.kept.window,
        kept_bits=codec.kept.bits,
        block=codec.block,
    )
    return EigenCardSettings(**(asdict(said) | changed))


def saved(folder: Path, codec: EigenCodec | None = None, origin: CodecOrigin = ORIGIN) -> Path:
    codec = codec or planted()
    save_codec(folder, codec, about(codec), origin, WINDOWS, EXPECTED)
    return folder


def cache(tokens: int = 60, seed: int = 0) -> Cached:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((1, HEADS, tokens, KEYS), (1, HEADS, tokens, VALUES))
    return {i: tuple(torch.randn(size, generator=generator) for size in sizes) for i in range(LAYERS)}  # type: ignore[misc]
