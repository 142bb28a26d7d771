"""Codecs of `eigen` with planted stages, metric and token predictor, and caches that they fit."""

import functools
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from eigen_chain import TableFeatures, block_diagonal, chain, float64
from eigencache.codec.base import EncodedBytes
from eigencache.codec.eigen.codec import EigenCodec, SinksAndWindow
from eigencache.codec.eigen.container import Reader
from eigencache.codec.eigen.entropy_tables import fit_tables
from eigencache.codec.eigen.quantizer import DeadZone
from eigencache.codec.eigen.token_digits import token_digits
from eigencache.codec.eigen.token_predictor import TokenPredictor
from eigencache.codec.eigen.transform import Prediction, Stage, StagedTransform
from eigencache.codec.layout import Layout, Part, by_layer
from eigencache.spectral.rope import Rotation

LAYERS, HEADS, DIM, VOCABULARY, FEATURES = 2, 2, 8, 40, 6
ROTATION = Rotation(3.0 ** (-torch.arange(4, dtype=torch.float64)), 1.0, "half")
LAYOUT = Layout(
    tuple(Part(i, slot, (0, HEADS), DIM) for i in range(LAYERS) for slot in (0, 1)),
    {i: (0, ROTATION) for i in range(LAYERS)},
)
WIDTH, STEP = LAYOUT.width, 0.3
COLUMNS, FINE = WIDTH // LAYERS, 8  # of a stage; rows in 16 bits
FIRST = torch.tensor([0], dtype=torch.int32)  # column in which tokens are searched for
CACHED = tuple[Tensor, Tensor]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TURNS = [torch.linalg.qr(draw(COLUMNS, COLUMNS, seed=100 + i)).Q for i in range(LAYERS)]


@functools.cache
def transform() -> StagedTransform:
    """A stage for every layer, the second predicted from the first, in a metric."""
    prediction = Prediction.of(draw(COLUMNS, COLUMNS, seed=110) / COLUMNS**0.5, torch.linspace(0.5, 2, COLUMNS))
    stages = (Stage.of(i * COLUMNS, t.mT, FINE, prediction if i else None) for i, t in enumerate(TURNS))
    roots = tuple(torch.eye(DIM) + 0.1 * draw(HEADS, DIM, DIM, seed=120 + i) for i in range(len(LAYOUT.parts)))
    return StagedTransform(4 * draw(WIDTH, seed=101), tuple(stages), tuple(blocks.half() for blocks in roots))


MEAN = transform().mean


@functools.cache
def predictor() -> TokenPredictor:
    """The first layer's keys show the token, its values the last one too."""
    rows = draw(2 * FEATURES, COLUMNS, seed=102)
    rows[FEATURES:, : HEADS * DIM] = 0
    features, mix = 2 * draw(VOCABULARY, FEATURES, seed=103), torch.eye(2 * FEATURES)
    finder = torch.linalg.inv(torch.block_diag(*transform().inverse_roots[0].float()))
    places = rows.half().float()[:FEATURES, : len(finder)]
    return TokenPredictor(TableFeatures(features.half()), mix.half(), rows.half(), FIRST, finder, places)  # type: ignore[arg-type]


def vectors(tokens: int, batch: int = 1, seed: int = 0, text: bool = False) -> Tensor:
    rest = (draw(batch, tokens, LAYERS, COLUMNS, seed=seed) * torch.logspace(0.5, -1.5, COLUMNS)).unbind(2)
    first, second = (x @ turn.mT for x, turn in zip(rest, TURNS, strict=True))
    if text:
        ranks = torch.randint(VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))
        first = first + predictor().predict(ranks, max(1, tokens))
    return MEAN + transform().centered(torch.cat([first, second + transform().stages[1].expected(first)], -1))


def cache(tokens: int, start: int = 0, batch: int = 1, seed: int = 0, text: bool = False) -> dict[int, CACHED]:
    return by_layer(LAYOUT.slots(vectors(tokens, batch, seed, text), start), torch.float32)


@functools.cache
def base(text: bool = False) -> EigenCodec:
    """A codec in a metric, its numbers fitted on 500 tokens."""
    quantizer = DeadZone(*(torch.linspace(a, b, WIDTH) for a, b in ((0.58, 0.66), (0.1, 0.06), (0.03, 0.07), (0.02, 0.03))))
    z = transform().weighed(vectors(500, seed=7)[0] - MEAN)
    symbols = transform().quantize(z, STEP, quantizer).T.numpy()
    table_of = np.arange(WIDTH) // 8
    if text:
        digits = token_digits(VOCABULARY).split(torch.arange(500) % VOCABULARY).T.numpy()
        symbols = np.concatenate([digits, symbols]).astype(np.int32)
        table_of = np.append(np.arange(len(digits)), table_of + len(digits))
    tables = fit_tables(symbols, table_of)
    return EigenCodec(
        "planted",
        LAYOUT,
        transform(),
        STEP,
        quantizer,
        tables,
        4,
        SinksAndWindow(4, 6, 8),
        16,
        torch.float32,
        predictor() if text else None,
    )


def codec(text: bool = False, **changes) -> EigenCodec:
    return replace(base(text), **changes)


def header(encoded: EncodedBytes):
    return Reader(encoded.rows[0]).header


def integers(one: EigenCodec, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The integers of vectors [batch, seq, width], and what is told of the first stage."""
    first = one.text and one.text.predict(one.text.find(x - MEAN), one.block)
    return one.transform.quantize(one.transform.weighed(x - MEAN), one.step, one.quantizer, first), first


def quantized(one: EigenCodec, x: Tensor) -> Tensor:
    """Integers and back in float64, without a byte: x as the codec should decode it where it keeps nothing."""
    q, first = integers(one, x)
    flat = q.flatten(0, 1).numpy(), None if first is None else float64(first.flatten(0, 1))
    z = chain(one.transform, np.zeros((len(flat[0]), WIDTH)), one.step, one.quantizer, *flat).decoded
    return torch.from_numpy(float64(MEAN) + z @ block_diagonal(one.transform.inverse_roots)).float().view_as(x)


def assert_same(found: dict[int, CACHED], expected: dict[int, CACHED], atol: float = 1e-4) -> None:
    assert list(found) == list(expected)
    for layer_idx, both in expected.items():
        for x, y in zip(both, found[layer_idx], strict=True):
            torch.testing.assert_close(y, x, rtol=1e-5, atol=atol)


def stretch(cached: dict[int, CACHED], tokens: slice) -> dict[int, CACHED]:
    return {i: (k[:, :, tokens], v[:, :, tokens]) for i, (k, v) in cached.items()}
