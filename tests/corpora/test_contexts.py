import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eigencache.corpora.contexts import CONTEXT, MIN_CONTEXTS, context_warnings, distinct_contexts, total_contexts

IDS = st.integers(0, 2) | st.integers(-(2**63), 2**63 - 1)
SEQUENCES = st.lists(st.lists(IDS, max_size=40), max_size=6)


def counted(sequences):
    return [tuple(s[i : i + CONTEXT]) for s in sequences for i in range(len(s) - CONTEXT + 1)]


@given(SEQUENCES)
def test_the_count_equals_that_of_a_python_set(sequences):
    vectors = [np.array(s, dtype=np.int64) for s in sequences]
    assert distinct_contexts(vectors) == len(set(counted(sequences)))
    assert total_contexts(vectors) == len(counted(sequences))


def test_the_count_is_exact_for_many_ids():
    ids = np.random.default_rng(0).integers(0, 150_000, (40, 500))
    ids[20:30] = ids[:10]
    assert distinct_contexts(ids) == len(set(counted(ids.tolist()))) == 30 * 493


def test_a_vector_is_one_sequence_and_a_matrix_a_list_of_rows():
    ids = np.arange(32)
    assert distinct_contexts(ids) == 25
    assert distinct_contexts(ids.reshape(2, 16)) == 18
    assert distinct_contexts([]) == distinct_contexts([[1, 2, 3]]) == 0


def test_a_context_never_crosses_the_border_of_two_sequences():
    assert distinct_contexts([range(10), range(10, 20)]) == 6
    assert distinct_contexts([range(20)]) == 13


ENOUGH = {"tokens": 65_536, "distinct": 60_000, "repetition": 0.08, "sequences": 128, "copies": 0}


def test_enough_text_gives_no_warning():
    assert context_warnings(**ENOUGH) == []
    assert context_warnings(**ENOUGH | {"distinct": MIN_CONTEXTS, "repetition": 0.5, "sequences": 8}) == []


@pytest.mark.parametrize(
    ("changed", "warning"),
    [
        (
            {"tokens": 1024, "distinct": 1041, "repetition": 0.96},
            "REPETITIVE TEXT: 1,024 tokens hold only 1,041 distinct 8-token contexts (96 % repeats): "
            "ranks measured on it describe the text, not the model",
        ),
        ({"distinct": 999}, "TOO LITTLE TEXT: only 999 distinct 8-token contexts (minimum 1,000): "),
        ({"copies": 3}, "COPIED SEQUENCES: 3 of 128 equal an earlier one: held-out figures are not held out"),
        ({"sequences": 7}, "FEW SEQUENCES: 7 (minimum 8): no intervals are given"),
    ],
)
def test_each_lack_gives_one_sentence_with_its_figures(changed, warning):
    (given,) = context_warnings(**ENOUGH | changed)
    assert given.startswith(warning)
