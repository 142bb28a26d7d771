"""A mkdocs hook: write one API page per folder of the package, so that a moved module needs no edit here."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

SOURCE = Path(__file__).parents[2] / "src" / "eigencache"
FOLDERS = ("records", "spectral", "corpora", "codec", "models", "calibration", "fitting", "evaluate", "studies")


def modules(folder: str) -> list[str]:
    """The modules of a folder in reading order: its own first, then those of its subfolders."""
    paths = sorted((SOURCE / folder).rglob("*.py"), key=lambda path: (len(path.parts), path))
    names = [path.relative_to(SOURCE).with_suffix("").parts for path in paths if path.stem != "__init__"]
    return [".".join(("eigencache", *name)) for name in names]


def page(title: str, names: list[str]) -> str:
    """The Markdown of one page: a directive per module."""
    return "\n\n".join([f"# {title}", *(f"::: {name}" for name in names)]) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    pages = {folder: page(f"eigencache.{folder}", modules(folder)) for folder in FOLDERS}
    pages["geometry"] = page("Geometry and errors", ["eigencache.geometry", "eigencache.errors"])
    pages["eigencache"] = page("eigencache", ["eigencache.api"])
    for name, content in pages.items():
        files.append(File.generated(config, f"api/{name}.md", content=content))
    return files
