"""Resolution of a text specification: the name of a corpus, a file, a folder or a glob."""

import difflib
import pkgutil
from importlib import import_module

import eigencache.corpora
from eigencache.corpora.files import PATH_USAGE, abridged, read_path
from eigencache.corpora.text import CORPORA, Text
from eigencache.errors import CorpusError


def read_text(spec: str) -> Text:
    """Return the text of a specification; cost: one pass over the text for its hash.

    A registered name takes precedence over a path, so that a specification means the same in every folder. A file with the
    name of a corpus is given as `./stdlib`.

    Args:
        spec: `NAME` or `NAME:REST` of a registered corpus, or the path of a file, a folder or a glob.

    Raises:
        CorpusError: The specification is neither a corpus nor a path, or its text cannot be read.
    """
    for module in pkgutil.iter_modules(eigencache.corpora.__path__, "eigencache.corpora."):
        import_module(module.name)  # registers the corpora and file formats
    word, _, rest = spec.partition(":")
    if word in CORPORA:
        return CORPORA[word].read(rest)
    text = read_path(spec)
    if text is not None:
        return text
    close = difflib.get_close_matches(word.lower(), CORPORA, n=1)
    guess = f" (did you mean {close[0]}?)" if close else ""
    usages = ", ".join([PATH_USAGE, *(CORPORA[word].usage for word in sorted(CORPORA))])
    raise CorpusError(f"{abridged(spec)}: no such file or folder, and no corpus of that name{guess}. A text is {usages}")
