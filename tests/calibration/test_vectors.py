"""What a model caches as plain vectors: those of the capture, token for token, whatever the batch and the padding."""

import copy
from dataclasses import replace
from itertools import accumulate, pairwise

import pytest
import torch

from eigencache.calibration.moments import captured_by_name
from eigencache.calibration.session import Session
from eigencache.calibration.vectors import SampledVectors, Units, affordable, layout_of, sample_vectors, tensor_names
from eigencache.errors import NonFiniteError, StatisticsError, UnsupportedArchitectureError
from eigencache.models.capture import Capture
from eigencache.models.rope_detection import rotations_of
from tiny_models import tiny

NAMES = ("gpt2", "llama", "qwen2", "mistral", "gemma2", "deepseek_v2", "deepseek_v3", "smollm3")
MEMORY = 2**30


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sampled(loaded, sequences, what: str = "vectors", **options) -> SampledVectors:
    session = Session(loaded, **options)
    return sample_vectors(session, affordable(session, sequences), rotations_of(loaded), what=what)


@pytest.mark.parametrize("name", NAMES)
def test_vectors_are_what_the_capture_sees_before_rotation(name: str, loaded, sequences) -> None:
    one, text = loaded(name), sequences(24, 17, 24)
    samples, mla = sampled(one, text, batch_size=2), loaded(name).geometry.mla is not None
    assert samples.lengths == (24, 17, 24) and samples.vectors().shape == (65, one.geometry.values_per_token)
    names, edges = tensor_names(samples.layout, mla=mla), [0, *accumulate(part.width for part in samples.layout.parts)]
    parts = [(part.layer_idx, part.slot) for part in samples.layout.parts]
    assert parts == sorted(parts) and len(parts) == 2 * len({layer_idx for layer_idx, _ in parts})
    tokens = [slice(*edge) for edge in pairwise([0, 24, 41, 65])]
    with Capture(one.model, one.geometry) as capture:
        for ids, at in zip(text.ids, tokens, strict=True):
            assert torch.equal(samples.ids[at], torch.from_numpy(ids))
            tensors = captured_by_name(capture.run(torch.from_numpy(ids)[None]))
            for part, tensor, start, stop in zip(samples.layout.parts, names, edges, edges[1:], strict=False):
                expected = tensors[tensor][part.layer_idx][0].transpose(0, 1).flatten(1).float()
                torch.testing.assert_close(samples.vectors(at, start, stop), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_batches_do_not_matter(name: str, loaded, sequences) -> None:
    text = sequences(20, 24, 9)
    alone, together = (sampled(loaded(name), text, batch_size=size) for size in (1, 3))
    torch.testing.assert_close(together.vectors(), alone.vectors(), rtol=1e-3, atol=1e-3)
    assert torch.equal(together.ids, alone.ids) and together.lengths == alone.lengths


def test_names_are_those_of_metrics(loaded, sequences) -> None:
    expected = {
        "gpt2": ["keys", "values"] * 3,
        "llama": ["keys_pre_rope", "values"] * 3,
        "deepseek_v2": ["latent", "key_rope_pre_rope"] * 3,
        "smollm3": ["keys_pre_rope", "values", "keys", "values"] * 2,
    }
    for name, names in expected.items():
        layout = sampled(loaded(name), sequences(12)).layout
        assert tensor_names(layout, mla=name == "deepseek_v2") == names, name


def test_what_does_not_fit_into_memory_is_thinned_out_over_the_whole_text(loaded, sequences) -> None:
    one, text = loaded("llama"), sequences(*[16] * 10)
    per_token = 2 * one.geometry.values_per_token
    samples = sampled(one, text, memory=per_token * 16 * 4)
    assert samples.lengths == (16,) * 4
    assert torch.equal(samples.ids, torch.cat([torch.from_numpy(text.ids[i]) for i in (0, 3, 6, 9)]))
    with pytest.raises(StatisticsError, match=r"holds only 15 tokens\. Raise `memory` or lower `max_length`"):
        sampled(one, text, memory=per_token * 15)


def test_a_part_of_a_text_is_thinned_out_by_its_own_length(loaded, sequences) -> None:
    one, text = loaded("llama"), sequences(*[16] * 10)
    part = replace(text, ids=text.ids[7:])
    samples = sampled(one, part, memory=2 * one.geometry.values_per_token * 48)
    assert samples.lengths == (16,) * 3


def test_numbers_that_are_none_are_refused_by_layer_and_slot(loaded, sequences) -> None:
    model = copy.deepcopy(tiny("llama"))
    one = loaded(model)
    rotations = rotations_of(one)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="layer 1 stores NaN or infinite values"):
        sample_vectors(
            Session(one, memory=MEMORY),
            sequences(12),
            rotations,
        )


