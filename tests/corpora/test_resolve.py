import pytest

from eigencache.corpora.files import abridged
from eigencache.corpora.resolve import read_text
from eigencache.corpora.text import CORPORA, Document, NamedCorpus, Text, corpus
from eigencache.errors import CorpusError


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
