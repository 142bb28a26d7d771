"""What text says of vectors: planted functions of tokens are predicted, tokens found, and blocks stand alone."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from eigen_chain import TableFeatures
from eigencache.codec.eigen import token_predictor as text
from eigencache.codec.eigen.token_features import Embed, EmbeddingFeatures
from eigencache.codec.eigen.token_predictor import TokenPredictor
from eigencache.errors import CodecError

VOCABULARY, FEATURES, WIDTH, ALL = 50, 6, 24, 40  # columns of the first stage, and of a vector


def predictor(first: int = 8, columns: int = 8, seed: int = 0) -> TokenPredictor:
    """Columns `first` … show the token itself; the first stage is a function of it and the one before."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    features, mix, rows = draw(VOCABULARY, FEATURES).half(), draw(2 * FEATURES, 10).half(), draw(10, WIDTH).half()
    places = mix[:FEATURES].float() @ rows.float()[:, first : first + columns]  # what the token alone puts there
    finder = torch.tensor([first], dtype=torch.int32), torch.eye(columns), places
    return TokenPredictor(TableFeatures(features), mix, rows, *finder)  # type: ignore[arg-type]


def planted(one: TokenPredictor, ranks: Tensor, block: int) -> Tensor:
    """The formula, token by token in float64: [f(t), f(t − 1)] mix rows, nothing before the first of a block."""
    features, mix, rows = (t.double() for t in (one.features.of(torch.arange(VOCABULARY)), one.mix, one.rows))
    out = torch.zeros(*ranks.shape, WIDTH, dtype=torch.float64)
    for b, t in torch.cartesian_prod(*map(torch.arange, ranks.shape)).tolist():
        before = features[ranks[b, t - 1]] if t % block else torch.zeros(FEATURES, dtype=torch.float64)
        out[b, t] = torch.cat([features[ranks[b, t]], before]) @ mix @ rows
    return out


def drawn(batch: int, seq: int, seed: int = 3) -> Tensor:
    return torch.randint(VOCABULARY, (batch, seq), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("table", [0, 2**24], ids=["large vocabulary", "small vocabulary"])
@pytest.mark.parametrize("block", [1, 4, 7, 100])
@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (2, 21), (3, 8)])
def test_a_prediction_is_the_formula(batch: int, seq: int, block: int, table: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "_TABLE", table)
    one, ranks = predictor(), drawn(batch, seq)
    torch.testing.assert_close(one.predict(ranks, block).double(), planted(one, ranks, block), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [1, 4, 7])
def test_blocks_are_predicted_alone_as_they_are_among_others(block: int) -> None:
    one, ranks = predictor(), drawn(2, 21)
    whole = one.predict(ranks, block)
    for at in range(0, 21, block):
        alone = one.predict(ranks[:, at : at + block], block)
        torch.testing.assert_close(alone, whole[:, at : at + block], rtol=0, atol=1e-5)
    changed = ranks.clone()
    changed[:, block - 1 :: block] += 1  # the last of a block says nothing of the next one
    changed %= VOCABULARY
    torch.testing.assert_close(
        one.predict(changed, block)[:, block::block][:, :1], one.predict(changed[:, block:], block)[:, :1]
    )


@pytest.mark.parametrize("first", [0, 8, 20, 32])  # in the first stage, across its end, in the last columns
def test_tokens_are_found_where_they_alone_decide_what_the_first_layer_holds(first: int) -> None:
    places = torch.randn(FEATURES, 8, generator=torch.Generator().manual_seed(1))
    one = replace(predictor(), first=torch.tensor([first], dtype=torch.int32), places=places)
    ranks = drawn(3, 700)  # more than are looked for at a time
    x = torch.randn(3, 700, ALL) * 100
    x[..., first : first + 8] = one.features.of(ranks) @ one.places
    assert torch.equal(one.find(x), ranks)
    assert one.find(x).dtype == torch.int64
    noisy = x + 0.05 * torch.randn(x.shape)
    assert float((one.find(noisy) == ranks).float().mean()) > 0.99


