"""Timings are of what their names say: caches hold what they should, all ways attend alike, ratios and tables add up."""

from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config, LlamaConfig

from eigencache.errors import ModelError
from eigencache.evaluate import speed
from eigencache.evaluate.speed import SpeedSettings, cache_nbytes, in_turn, limits, measure_speed
from eigencache.models import synthetic
from eigencache.models.live_cache.cache import CompressedCache
from eigencache.models.synthetic import RATES, filled_caches, noise_codec, stored_shapes
from eigencache.records.speed import SpeedRecord
from eigencache.report.speed import plot_roofline, speed_tables, write_speed

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


def small_llama(layers: int, positions: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=128, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=layers,
        head_dim=64, vocab_size=1024, max_position_embeddings=positions, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def small_deepseek(layers: int, positions: int) -> DeepseekV2Config:
    return DeepseekV2Config(
        hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=layers,
        kv_lora_rank=64, q_lora_rank=None, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, head_dim=16,
        first_k_dense_replace=layers, vocab_size=1024, max_position_embeddings=positions, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "_CONFIGS", {"llama": small_llama, "deepseek": small_deepseek})
    monkeypatch.setattr(speed, "_COPIED", 2**20)
    monkeypatch.setattr(speed, "_PRODUCT_ON_CPU", 64)


def caches(name: str, tokens: int = 200, batch: int = 2) -> tuple[Any, dict[str, Any]]:
    model = synthetic.random_model(name, 2, 512, dtype=torch.bfloat16)
    return model, dict(filled_caches(model, tokens, batch, (3.125, 8.0), quantized=False))


@pytest.mark.parametrize(("name", "ways"), [("llama", 3), ("deepseek", 4)])
def test_every_cache_holds_the_tokens_and_continues(name: str, ways: int) -> None:
    model, found = caches(name)
    assert len(found) == ways and next(iter(found)) == "DynamicCache"
    for cache in found.values():
        assert cache.get_seq_length() == 200
        with torch.no_grad():
            model(input_ids=torch.zeros(2, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 201


def test_bytes_are_those_of_storages_whatever_the_cache() -> None:
    model, found = caches("llama")
    values = sum(heads * dim for both in stored_shapes(model) for heads, dim in both)
    assert values == 2 * 2 * 2 * 64
    assert cache_nbytes(found["DynamicCache"]) == 2 * 2 * 200 * values
    live = found["live, 3.125 bits"]
    assert isinstance(live, CompressedCache)
    packed = 2 * 192 * values * 3.125 / 8
    assert packed < cache_nbytes(live) == live.nbytes < packed + 2 * (200 - 192 + 64) * values * 2


@pytest.mark.parametrize("bits", RATES)
def test_widths_of_noise_take_the_bits_they_are_named_after(bits: float) -> None:
    model = synthetic.random_model("llama", 1, 512, dtype=torch.float32)
    codec = noise_codec(stored_shapes(model), bits, torch.float32)
    assert codec.bits_per_value == bits
    x = torch.randn(1, 2, 640, 64)
    heads = codec.layers[0][0]
    lost = (heads.decode(heads.encode(x, torch.arange(640)[None]), torch.arange(640)[None]) - x).square().mean()
    assert float(lost) < {2.5: 0.5, 3.125: 0.25, 4.0: 0.1, 8.0: 1e-3}[bits]  # noise is held as well as bits allow


@pytest.mark.parametrize("bits", RATES)
def test_neighboring_bundles_have_unlike_widths_and_means_that_turn_change_nothing_that_is_read(bits: float) -> None:
    shapes: synthetic.Shapes = [((5, 128), (5, 128))]
    codec = noise_codec(shapes, bits, torch.float32, rotated_mean=True)
    keys, values = codec.layers[0]
    assert codec.sinks == 4 and codec.bits_per_value == bits and values.rotated_mean is None
    assert [w.bits > 128 * bits for w in keys.widths] == [bits < 8, False] * 2 + [False]
    assert len(set(keys.widths)) == (1 if bits == 8 else 3)
    x, positions = torch.randn(1, 5, 640, 128), torch.arange(640)[None]
    assert keys.rotated_mean is not None
    turned = x + keys.rotated_mean.rotated_to(positions)
    lost = keys.decode(keys.encode(turned, positions), positions) - turned
    assert float(lost.square().mean()) < {2.5: 0.5, 3.125: 0.3, 4.0: 0.15, 8.0: 1e-3}[bits]


def test_a_prompt_in_chunks_is_read_whole() -> None:
    model, made = synthetic.random_model("llama", 1, 512, dtype=torch.bfloat16), []
    make = lambda: made.append(synthetic.DynamicCache(config=model.config)) or made[-1]  # noqa: E731
    for chunk in (40, 96):
        speed._read(model.model, torch.zeros(1, 96, dtype=torch.int64), chunk, make)
    assert [cache.get_seq_length() for cache in made] == [96, 96]


@pytest.mark.parametrize("name", ["llama", "deepseek"])
def test_a_generation_continues_with_what_a_cache_holds(name: str) -> None:
    model, found = caches(name)
    for cache in found.values():
        for length in (205, 210):
            speed._generate(model, cache, 2, 5)
            assert cache.get_seq_length() == length  # the last token is not read


def test_other_bits_and_geometries_are_refused() -> None:
    with pytest.raises(ModelError, match=r"`rates` 3: not available\. Use 2\.5, 3\.125, 4, 8 bits per packed value"):
        noise_codec([((1, 64), (1, 64))], 3.0, torch.float32)
    with pytest.raises(ModelError, match=r"`geometries` gpt-5: no such geometry\. Use "):
        synthetic.random_model("gpt-5", 1, 64, dtype=torch.float32)


def test_all_run_once_in_every_repeat_in_orders_that_change() -> None:
    said: list[str] = []
    found = in_turn({"a": lambda: said.append("a"), "b": lambda: said.append("b")}, 7, CPU)
    turns = [tuple(said[at : at + 2]) for at in range(0, len(said), 2)]
    assert (
        len(turns) == 1 + 7
        and set(turns) == {("a", "b"), ("b", "a")}
        and found.keys() == {"a", "b"}
        and min(found.values()) > 0
    )
    assert min(limits(CPU, torch.float32, 1)) > 0


def test_all_ways_to_attend_give_the_same_over_the_same_cache() -> None:
    """8 bits and 16 bits: peers differ in speed, not in what they compute."""
    _, found = caches("llama")
    model = synthetic.random_model("llama", 2, 512, dtype=torch.float32)
    plain = found["DynamicCache"]
    works, nbytes = speed._attention(model, {"DynamicCache": plain})
    torch.manual_seed(0)
    assert works.keys() == nbytes.keys()
    first, *others = (work().float().flatten() for work in works.values())
    for other in others:
        torch.testing.assert_close(other, first, rtol=0.05, atol=0.02)


@pytest.fixture
def record() -> SpeedRecord:
    settings = SpeedSettings(
        ("llama", "deepseek"), (64, 130), (1, 2), (3.125,), generated=3, prefill=96, chunk=40, layers=1, repeats=1
    )
    seen: list[tuple[str, int, int]] = []
    found = measure_speed(settings, "cpu", torch.bfloat16, lambda *given: seen.append(given))
    assert seen[0] == ("llama", 0, 4) and seen[-1] == ("deepseek", 4, 4)
    return found


def test_a_record_has_every_case_and_its_tables_their_ratios(record: SpeedRecord, tmp_path: Any) -> None:
    assert SpeedRecord.model_validate_json(record.model_dump_json()) == record
    cases = {(t.part, t.geometry, t.context, t.batch) for t in record.timings}
    assert ("attention", "llama", 130, 2) in cases and ("decode", "deepseek", 64, 1) in cases
    assert ("prefill", "llama", 96, 1) in cases and not any(part == "attention" and g == "deepseek" for part, g, *_ in cases)
    tables = {table.title: table for table in speed_tables(record)}
    assert list(tables) == [
        "llama: attention of a decode step", "llama: a whole decode step",
        "llama: generation, per token", "llama: prefill", "llama: prefill, 40 tokens at a time",
        "deepseek: a whole decode step", "deepseek: generation, per token", "deepseek: prefill",
        "deepseek: prefill, 40 tokens at a time",
    ]  # fmt: skip
    rows = tables["llama: a whole decode step"].rows
    steps = {t.way: t for t in record.timings if (t.part, t.geometry, t.context, t.batch) == ("decode", "llama", 130, 2)}
    plain, live = steps["DynamicCache"].seconds, steps["live, 3.125 bits"].seconds
    assert (
        plain and live and any(r[:3] == ("130", "2", "live, 3.125 bits") and r[-1] == f"{plain / live:.2f} x" for r in rows)
    )
    assert len(tables["llama: generation, per token"].rows) == len(rows)
    assert plot_roofline(record) is not None
    written = write_speed(record, tmp_path / "out", "eigencache speed")
    assert sorted(path.name for path in written) == ["README.md", "roofline.svg", "speed.json"]
    page = (tmp_path / "out" / "README.md").read_text()
    assert page.count("| ") > 20 and "![roofline](roofline.svg)" in page and "Printed by `eigencache speed`." in page
    assert (tmp_path / "out" / "roofline.svg").read_text().startswith("<svg")
    only = record.model_copy(update={"timings": [t for t in record.timings if t.geometry == "deepseek"]})
    assert plot_roofline(only) is None and len(write_speed(only, tmp_path / "other", "x")) == 2


def test_what_cannot_be_timed_says_why_and_prints_no_number(record: SpeedRecord) -> None:
    timings = [t for t in record.timings if t.part == "decode" and t.geometry == "llama"]
    refused = timings[0].model_copy(update={"way": "QuantizedCache, other", "seconds": None, "nbytes": None, "why": "none"})
    (table,) = speed_tables(record.model_copy(update={"timings": [*timings, refused]}))
    assert "QuantizedCache, other: none" in table.notes and not any("other" in row[2] for row in table.rows)
