"""The Python API: one public function per command. The command line parses, calls these and prints."""

from eigencache.api.bench import bench
from eigencache.api.codec import CacheCodec
from eigencache.api.compress import evaluate, recommend, sweep
from eigencache.api.fit import fit
from eigencache.api.generate import generate, speed
from eigencache.api.measure import compare, probe, report, score
from eigencache.api.probe import LayerView, Probe
from eigencache.api.research import adapter, fold, mla
from eigencache.models.live_cache.cache import CompressedCache
from eigencache.models.live_cache.context import compressed
from eigencache.models.live_cache.hooks import disable, enable

__all__ = [
    "CacheCodec",
    "CompressedCache",
    "LayerView",
    "Probe",
    "adapter",
    "bench",
    "compare",
    "compressed",
    "disable",
    "enable",
    "evaluate",
    "fit",
    "fold",
    "generate",
    "mla",
    "probe",
    "recommend",
    "report",
    "score",
    "speed",
    "sweep",
]
