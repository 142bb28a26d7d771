"""Attention over packed blocks on a GPU against PyTorch's flash attention over bfloat16, and against copying the bytes.

    python benchmarks/live_triton.py [--cases 4096x1,32768x16,131072x1] [--bits 2.9,4,4.25] [--repeats 30]

Geometry of Llama 3 8B: 32 query heads, 8 KV heads of 128 numbers; random bytes. Before a case is timed, its first sequence
is held against float64 (`kernels/packed/reference.py` unpacks). `Kernel`: queries in coefficients to means of integers.
`Flash`: `scaled_dot_product_attention` with `enable_gqa`, flash backend, keys and values in bfloat16. `Copy`: the packed
bytes within the GPU, read and written: the bytes that `Graph`, the same launches without the host, reads in its time
are a share of those. Medians of CUDA events; before each run the L2
cache is overwritten. Encoding: keys in bfloat16 to bytes, gigabytes of keys a second. `--tiles` times every tile that the
kernel is tried with, by itself.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from eigencache.kernels.packed import reference
from eigencache.kernels.packed.format import BLOCK, Widths
from eigencache.report.core.table import Table

HEADS, KV_HEADS, DIM = 32, 8, 128
WIDTHS = {
    "2.9": Widths(8, 56, 40),  # 2.88 bits a number, 24 numbers left out
    "4": Widths(0, 128, 0),
    "4.25": Widths(16, 96, 16),
}


def milliseconds(work: Callable[[], object], repeats: int, waste: Tensor) -> float:
    """The median of single runs, none of which finds anything in the L2 cache."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        waste.zero_()
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return median(times)


def packed(widths: tuple[Widths, ...], batch: int, blocks: int) -> Tensor:
    """Random bytes [batch, blocks, bytes]."""
    return torch.randint(0, 256, (batch, blocks, sum(w.nbytes for w in widths)), dtype=torch.uint8, device="cuda")


def held_against_float64(
    attend: Callable[..., tuple[Tensor, Tensor]], keys: Tensor, values: Tensor, widths, q: Tensor
) -> float:
    """The largest error of the first sequence's means over the largest mean; raises where it is more than bfloat16's."""
    found, lse = (x[:1].double() for x in attend([keys], [values], widths, widths, q))
    means, total = [], []
    for one in range(KV_HEADS):
        begin, size = one * widths[0].nbytes, widths[0].nbytes
        u, w = (reference.unpack(x[:1, :, begin : begin + size], widths[:1])[:, 0].double() for x in (keys, values))
        logits = q[:1, one].double() @ u
        means.append(logits.softmax(-1) @ w.mT)
        total.append(logits.logsumexp(-1))
    right = torch.stack(means, 1)
    error = float((found - right).abs().amax() / right.abs().amax())
    apart = float((lse - torch.stack(total, 1)).abs().amax())
    if not (error < 2**-8 and apart < 2**-6):
        raise SystemExit(f"the kernel is wrong: means are {error:.2g} apart, logarithms of sums {apart:.2g}")
    return error


