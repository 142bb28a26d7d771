"""A text that repeats another is recognized by its share of long windows, exactly for planted copies."""

import numpy as np
import pytest

from eigencache.corpora.overlap import (
    GRAM,
    SKETCH,
    check_overlap,
    check_sketched_overlap,
    overlap_share,
    sketch,
    sketched_share,
)
from eigencache.errors import CorpusError


def ids(seed: int, length: int = 1000) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 5000, length)


def test_texts_apart_share_nothing_and_a_text_shares_all_with_itself() -> None:
    assert overlap_share([ids(0)], [ids(1)]) == 0
    assert overlap_share([ids(0)], [ids(1), ids(0)]) == 1


def test_a_planted_copy_is_counted_exactly() -> None:
    text = ids(0)
    text[200:300] = ids(1)[500:600]
    assert overlap_share([text], [ids(1)]) == pytest.approx((100 - GRAM + 1) / (1000 - GRAM + 1))


def test_sequences_shorter_than_a_window_share_nothing() -> None:
    assert overlap_share([ids(0, GRAM - 1)], [ids(0, GRAM - 1)]) == 0


def test_overlap_is_refused_unless_forced_and_then_marked() -> None:
    assert check_overlap([ids(0)], [ids(1)]) is None
    with pytest.raises(CorpusError, match="100 % of the evaluation text's 32-token windows occur in the calibration text"):
        check_overlap([ids(0)], [ids(0)])
    assert "OVERLAP: 100 %" in (check_overlap([ids(0)], [ids(0)], force=True) or "")


def test_the_remedy_names_the_parameters_of_the_caller() -> None:
    with pytest.raises(CorpusError, match=r"too optimistic; choose another `text` or `calibration_text`, or `force`$"):
        check_overlap([ids(0)], [ids(0)])
    with pytest.raises(CorpusError, match=r"too optimistic; choose another `text` or `held_out`$"):
        check_overlap([ids(0)], [ids(0)], remedy="choose another `text` or `held_out`")


def test_the_sketch_of_a_short_text_is_all_of_it_and_its_share_exact() -> None:
    text = ids(0)
    text[200:300] = ids(1)[500:600]
    kept = sketch([ids(1), ids(2)])
    assert len(kept) == 2 * (1000 - GRAM + 1)
    assert (np.diff(kept.astype(np.float64)) > 0).all()
    assert sketched_share([text], kept) == overlap_share([text], [ids(1), ids(2)]) > 0
    assert sketched_share([ids(0, GRAM - 1)], kept) == sketched_share([text], sketch([ids(0, GRAM - 1)])) == 0


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 1.0])
def test_the_sketch_of_a_long_text_is_small_and_estimates_the_share(share: float) -> None:
    calibration, text = ids(1, 131_072), ids(0, 32_768)
    text[: round(share * len(text))] = calibration[70_000 : 70_000 + round(share * len(text))]
    kept = sketch([calibration])
    assert kept.nbytes == 8 * SKETCH == 131_072
    assert sketched_share([text], kept) == pytest.approx(overlap_share([text], [calibration]), abs=0.015)


def test_overlap_with_a_sketch_is_refused_unless_forced_and_then_marked() -> None:
    assert check_sketched_overlap([ids(0)], sketch([ids(1)])) is None
    with pytest.raises(CorpusError, match=r"100 % of the evaluation text's .* choose another `text`, or `force`"):
        check_sketched_overlap([ids(0)], sketch([ids(0)]))
    assert "OVERLAP: 100 %" in (check_sketched_overlap([ids(0)], sketch([ids(0)]), force=True) or "")
