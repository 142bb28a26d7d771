"""The lines below a generated text: bytes, ratio and speed, and the first difference to the plain cache."""

from dataclasses import replace

import pytest

from eigencache.evaluate.generation import parted_at
from eigencache.records.generation import Generated
from eigencache.report.generation import comparison_lines, cost_line


def generated(tokens: list[int], *, nbytes: int = 1_234_567, sixteen: int = 4_938_268) -> Generated:
    return Generated(tokens, "", 1000, nbytes, sixteen, 0.256, 0.05)


def spelled(ids: list[int]) -> str:
    """Every token in brackets; the second is the end of a line."""
    return "".join("\n" if i == 1 else f"<{i}>" for i in ids)


def lines(one: list[int], other: list[int], dtype: str = "bfloat16") -> list[str]:
    found, plain = generated(one), generated(other, nbytes=4_938_268)
    return comparison_lines(found, plain, parted_at(found, plain), dtype, spelled)


def test_a_cost_is_bytes_tokens_ratio_and_times() -> None:
    assert cost_line(generated([5] * 31), "compressed cache") == (
        "compressed cache: 1,234,567 bytes for 1,030 tokens, ratio to 16 bits 4.00; prompt 0.26 s, "
        "20.0 tokens per second (median)"
    )


def test_a_cost_names_what_read_the_packed_blocks() -> None:
    assert cost_line(replace(generated([5] * 31), backend="vnni"), "x").endswith("per second (median); backend vnni")


def test_a_cost_has_the_side_information_of_a_codec() -> None:
    line = cost_line(replace(generated([5] * 31), side_nbytes=6_470_000), "x")
    assert "ratio to 16 bits 4.00; side information 6,470,000 bytes, stored once; prompt" in line


@pytest.mark.parametrize("step", [None, 0.0])
def test_a_cost_without_a_speed_ends_with_the_prompt(step: float | None) -> None:
    assert cost_line(replace(generated([5]), step_seconds=step), "x").endswith("ratio to 16 bits 4.00; prompt 0.26 s")


def test_a_cache_larger_than_16_bits_is_not_called_smaller_by_more_than_it_is() -> None:
    assert "2,000 bytes for 1,001 tokens, ratio to 16 bits 0.50" in cost_line(
        generated([1, 2], nbytes=2000, sixteen=1000), "x"
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_plain_cache_is_named_by_the_models_dtype(dtype: str) -> None:
    first = lines([2, 3], [2, 3], dtype)[0]
    assert first.startswith(f"plain cache in {dtype}: 4,938,268 bytes for 1,001 tokens, ratio to 16 bits 1.00")


def test_equal_answers_are_said_to_be_equal_in_one_line() -> None:
    assert lines([2, 3, 4], [2, 3, 4])[1:] == ["all 3 tokens are equal"]


def test_where_answers_part_both_are_shown_on_one_line_each() -> None:
    assert lines([2, 1, 3, 4], [2, 1, 5, 1])[1:] == [
        "the first 2 tokens are equal, then the texts differ:",
        "  compressed: '<2>\\n<3><4>'",
        "  plain:      '<2>\\n<5>\\n'",
    ]


def test_only_what_lies_around_the_place_is_shown() -> None:
    one, other = list(range(100, 200)), [*range(100, 150), *range(250, 300)]
    said, compressed, plain = lines(one, other)[1:]
    assert said == "the first 50 tokens are equal, then the texts differ:"
    assert compressed == f"  compressed: {spelled(one[26:74])!r}" and plain == f"  plain:      {spelled(other[26:74])!r}"


def test_answers_that_differ_from_the_first_token_on_are_shown_from_there() -> None:
    assert lines([2, 3], [4, 3])[1:] == [
        "the first 0 tokens are equal, then the texts differ:",
        "  compressed: '<2><3>'",
        "  plain:      '<4><3>'",
    ]


def test_an_answer_that_ends_earlier_parts_at_its_end() -> None:
    assert lines([2, 3], [2, 3, 4])[1:] == [
        "the first 2 tokens are equal, then the texts differ:",
        "  compressed: '<2><3>'",
        "  plain:      '<2><3><4>'",
    ]
