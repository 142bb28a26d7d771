"""Rotation equals explicit 2×2 matrices in the pairing of each model, and is undone exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.cohere import modeling_cohere
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.glm import modeling_glm
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama

from eigencache.spectral.rope import PAIRINGS, Angles, Pairing, angles_from, joined, pairs, rotate, unrotate

DIM, SEQ = 12, 7
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
pairings = pytest.mark.parametrize("pairing", PAIRINGS)
rotary_dims = pytest.mark.parametrize("rotary_dim", [DIM, 8, 2])
factors = pytest.mark.parametrize("factor", [1.0, 1.37], ids=["plain", "scaled"])
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def vectors(dtype: torch.dtype = torch.float64) -> Tensor:
    """Return random vectors [2, 3, SEQ, DIM]."""
    return torch.randn(2, 3, SEQ, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def turns(rotary_dim: int, batch: int = 2) -> Tensor:
    """Return angles n θ_i [batch, SEQ, rotary_dim / 2]; each row of the batch starts at a different position."""
    positions = torch.arange(SEQ, dtype=torch.float64) + 5 * torch.arange(batch)[:, None]
    return positions[..., None] * 100.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def angles(rotary_dim: int = DIM, factor: float = 1.0, dtype: torch.dtype = torch.float64) -> Angles:
    turned = turns(rotary_dim).unsqueeze(1)
    return Angles((factor * turned.cos()).to(dtype), (factor * turned.sin()).to(dtype))


def places(pairing: Pairing, rotary_dim: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return the dimensions from which each pair is read and to which it is written."""
    halves = [(i, i + rotary_dim // 2) for i in range(rotary_dim // 2)]
    neighbors = [(2 * i, 2 * i + 1) for i in range(rotary_dim // 2)]
    read, written = {"half": (halves, halves), "interleaved": (neighbors, neighbors), "split": (neighbors, halves)}[pairing]
    return list(zip(read, written, strict=True))


@pairings
@rotary_dims
@factors
def test_rotation_is_a_two_by_two_matrix_per_pair(pairing: Pairing, rotary_dim: int, factor: float) -> None:
    x, turned = vectors().numpy(), turns(rotary_dim).numpy()
    expected = x.copy()
    for pair, (read, written) in enumerate(places(pairing, rotary_dim)):
        for row in range(2):
            for n in range(SEQ):
                cos, sin = np.cos(turned[row, n, pair]), np.sin(turned[row, n, pair])
                matrix = factor * np.array([[cos, -sin], [sin, cos]])
                expected[row, :, n, list(written)] = matrix @ x[row, :, n][:, list(read)].T
    np.testing.assert_allclose(rotate(vectors(), angles(rotary_dim, factor), pairing).numpy(), expected, atol=1e-14)


@pairings
@rotary_dims
@factors
@dtypes
def test_rotating_and_rotating_back_invert_each_other(
    pairing: Pairing, rotary_dim: int, factor: float, dtype: torch.dtype
) -> None:
    x, by = vectors(dtype), angles(rotary_dim, factor, dtype)
    assert not torch.equal(rotate(x, by, pairing), x)
    for there, back in ((rotate, unrotate), (unrotate, rotate)):
        again = back(there(x, by, pairing), by, pairing)
        assert again.dtype == dtype
        torch.testing.assert_close(again, x, rtol=0, atol=TOLERANCE[dtype])


@pairings
@dtypes
@pytest.mark.parametrize("table", [torch.bfloat16, torch.float16], ids=str)
def test_a_table_of_sixteen_bits_is_still_undone_exactly(pairing: Pairing, dtype: torch.dtype, table: torch.dtype) -> None:
    x, rough = vectors(dtype), angles(dtype=table)  # cos² + sin² is not 1 there
    torch.testing.assert_close(unrotate(rotate(x, rough, pairing), rough, pairing), x, rtol=0, atol=TOLERANCE[dtype])


@pairings
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_vectors_come_back_to_their_rounding(pairing: Pairing, dtype: torch.dtype) -> None:
    x, by = vectors(dtype), angles(dtype=dtype)
    again = unrotate(rotate(x, by, pairing), by, pairing)
    assert again.dtype == dtype
    torch.testing.assert_close(again, x, rtol=0, atol=3 * torch.finfo(dtype).eps * float(x.abs().max()))


@pairings
@rotary_dims
def test_rotation_keeps_the_norm_and_what_is_not_rotated(pairing: Pairing, rotary_dim: int) -> None:
    x = vectors()
    turned = rotate(x, angles(rotary_dim), pairing)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-13, atol=0)
    assert torch.equal(turned[..., rotary_dim:], x[..., rotary_dim:])
    assert angles(rotary_dim).rotary_dim == rotary_dim


def doubled(half: Tensor) -> Tensor:
    return torch.cat((half, half), -1)


def neighbored(half: Tensor) -> Tensor:
    return half.repeat_interleave(2, -1)


LAYOUTS = {
    "complex": lambda cos, sin: torch.complex(cos, sin),
    "two halves": lambda cos, sin: (doubled(cos), doubled(sin)),
    "neighbors": lambda cos, sin: (neighbored(cos), neighbored(sin)),
    "half the width": lambda cos, sin: (cos, sin),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rotary_dim", [DIM, 8, 6, 4, 2])
@factors
def test_angles_are_read_from_every_layout_of_a_table(layout: str, rotary_dim: int, factor: float) -> None:
    cos, sin = factor * turns(rotary_dim).cos(), factor * turns(rotary_dim).sin()
    read = angles_from(LAYOUTS[layout](cos, sin))
    assert read.rotary_dim == rotary_dim
    assert torch.equal(read.cos, cos.unsqueeze(1))
    assert torch.equal(read.sin, sin.unsqueeze(1))


@pairings
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_table_serves_the_whole_batch(pairing: Pairing, layout: str) -> None:
    one, rows = (LAYOUTS[layout](turn.cos(), turn.sin()) for turn in (turns(8, 1), turns(8, 1).expand(2, -1, -1)))
    assert torch.equal(rotate(vectors(), angles_from(one), pairing), rotate(vectors(), angles_from(rows), pairing))


def by_complex_numbers(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return modeling_deepseek_v2.apply_rotary_emb(queries, keys, torch.complex(cos, sin))


MODELS = {
    "llama": (modeling_llama.apply_rotary_pos_emb, "two halves", DIM, "half"),
    "gpt_oss": (modeling_gpt_oss.apply_rotary_pos_emb, "half the width", DIM, "half"),
    "cohere": (modeling_cohere.apply_rotary_pos_emb, "neighbors", DIM, "interleaved"),
    "glm, partial": (modeling_glm.apply_rotary_pos_emb, "two halves", 8, "interleaved"),
    "deepseek_v2": (by_complex_numbers, "half the width", DIM, "interleaved"),
    "deepseek_v3": (modeling_deepseek_v3.apply_rotary_pos_emb, "two halves", DIM, "half"),
    "deepseek_v3, interleaved": (modeling_deepseek_v3.apply_rotary_pos_emb_interleave, "two halves", DIM, "split"),
}


@pytest.mark.parametrize(("apply", "layout", "rotary_dim", "pairing"), MODELS.values(), ids=MODELS)
@factors
def test_rotation_is_that_of_transformers(apply, layout: str, rotary_dim: int, pairing: Pairing, factor: float) -> None:
    cos, sin = (factor * part.float() for part in (turns(rotary_dim).cos(), turns(rotary_dim).sin()))
    tables = LAYOUTS[layout](cos, sin)
    keys, queries = vectors(torch.float32), vectors(torch.float32).flip(1)
    turned_queries, turned_keys = apply(queries, keys, *tables)
    for x, turned in ((keys, turned_keys), (queries, turned_queries)):
        torch.testing.assert_close(rotate(x, angles_from(tables), pairing), turned, rtol=1e-6, atol=1e-6)
        others = set(PAIRINGS) - {pairing}
        assert not any(torch.allclose(rotate(x, angles_from(tables), other), turned, atol=1e-2) for other in others)


@pytest.mark.parametrize("neighbors", [True, False])
def test_pairs_are_joined_again(neighbors: bool) -> None:
    first, second = pairs(torch.arange(6), neighbors)
    assert first.tolist() == ([0, 2, 4] if neighbors else [0, 1, 2])
    assert torch.equal(joined(first, second, neighbors), torch.arange(6))