def test_the_nearest_token_is_found_in_distance_and_not_in_angle() -> None:
    features = torch.tensor([[1.0, 0], [3.0, 0], [0, 1.0]]).half()
    zero = torch.zeros(4, 1).half()
    first = torch.tensor([0], dtype=torch.int32)
    one = TokenPredictor(TableFeatures(features), zero, zero.T, first, torch.eye(2), torch.eye(2))  # type: ignore[arg-type]
    assert one.find(torch.tensor([[[1.2, 0.1], [2.9, 0.0], [0.1, 7.0]]])).tolist() == [[0, 1, 2]]


def test_nothing_is_found_in_nothing() -> None:
    assert predictor().find(torch.zeros(2, 0, ALL)).shape == (2, 0)
    assert predictor().predict(torch.zeros(2, 0, dtype=torch.int64), 4).shape == (2, 0, WIDTH)


def test_what_is_held_is_six_tensors_and_moves_whole() -> None:
    one = predictor()
    expected = (*one.features.tensors(), one.mix, one.rows, one.first, one.finder, one.places)
    for tensors in (tuple(one.tensors()), tuple(one.to("cpu").tensors())):
        assert len(tensors) == 6 and all(torch.equal(a, b) for a, b in zip(tensors, expected, strict=True))


# Features of the model's embeddings


EMBEDDINGS = 3 + 2 * torch.randn(VOCABULARY, 7, generator=torch.Generator().manual_seed(5))


def embedded(embed: Embed | None) -> tuple[EmbeddingFeatures, Tensor]:
    """Features, and by the formula [vocabulary, 6] float64."""
    generator = torch.Generator().manual_seed(6)
    order = torch.randperm(VOCABULARY, generator=generator).int()
    projection, shift = torch.randn(7, FEATURES, generator=generator).half(), torch.randn(FEATURES, generator=generator)
    rows = EMBEDDINGS[order.long()].double()
    unit = rows / rows.square().mean(1, keepdim=True).sqrt()
    return EmbeddingFeatures(order, projection, shift, embed), unit @ projection.double() - shift.double()


@pytest.mark.parametrize("at_a_time", [1, 7, 8192])
def test_features_are_of_the_models_embeddings_and_only_their_projection_is_held(
    at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_AT_A_TIME", at_a_time)
    features, expected = embedded(lambda ids: EMBEDDINGS[ids])
    ranks = drawn(1, 9)[0]
    torch.testing.assert_close(features.of(ranks).double(), expected[ranks], rtol=1e-5, atol=1e-5)
    held = sum(x.nbytes for x in features.tensors())
    assert held == 4 * VOCABULARY + 2 * 7 * FEATURES + 4 * FEATURES and (features.vocabulary, features.size) == (50, 6)
    one, stored = (replace(predictor(), features=f) for f in (features, TableFeatures(expected.float())))
    for table in (0, 2**24):
        monkeypatch.setattr(text, "_TABLE", table)
        torch.testing.assert_close(one.predict(drawn(2, 9), 4), stored.predict(drawn(2, 9), 4), rtol=1e-4, atol=1e-4)
    assert torch.equal(one.find(stored.predict(drawn(2, 9), 1)), stored.find(stored.predict(drawn(2, 9), 1)))


def test_a_model_is_needed_and_its_embeddings_have_to_be_as_wide() -> None:
    unknown, _ = embedded(None)
    with pytest.raises(CodecError, match=r"predicts from its model's embeddings: load it with CacheCodec\.load"):
        unknown.of(torch.tensor([0]))
    with pytest.raises(CodecError, match="embeddings have size 5, the codec expects 7"):
        unknown.of_model(lambda ids: EMBEDDINGS[ids, :5])
    known, expected = unknown.of_model(lambda ids: EMBEDDINGS[ids]), embedded(None)[1]
    torch.testing.assert_close(known.to("cpu").of(torch.tensor([3])).double(), expected[[3]], rtol=1e-5, atol=1e-5)
