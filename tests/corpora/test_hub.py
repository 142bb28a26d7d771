import sys
from types import SimpleNamespace

import pytest

from eigencache.corpora import hub as hub_module
from eigencache.corpora.hub import articles
from eigencache.corpora.resolve import read_text
from eigencache.corpora.text import Document
from eigencache.errors import CorpusError

WIKITEXT_ROWS = ["", " = A = \n", "", " First .\n", " = = Part = = \n", " Second .\n", "", " = Robert 2 = \n", " Third .\n"]


class FakeDataset(list):
    @property
    def column_names(self):
        return list(self[0])

    def select_columns(self, names):
        return FakeDataset({name: row[name] for name in names} for row in self)


@pytest.fixture
def hub(monkeypatch):
    """A `datasets` package that returns or raises `hub.rows` and records its calls, and a hub that answers."""
    settings = SimpleNamespace(HF_HUB_OFFLINE=False)
    rows = FakeDataset({"text": row} for row in WIKITEXT_ROWS)
    state = SimpleNamespace(rows=rows, asked=[], offline=[], config=settings)

    def load_dataset(name, config, *, split):
        state.asked.append((name, config, split))
        state.offline.append(settings.HF_HUB_OFFLINE)
        if isinstance(state.rows, Exception):
            raise state.rows
        return state.rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, config=settings))
    monkeypatch.setattr(hub_module.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_module, "get_session", lambda: SimpleNamespace(head=lambda url, timeout: None))
    return state


@pytest.fixture
def no_network(hub, monkeypatch):
    """Make every connection to the hub fail."""

    def head(url, timeout):
        raise hub_module.HTTPError("Name or service not known")

    monkeypatch.setattr(hub_module, "get_session", lambda: SimpleNamespace(head=head))


@pytest.mark.parametrize(
    ("spec", "name", "asked"),
    [
        ("wikitext2", "wikitext2:test", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")),
        ("wikitext2:train", "wikitext2:train", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train")),
        ("hf:me/data", "hf:me/data::train", ("me/data", None, "train")),
        ("hf:me/data:en", "hf:me/data:en:train", ("me/data", "en", "train")),
        ("hf:me/data::test", "hf:me/data::test", ("me/data", None, "test")),
        ("hf:me/data:en:train[:1%]", "hf:me/data:en:train[:1%]", ("me/data", "en", "train[:1%]")),
    ],
)
def test_a_spec_names_data_set_config_and_split(hub, spec, name, asked):
    assert read_text(spec).name == name
    assert hub.asked == [asked]


def test_a_row_is_a_document_and_blank_rows_are_dropped(hub):
    hub.rows = FakeDataset({"text": row, "id": i} for i, row in enumerate(["one", None, "", "two"]))
    assert list(read_text("hf:me/data").documents) == [Document("row 0", "one"), Document("row 3", "two")]


def test_wikitext_rows_are_joined_to_articles(hub):
    text = read_text("wikitext2")
    assert list(text.documents) == [
        Document("A", " = A = \n\n First .\n = = Part = = \n Second .\n\n"),
        Document("Robert 2", " = Robert 2 = \n Third .\n"),
    ]
    assert read_text("hf:Salesforce/wikitext:wikitext-2-raw-v1:test").sha256 == text.sha256


def test_articles_lose_no_line():
    assert "".join(d.text for d in articles(WIKITEXT_ROWS)) == "".join(row or "\n" for row in WIKITEXT_ROWS)


@pytest.mark.parametrize("spec", ["wikitext2:test", "hf:me/data:en:train"])
def test_without_the_package_the_error_says_what_to_install(spec):
    with pytest.raises(CorpusError) as caught:
        read_text(spec)
    message = str(caught.value)
    assert message.startswith(f"{spec}: needs the package `datasets`")
    assert 'pip install "eigencache[data]", or pass a local file' in message and "\n" not in message


@pytest.mark.parametrize("error", [ConnectionError("no network\nmore"), ValueError("Unknown split"), RuntimeError()])
def test_what_cannot_be_loaded_is_refused_with_spec_and_reason(hub, error):
    hub.rows = error
    with pytest.raises(CorpusError) as caught:
        read_text("hf:me/data:en:test")
    reason = str(error).split("\n")[0] or "RuntimeError"
    message = f"hf:me/data:en:test: cannot be loaded ({reason}): check name, config, split and network, or pass a local file"
    assert str(caught.value) == message


def test_a_reachable_hub_changes_no_setting_of_datasets(hub):
    read_text("wikitext2")
    assert hub.offline == [False] and hub.config.HF_HUB_OFFLINE is False


def test_without_a_network_the_local_cache_is_used_and_the_setting_restored(hub, no_network):
    assert read_text("wikitext2").name == "wikitext2:test"
    assert hub.offline == [True] and hub.config.HF_HUB_OFFLINE is False


def test_without_a_network_and_a_cached_copy_the_error_names_the_network(hub, no_network):
    hub.rows = ConnectionError("offline mode")
    with pytest.raises(CorpusError) as caught:
        read_text("wikitext2")
    assert str(caught.value) == (
        "wikitext2:test: the hub cannot be reached (Name or service not known), and the data set is not in the local cache: "
        "check the network, or pass a local file"
    )
    assert hub.offline == [True] and hub.config.HF_HUB_OFFLINE is False


def test_offline_mode_of_the_user_needs_no_connection(hub, no_network, monkeypatch):
    monkeypatch.setattr(hub_module.constants, "HF_HUB_OFFLINE", True)
    assert read_text("wikitext2").name == "wikitext2:test"
    assert hub.offline == [False]  # `datasets` has the setting from the environment


def test_a_data_set_without_a_text_column_is_refused_with_its_columns(hub):
    hub.rows = FakeDataset([{"content": "a", "id": 1}])
    with pytest.raises(CorpusError, match=r'^hf:me/data::train: no column "text" \(its columns: content, id\)'):
        read_text("hf:me/data")


def test_a_row_that_is_no_string_is_refused_with_its_number(hub):
    hub.rows = FakeDataset([{"text": "a"}, {"text": ["b"]}])
    with pytest.raises(CorpusError, match=r'^hf:me/data::train: column "text" contains a list in row 1'):
        read_text("hf:me/data")


@pytest.mark.parametrize("spec", ["hf", "hf:", "hf::en"])
def test_a_missing_name_is_refused_with_an_example(spec):
    with pytest.raises(
        CorpusError, match=r"^hf:.* the name of the data set is missing: write hf:NAME\[:CONFIG\[:SPLIT\]\], such as hf:"
    ):
        read_text(spec)
