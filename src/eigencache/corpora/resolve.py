"""A text specification becomes a Text."""

import difflib
import pkgutil
from importlib import import_module

import eigencache.corpora
from eigencache.corpora.text import CORPORA, PATH_USAGE, Text, abridged
from eigencache.errors import CorpusError


def read_text(spec: str) -> Text:
    """Resolve a `--text` spec: a registered name comes first, so that a spec means the same in every folder.

    A file that is called like a corpus is reached as `./stdlib`. Costs one pass over the whole text (its hash).
    Raises `CorpusError` with one line: what is wrong, where, and what to do.
    """
    for module in pkgutil.iter_modules(eigencache.corpora.__path__, "eigencache.corpora."):
        import_module(module.name)
    from eigencache.corpora.files import read_path

    word, _, rest = spec.partition(":")
    if word in CORPORA:
        return CORPORA[word].read(rest)
    found = read_path(spec)
    if found is not None:
        return found
    close = difflib.get_close_matches(word.lower(), CORPORA, n=1)
    guess = f" (did you mean {close[0]}?)" if close else ""
    usages = ", ".join([PATH_USAGE, *(CORPORA[word].usage for word in sorted(CORPORA))])
    raise CorpusError(f"{abridged(spec)}: no such file or folder, and no corpus of that name{guess}. A text is {usages}")
