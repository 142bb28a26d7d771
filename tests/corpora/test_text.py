import hashlib

import pytest

from eigencache.corpora.resolve import read_text
from eigencache.corpora.text import CORPORA, Document, Documents, NamedCorpus, Text, abridged, content_hash, corpus
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
    with pytest.raises(CorpusError, match=r"^blank\.txt: no text in it.*give a text"):
        read_text(str(path))


@pytest.mark.parametrize(
    "spec", ["no-such-file.txt", "nowhere/at/all", "", " ", "a\nb", "a\0b", "~no-such-user/a.txt", "x" * 5000]
)
def test_what_is_neither_file_nor_corpus_is_refused_with_every_kind_of_spec(spec):
    with pytest.raises(CorpusError) as caught:
        read_text(spec)
    message = str(caught.value)
    assert message.startswith(abridged(spec) + ": no such file or folder")
    for kind in (
        "a file",
        "a folder",
        "a quoted glob",
        ".jsonl",
        "stdlib[:calibration|:held-out]",
        "wikitext2[:SPLIT]",
        "hf:NAME",
    ):
        assert kind in message
    assert "\n" not in message and len(message) < 500


@pytest.mark.parametrize(("typo", "meant"), [("stdlb", "stdlib"), ("Stdlib:held-out", "stdlib"), ("wikitext", "wikitext2")])
def test_a_typo_is_answered_with_the_name_it_resembles(typo, meant):
    with pytest.raises(CorpusError, match=rf"^{typo}: .*did you mean {meant}\?"):
        read_text(typo)


def test_a_registered_name_comes_before_a_file_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(CORPORA, "digits", NamedCorpus("digits", lambda rest: Text("a corpus", [], "")))
    (tmp_path / "digits").write_text("a file")
    assert read_text("digits").name == "a corpus"
    assert [d.text for d in read_text("./digits").documents] == ["a file"]


def test_registering_a_reader_is_all_that_a_new_corpus_needs(monkeypatch):
    monkeypatch.delitem(CORPORA, "digits", raising=False)

    @corpus("digits", "digits[:N]")
    def read_digits(rest):
        return Text.scan(f"digits:{rest or 10}", lambda: [Document("digits", "0123456789")])

    try:
        assert read_text("digits").name == "digits:10"
        assert read_text("digits:3:4").name == "digits:3:4"
        with pytest.raises(CorpusError, match=r"digits\[:N\]"):
            read_text("no-such-file")
    finally:
        del CORPORA["digits"]
