"""One layer's attention step over a packed past against PyTorch's over one in bfloat16, side by side in one run.

    python benchmarks/live_attention.py [--geometry llama-3-8b] [--contexts 4096,32768] [--bits 3,4] …

Random bytes and random transforms of a model's attention geometry: speed does not depend on what they say. Peers: SDPA with
`enable_gqa`, SDPA with the queries of a KV head as rows, and plain products with softmax, all over keys and values in
bfloat16. The packed step is whole: queries into coefficients, logits, softmax, sums, and back. Medians; in every repeat all
run in turn. Ratios are what counts: absolute times are those of this machine while it did nothing else.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from eigencache.codec.packed import PackedHeads
from eigencache.kernels.reference import BLOCK, Widths
from eigencache.models.compressed_attention import attend
from eigencache.models.compressed_layer import Chunk, CompressedLayer
from eigencache.report.table import Table

GEOMETRIES = {
    "llama-3-8b": (32, 8, 128),
    "qwen2.5-7b": (28, 4, 128),
    "llama-3.2-1b": (32, 8, 64),
}  # query heads, KV heads, dim
SPLITS = {2: (0, 0, 1), 3: (0, 1 / 2, 1 / 2), 4: (0, 1, 0), 6: (1 / 2, 1 / 2, 0), 8: (1, 0, 0)}  # 8, 4, 2 bits


def packed_heads(heads: int, dim: int, bits: int) -> PackedHeads:
    """A random orthogonal basis per head, widths as in `SPLITS`."""
    basis = torch.linalg.qr(torch.randn(heads, dim, dim)).Q
    widths = Widths(*(int(share * dim) for share in SPLITS[bits]))
    return PackedHeads((widths,) * heads, basis, basis, torch.randn(heads, dim))


def filled_layer(heads: int, dim: int, bits: int, context: int, batch: int) -> CompressedLayer:
    """A layer whose blocks hold random bytes and whose window holds one token."""
    both = packed_heads(heads, dim, bits), packed_heads(heads, dim, bits)
    layer = CompressedLayer(0, both, 0, 0, None)
    x = torch.randn(batch, heads, 1, dim, dtype=torch.bfloat16)
    layer.lazy_initialization(x, x)
    layer.keys, layer.values = x, x
    size = BLOCK * both[0].bits // 8
    stored = [torch.randint(0, 256, (batch, context // BLOCK, size), dtype=torch.uint8) for _ in range(2)]
    layer.chunks = [Chunk(stored[0], stored[1], context // BLOCK)]
    return layer


def works(geometry: tuple[int, int, int], context: int, batch: int, bits: list[int]) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by name."""
    heads, kv_heads, dim = geometry
    q = torch.randn(batch, heads, 1, dim, dtype=torch.bfloat16)
    keys, values = (torch.randn(batch, kv_heads, context, dim, dtype=torch.bfloat16) for _ in range(2))
    rows = q.view(batch, kv_heads, heads // kv_heads, dim)
    found: dict[str, Callable[[], Tensor]] = {
        "SDPA bf16, enable_gqa": lambda: F.scaled_dot_product_attention(q, keys, values, enable_gqa=True),
        "SDPA bf16, queries as rows": lambda: F.scaled_dot_product_attention(rows, keys, values),
        "products and softmax, bf16": lambda: ((rows @ keys.mT) * dim**-0.5).float().softmax(-1).bfloat16() @ values,
    }
    for b in bits:
        layer = filled_layer(kv_heads, dim, b, context, batch)
        window = layer.window
        found[f"packed, {b} bits"] = lambda layer=layer, window=window: attend(nn.Module(), layer, q, *window)
    return found


def main() -> None:
    """Time every context and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=GEOMETRIES, default="llama-3-8b")
    parser.add_argument("--contexts", default="4096,32768")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--bits", default="3,4,8")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    rows = []
    for context in map(int, arguments.contexts.split(",")):
        bits = [int(b) for b in arguments.bits.split(",")]
        timed = works(GEOMETRIES[arguments.geometry], context, arguments.batch, bits)
        seconds: dict[str, list[float]] = {name: [] for name in timed}
        with torch.no_grad():
            for turn in range(arguments.repeats + 1):
                for name, work in timed.items():
                    start = time.perf_counter()
                    work()
                    if turn:
                        seconds[name].append(time.perf_counter() - start)
        best = min(median(s) for name, s in seconds.items() if "bf16" in name)
        rows += [
            (f"{context:,}", name, f"{1e3 * median(s):.2f}", f"{best / median(s):.2f} x") for name, s in seconds.items()
        ]
    title = f"One attention step, {arguments.geometry}, batch {arguments.batch}, CPU, {torch.get_num_threads()} threads"
    columns = ("Context", "Way", "ms", "Best bf16 over it")
    Console().print(Table(title, columns, tuple(rows), words=frozenset({"Way"})))


if __name__ == "__main__":
    main()
