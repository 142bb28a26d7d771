import hashlib

import pytest

from eigencache.corpora.resolve import read_text
from eigencache.corpora.text import Document, Documents, content_hash
from eigencache.errors import CorpusError


def test_a_spec_becomes_titled_documents_with_a_content_hash(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some words\n")
    text = read_text(str(path))
    assert text.name == "a.txt"
    assert list(text.documents) == [Document("a.txt", "some words\n")]
    assert text.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_documents_can_be_iterated_any_number_of_times(make_text):
    text = make_text("a", "b")
    assert list(text.documents) == list(text.documents)


def test_documents_are_read_afresh_and_one_at_a_time():
    read = []

    def start():
        for name in "abc":
            read.append(name)
            yield Document(name, name)

    documents = Documents(start)
    assert next(iter(documents)).title == "a"
    assert read == ["a"]


def test_blank_documents_are_dropped_and_pieces_never_join_the_document_before():
    pieces = [
        Document("a", "a"),
        Document("b", " \n"),
        Document("b", "b", True),
        Document("b", " ", True),
        Document("c", ""),
    ]
    kept = list(Documents(lambda: pieces))
    assert kept == [Document("a", "a"), Document("b", "b"), Document("b", " ", True)]


def test_hash_depends_on_contents_order_and_borders_but_not_on_titles_or_pieces():
    def hashed(*documents):
        return content_hash([Document(*d) for d in documents])

    one = hashed(("x", "ab"), ("y", "c"))
    assert one == hashed(("other", "ab"), ("titles", "c"))
    assert one == hashed(("x", "a"), ("x", "b", True), ("y", "c"))
    assert len({one, hashed(("x", "a"), ("y", "bc")), hashed(("y", "c"), ("x", "ab")), hashed(("x", "abc"))}) == 4
    assert content_hash([]) is None


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_text_without_words_is_refused_by_name(tmp_path, content):
    path = tmp_path / "blank.txt"
    path.write_text(content)
    with pytest.raises(CorpusError, match=r"^blank\.txt: the text is empty or only whitespace.*give a text"):
        read_text(str(path))