def test_positions_count_from_the_start_of_every_sequence(loaded, sequences) -> None:
    samples = sampled(loaded("gpt2"), sequences(4, 2, 3))
    assert samples.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2]


def test_some_of_the_sequences_are_views_of_all(loaded, sequences) -> None:
    samples = sampled(loaded("gpt2"), sequences(5, 2, 3, 2))
    some = samples.sequences(1, 3)
    assert some.lengths == (2, 3) and some.layout is samples.layout
    assert torch.equal(some.vectors(), samples.vectors()[5:10]) and torch.equal(some.ids, samples.ids[5:10])
    assert some.stored.untyped_storage().data_ptr() == samples.stored.untyped_storage().data_ptr()
    assert some.positions.tolist() == [0, 1, 0, 1, 2]
    assert samples.sequences(0, 4).lengths == samples.lengths
    assert torch.equal(samples.sequences(3, 4).vectors(), samples.vectors()[10:])
    assert len(samples.sequences(2, 2)) == 0 == len(samples.sequences(2, 2).vectors())


def test_a_mean_is_taken_from_every_vector(loaded, sequences) -> None:
    samples = sampled(loaded("gpt2"), sequences(5, 6))
    torch.testing.assert_close(samples.mean, samples.vectors().double().mean(0).float())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_float16_keeps_eleven_bits_of_the_distance_from_the_mean(scale: float) -> None:
    """Offsets of keys with a bias are a thousand times the deviation, and columns deviate by very different amounts."""
    x = scale * (1000 * draw(1, 6) + draw(500, 6, seed=1) * torch.tensor([1.0, 30.0, 1e-2, 1e-4, 1e-6, 0.0]))
    first, later = x[:100], x[100:]
    units = Units.of(first)
    back = SampledVectors(None, units.rounded(later), torch.arange(400), (400,), units).vectors()  # type: ignore[arg-type]
    away = (later - units.offset).abs()
    rounding = away / 2**11 + scale * (6e-5 * 30e-3 / 2**10) + later.abs() * 2.0**-22  # float16 below 6e-5, float32 itself
    assert bool(((back - later).abs() <= rounding).all())
    assert torch.equal(back[:, 5], later[:, 5])  # a column that never varies is exact


def test_a_number_far_beyond_the_units_saturates() -> None:
    units = Units.of(torch.tensor([[-1.0], [1.0]]))
    assert units.rounded(torch.tensor([[1e9], [-1e9], [2.0]])).tolist() == [[65504], [-65504], [2]]


def test_one_token_is_stored_exactly() -> None:
    x = draw(1, 5)
    units = Units.of(x)
    samples = SampledVectors(None, units.rounded(x), torch.zeros(1), (1,), units)  # type: ignore[arg-type]
    assert torch.equal(samples.vectors(), x) and torch.equal(samples.mean, x[0])


def test_progress_counts_sequences(loaded, sequences) -> None:
    seen: list[tuple[str, int, int]] = []
    sampled(loaded("gpt2"), sequences(*[8] * 5), batch_size=2, what="these", on_progress=lambda *a: seen.append(a))
    assert seen == [("these", 2, 5), ("these", 4, 5), ("these", 5, 5)]


def test_a_slot_without_numbers_is_refused_by_layer() -> None:
    stored = {0: (torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 2)), 3: (torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 0))}
    with pytest.raises(
        UnsupportedArchitectureError, match=r"Layers \[3\] cache vectors of dimension 0, as MLA without a rotary"
    ):
        layout_of(stored, {}, mla=True)
