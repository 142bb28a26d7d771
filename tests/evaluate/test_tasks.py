"""Every task's answer follows from its context; nothing in it is special or unknown to the model."""

from collections import Counter

import numpy as np
import pytest

from eigencache.errors import CorpusError, TokenizerMismatchError
from eigencache.evaluate.tasks import HOPS, TASKS, Example, Vocabulary, examples, task, vocabulary
from stub_codecs import bundled

LENGTH = 160
NAMES = ("copy", "induction", "recall", "needle", "variable tracking", "common words")


@pytest.fixture(scope="module")
def words() -> Vocabulary:
    return vocabulary(bundled("ref-llama"))


def only(words: Vocabulary, name: str, depth: float = 0.5, length: int = LENGTH) -> Example:
    return examples(name, words, length, depth, 1, 3)[0]


def places(context: np.ndarray, piece: np.ndarray) -> list[int]:
    return [i for i in range(len(context) - len(piece) + 1) if (context[i : i + len(piece)] == piece).all()]


def test_words_are_whole_words_and_never_special(words: Vocabulary) -> None:
    loaded = bundled("ref-llama")
    texts = [loaded.tokenizer.decode([int(i)]) for i in words.words]
    assert all(text[0] == " " and text[1:].isalpha() for text in texts)
    assert not set(loaded.tokenizer.all_special_ids) & set(words.words.tolist())
    assert len(words.words) > 1000 and words.words.max() < loaded.embedded_ids


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [90, 161, 333])
def test_contexts_have_the_length_asked_for_and_known_ids(name: str, length: int, words: Vocabulary) -> None:
    loaded = bundled("ref-llama")
    made = examples(name, words, length, 0.3, 4, 0)
    special = set(loaded.tokenizer.all_special_ids)
    for context, answer, chance in made:
        assert len(context) == length and context.dtype == answer.dtype == np.int64
        assert context[: len(words.start)].tolist() == words.start
        assert not special & {*context[len(words.start) :].tolist(), *answer.tolist()}
        assert min(context.min(), answer.min()) >= 0 and max(context.max(), answer.max()) < loaded.embedded_ids
        assert set(answer.tolist()) <= set(words.words.tolist()) and 0 < chance < 0.6
        assert set(answer.tolist()) <= set(context.tolist())
    assert len({len(example.answer) for example in made}) == 1
    assert len({example.context.tobytes() for example in made}) == 4


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_examples_and_another_seed_others(name: str, words: Vocabulary) -> None:
    first, again, other = (examples(name, words, LENGTH, 0.5, 2, seed)[1] for seed in (0, 0, 1))
    assert (first.context == again.context).all() and (first.answer == again.answer).all()
    assert (first.context != other.context).any()
    assert (examples(name, words, LENGTH, 0.5, 5, 0)[1].context == first.context).all()


@pytest.mark.parametrize("name", ["copy", "induction", "needle", "recall"])
def test_depth_places_what_is_asked_for(name: str, words: Vocabulary) -> None:
    at = [places(only(words, name, depth).context, only(words, name, depth).answer)[0] for depth in (0.0, 0.5, 1.0)]
    assert at[0] < 20 and abs(at[1] - LENGTH / 2) < 16 and at[2] > LENGTH - 32


def test_copy_repeats_the_first_half_of_a_span_whose_second_half_is_the_answer(words: Vocabulary) -> None:
    context, answer, _ = only(words, "copy")
    cue = context[-8:]
    (first, second) = places(context, cue)
    assert second == LENGTH - 8 and (context[first + 8 : first + 16] == answer).all()


def test_induction_asks_for_what_followed_the_last_token(words: Vocabulary) -> None:
    context, answer, _ = only(words, "induction")
    first, last = places(context, context[-1:])
    assert last == LENGTH - 1 and (context[first + 1 : first + 2] == answer).all()
    assert len(places(context, answer)) == 1


def test_recall_asks_for_the_value_of_one_of_many_keys(words: Vocabulary) -> None:
    context, answer, chance = only(words, "recall")
    text = bundled("ref-llama").tokenizer.decode(context)
    *lines, question = text.split("\n")
    pairs = dict(line.split(" = ") for line in lines[1:])
    assert len(pairs) == len(lines) - 1 > 20 and chance == 1 / len(lines)
    assert question.endswith(" =")
    assert pairs[question.removesuffix(" =")] == bundled("ref-llama").tokenizer.decode(answer).strip()


def test_needle_asks_for_the_line_of_a_key_that_occurs_once(words: Vocabulary) -> None:
    context, answer, _ = only(words, "needle")
    *_, question = bundled("ref-llama").tokenizer.decode(context).split("\n")
    (line,) = [x for x in bundled("ref-llama").tokenizer.decode(context).split("\n")[:-1] if x.startswith(question)]
    assert line.removeprefix(question) == bundled("ref-llama").tokenizer.decode(answer) and len(answer) == 4


def test_variable_tracking_asks_for_every_variable_of_one_chain(words: Vocabulary) -> None:
    decode = bundled("ref-llama").tokenizer.decode
    context, answer, chance = only(words, "variable tracking", length=240)
    text, question = decode(context).split("\nQuestion:")
    value = question.removeprefix(" find all variables that are assigned the value").split(" in the text")[0].strip()
    given: dict[str, str] = {}
    for line in text.strip().split("\n"):
        name, what = line.split(" = ")
        given[name.split()[-1]] = given.get(what.strip(), what.strip())
    holders = [name for name, what in given.items() if what == value]
    assert holders == decode(answer).split() and len(holders) == HOPS
    assert chance == 1 / len(set(given.values()))


def test_common_words_asks_for_the_most_frequent_one(words: Vocabulary) -> None:
    context, answer, _ = only(words, "common words")
    question = len(words.encode("\nQuestion: which word occurs most often in the text above?\nAnswer:"))
    (first, often), (_, next_often) = Counter(context[:-question].tolist()).most_common(2)
    assert first == answer[0] and often >= 4 * next_often


def test_bad_lengths_depths_names_and_tokenizers_are_refused_in_one_line(words: Vocabulary) -> None:
    for name in NAMES:
        with pytest.raises(CorpusError, match=f"`lengths` 4: too short for the task {name}"):
            examples(name, words, 4, 0.5, 1, 0)
    with pytest.raises(CorpusError, match=r"recall: contexts of this length need .* different words"):
        examples("recall", words, 20_000, 0.5, 1, 0)
    with pytest.raises(CorpusError, match=r"`depth` 1\.5"):
        examples("copy", words, LENGTH, 1.5, 1, 0)
    with pytest.raises(CorpusError, match=r"`tasks` sorting: no such task\. Choose from copy, induction"):
        examples("sorting", words, LENGTH, 0.5, 1, 0)
    loaded = bundled("ref-llama")

    class Few:
        all_special_ids: tuple[int, ...] = ()
        bos_token_id = None

        def __len__(self) -> int:
            return 40

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return ["Ġword" for _ in ids]

    with pytest.raises(TokenizerMismatchError, match="40 tokens that are whole words"):
        vocabulary(type(loaded)("few", loaded.model, Few(), loaded.geometry))  # type: ignore[arg-type]


def test_a_task_is_one_function_and_one_decorator(words: Vocabulary) -> None:
    @task("first word", has_depth=False)
    def first_word(words: Vocabulary, length: int, depth: float, rng: np.random.Generator) -> Example:
        context = rng.choice(words.words, length)
        return Example(context, context[:1], 1 / length)

    try:
        context, answer, _ = only(words, "first word")
        assert context[0] == answer[0]
    finally:
        del TASKS["first word"]