def attention_rows(cases: list[tuple[int, int]], bits: list[str], repeats: int, waste: Tensor) -> list[tuple[str, ...]]:
    """A row of the table for every context, batch and width."""
    from eigencache.kernels.packed.triton.launch import attend

    rows = []
    for context, batch in cases:
        flash = flash_ms(context, batch, repeats, waste)
        for name in bits:
            widths = (WIDTHS[name],) * KV_HEADS
            both = torch.stack([packed(widths, batch, context // BLOCK) for _ in range(2)])
            most = WIDTHS[name].coefficients
            queries = torch.randn(batch, KV_HEADS, HEADS // KV_HEADS, most, device="cuda") * (2 / most**0.5)
            queries /= reference.largest_integers(widths).cuda()[:, None]
            error = held_against_float64(attend, both[0], both[1], widths, queries)
            run = partial(attend, [both[0]], [both[1]], widths, widths, queries)
            kernel = milliseconds(run, repeats, waste)
            graph = milliseconds(captured(run), repeats, waste)
            copy = milliseconds(partial(torch.empty_like(both).copy_, both), repeats, waste)
            speed, limit = both.nbytes / graph / 1e6, 2 * both.nbytes / copy / 1e6
            times = (f"{x:.3f}" for x in (flash, kernel, graph))
            rates = (f"{flash / graph:.2f} x", f"{speed:,.0f}", f"{limit:,.0f}", f"{speed / limit:.0%}", f"{error:.1e}")
            rows.append((f"{context:,}", str(batch), name, *times, *rates))
    return rows


def flash_ms(context: int, batch: int, repeats: int, waste: Tensor) -> float:
    """One step of PyTorch's flash attention over keys and values in bfloat16."""
    q = torch.randn(batch, HEADS, 1, DIM, dtype=torch.bfloat16, device="cuda")
    keys, values = torch.randn(2, batch, KV_HEADS, context, DIM, dtype=torch.bfloat16, device="cuda").unbind()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        run = partial(F.scaled_dot_product_attention, q, keys, values, enable_gqa=True)
        return milliseconds(run, repeats, waste)


def captured(work: Callable[[], object]) -> Callable[[], None]:
    """The same launches as one graph: what the GPU needs without the host's part."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def encoding_rows(tokens: int, bits: list[str], repeats: int, waste: Tensor) -> list[tuple[str, ...]]:
    """A row of the table for every width; integers are held against the reference first."""
    from eigencache.kernels.packed.triton.encode import encode

    rows = []
    x = torch.randn(1, KV_HEADS, tokens, DIM, dtype=torch.bfloat16, device="cuda")
    for name in bits:
        widths = (WIDTHS[name],) * KV_HEADS
        largest = reference.largest_integers(widths).cuda()
        encoder = torch.linalg.qr(torch.randn(KV_HEADS, DIM, DIM, device="cuda")).Q[:, : largest.shape[1]]
        encoder, mean = encoder * largest[..., None] / 8, torch.randn(KV_HEADS, DIM, device="cuda")
        some = x[:, :, : 16 * BLOCK]
        found = reference.unpack(encode(some, mean, encoder, widths), widths).int()
        y = (some.double() - mean[:, None]) @ encoder.double().mT + largest[:, None] / 2
        right = y.mT.round().clamp(min=torch.zeros_like(largest)[..., None], max=largest[..., None]).int()
        apart = (found - right).abs()
        if apart.amax() > 1 or apart.float().mean() > 1e-3:
            raise SystemExit(
                f"encoding is wrong: {apart.float().mean():.2%} of the integers differ, by up to {apart.amax()}"
            )
        time = milliseconds(partial(encode, x, mean, encoder, widths), repeats, waste)
        rows.append((f"{tokens:,}", name, f"{time:.3f}", f"{x.nbytes / time / 1e6:,.0f}", f"{apart.float().mean():.1e}"))
    return rows


def tile_rows(case: tuple[int, int], bits: str, repeats: int, waste: Tensor) -> list[tuple[str, ...]]:
    """A row for every tile that the kernel is tried with, in the first case."""
    from eigencache.kernels.packed.triton import launch

    context, batch = case
    widths = (WIDTHS[bits],) * KV_HEADS
    keys, values = packed(widths, batch, context // BLOCK), packed(widths, batch, context // BLOCK)
    queries = torch.randn(batch, KV_HEADS, HEADS // KV_HEADS, WIDTHS[bits].coefficients, device="cuda") / 100
    rows = []
    for paired, every in ((True, launch.PAIRED_TILES), (False, launch.TILES)):
        for tiles in every:
            for splits in (None, 8, 16, 32, 64):
                options = {"splits": splits, "tiles": tiles, "paired": paired}
                run = partial(launch.attend, [keys], [values], widths, widths, queries, **options)
                name = ("pairs" if paired else "halves", *map(str, tiles), str(splits))
                try:
                    time = milliseconds(captured(run), repeats, waste)
                except Exception as error:  # noqa: BLE001 — a tile that a GPU has no room for is a row, too
                    rows.append((*name, type(error).__name__, ""))
                    continue
                rows.append((*name, f"{time:.3f}", f"{(keys.nbytes + values.nbytes) / time / 1e6:,.0f}"))
    return rows


def main() -> int:
    """Check, time and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="4096x1,32768x16,131072x1", help="tokens x sequences")
    parser.add_argument("--bits", default=",".join(WIDTHS), help="of " + ", ".join(WIDTHS))
    parser.add_argument("--tokens", type=int, default=131_072, help="that are encoded")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--tiles", action="store_true", help="time every tile, of the last case and width")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device: what is measured here is a GPU", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    bits = arguments.bits.split(",")
    cases = [(int(context), int(batch)) for context, batch in (case.split("x") for case in arguments.cases.split(","))]
    waste = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    note = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    console = Console(width=160)
    with torch.inference_mode():
        columns = ("Context", "Batch", "Bits", "Flash ms", "Kernel ms", "Graph ms", "Flash over it", "GB/s", "Copy GB/s r+w")
        rows = attention_rows(cases, bits, arguments.repeats, waste)
        console.print(Table("One attention step", (*columns, "Of copy", "Error"), tuple(rows), notes=(note,)))
        rows = encoding_rows(arguments.tokens, bits, arguments.repeats, waste)
        columns = ("Tokens", "Bits", "ms", "GB/s", "Integers apart")
        console.print(Table("Encoding keys", columns, tuple(rows), notes=(note,)))
        if arguments.tiles:
            columns = ("Tiles", "Blocks", "Warps", "Stages", "Registers", "Splits", "ms", "GB/s")
            rows = tile_rows(cases[-1], bits[-1], arguments.repeats, waste)
            console.print(Table(f"Tiles, {cases[-1][0]:,} x {cases[-1][1]}, {bits[-1]} bits", columns, tuple(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
