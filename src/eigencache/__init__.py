"""Measure and compress the KV cache of language models.

Example:
    >>> import eigencache
    >>> probe = eigencache.probe("ref-llama")
    >>> probe.layer(3).values.effective_rank
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from eigencache.api import CacheCodec, CompressedCache, Probe, compressed, disable, enable, fit, probe

__all__ = ["CacheCodec", "CompressedCache", "Probe", "__version__", "compressed", "disable", "enable", "fit", "probe"]


def __getattr__(name: str) -> Any:
    """Import the public API on first use, so that `import eigencache` loads neither torch nor transformers."""
    if name == "__version__":
        from importlib.metadata import version

        return version("eigencache")
    if name in __all__:
        from eigencache import api

        return getattr(api, name)
    raise AttributeError(f"module 'eigencache' has no attribute {name!r}")
