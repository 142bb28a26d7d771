"""Attention over packed blocks on a GPU against PyTorch's flash attention over bfloat16, and against copying the bytes.

    python benchmarks/live_triton.py [--cases 4096x1,32768x16,131072x1] [--bits 2.9,4,4.25] [--repeats 30]

The geometry is that of Llama 3 8B, 32 query heads and 8 KV heads of 128 numbers, with random bytes. Before a case is timed,
its first sequence is compared with float64. Columns:
  Flash   `scaled_dot_product_attention` with `enable_gqa`, flash backend, keys and values in bfloat16
  Kernel  from projected queries to weighted means of integers
  Graph   the same launches as a CUDA graph, without the host
  GB/s    packed bytes over the time of `Graph`
  Copy    packed bytes copied within the GPU, read and written
Times are medians of CUDA events; the L2 cache is overwritten before each run. Encoding is from keys in bfloat16, in
gigabytes of keys per second. `--tiles` times every tile of the kernels separately.
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

from eigencache.kernels.packed.format import BLOCK, Widths, largest_integers, unpack
from eigencache.kernels.packed.reference import AttentionQueries, PackedStorage
from eigencache.report.core.table import Table

HEADS, KV_HEADS, DIM = 32, 8, 128
WIDTHS = {
    "2.9": Widths(8, 56, 40),  # 2.88 bits per number, 24 numbers of 128 dropped
    "4": Widths(0, 128, 0),
    "4.25": Widths(16, 96, 16),
}


def milliseconds(work: Callable[[], object], repeats: int, waste: Tensor) -> float:
    """Return the median time of single runs with a cold L2 cache."""
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
    """Return random bytes [batch, blocks, bytes]."""
    return torch.randint(0, 256, (batch, blocks, sum(w.nbytes for w in widths)), dtype=torch.uint8, device="cuda")


def error_against_float64(
    attend: Callable[..., tuple[Tensor, Tensor]], storage: PackedStorage, queries: AttentionQueries
) -> float:
    """Return the largest error of the first sequence's means over the largest mean; exit if it exceeds that of bfloat16."""
    result, lse = (x[:1].double() for x in attend(storage, queries))
    keys, values, widths = storage.keys[0], storage.values[0], storage.widths[0]
    means, total = [], []
    for head in range(KV_HEADS):
        begin, size = head * widths[0].nbytes, widths[0].nbytes
        u, w = (unpack(x[:1, :, begin : begin + size], widths[:1])[:, 0].double() for x in (keys, values))
        logits = queries.projected[:1, head].double() @ u
        means.append(logits.softmax(-1) @ w.mT)
        total.append(logits.logsumexp(-1))
    right = torch.stack(means, 1)
    error = float((result - right).abs().amax() / right.abs().amax())
    lse_error = float((lse - torch.stack(total, 1)).abs().amax())
    if not (error < 2**-8 and lse_error < 2**-6):
        raise SystemExit(
            f"the kernel is wrong: relative error of the means {error:.2g}, error of log-sum-exp {lse_error:.2g}"
        )
    return error


def attention_rows(cases: list[tuple[int, int]], bits: list[str], repeats: int, waste: Tensor) -> list[tuple[str, ...]]:
    """Return a row of the table for every context, batch and width."""
    from eigencache.kernels.packed.triton.launch import attend

    rows = []
    for context, batch in cases:
        flash = flash_ms(context, batch, repeats, waste)
        for name in bits:
            widths = (WIDTHS[name],) * KV_HEADS
            data = torch.stack([packed(widths, batch, context // BLOCK) for _ in range(2)])
            most = WIDTHS[name].coefficients
            projected = torch.randn(batch, KV_HEADS, HEADS // KV_HEADS, most, device="cuda") * (2 / most**0.5)
            projected /= largest_integers(widths).cuda()[:, None]
            storage = PackedStorage([data[0]], [data[1]], (widths, widths))
            queries = AttentionQueries(projected, exact=False)
            error = error_against_float64(attend, storage, queries)
            run = partial(attend, storage, queries)
            kernel = milliseconds(run, repeats, waste)
            graph = milliseconds(captured(run), repeats, waste)
            copy = milliseconds(partial(torch.empty_like(data).copy_, data), repeats, waste)
            speed, limit = data.nbytes / graph / 1e6, 2 * data.nbytes / copy / 1e6
            times = (f"{x:.3f}" for x in (flash, kernel, graph))
            rates = (f"{flash / graph:.2f} x", f"{speed:,.0f}", f"{limit:,.0f}", f"{speed / limit:.0%}", f"{error:.1e}")
            rows.append((f"{context:,}", str(batch), name, *times, *rates))
    return rows


def flash_ms(context: int, batch: int, repeats: int, waste: Tensor) -> float:
    """Return the time of one step of PyTorch's flash attention over keys and values in bfloat16."""
    q = torch.randn(batch, HEADS, 1, DIM, dtype=torch.bfloat16, device="cuda")
    keys, values = torch.randn(2, batch, KV_HEADS, context, DIM, dtype=torch.bfloat16, device="cuda").unbind()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        run = partial(F.scaled_dot_product_attention, q, keys, values, enable_gqa=True)
        return milliseconds(run, repeats, waste)


def captured(work: Callable[[], object]) -> Callable[[], None]:
    """Return the launches of `work` as one CUDA graph, which needs no time on the host."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def encoding_rows(tokens: int, bits: list[str], repeats: int, waste: Tensor) -> list[tuple[str, ...]]:
    """Return a row of the table for every width; the integers are compared with float64 first."""
    from eigencache.kernels.packed.triton.encode import encode

    rows = []
    x = torch.randn(1, KV_HEADS, tokens, DIM, dtype=torch.bfloat16, device="cuda")
    for name in bits:
        widths = (WIDTHS[name],) * KV_HEADS
        largest = largest_integers(widths).cuda()
        encoder = torch.linalg.qr(torch.randn(KV_HEADS, DIM, DIM, device="cuda")).Q[:, : largest.shape[1]]
        encoder, mean = encoder * largest[..., None] / 8, torch.randn(KV_HEADS, DIM, device="cuda")
        some = x[:, :, : 16 * BLOCK]
        integers = unpack(encode(some, mean, encoder, widths), widths).int()
        y = (some.double() - mean[:, None]) @ encoder.double().mT + largest[:, None] / 2
        right = y.mT.round().clamp(min=torch.zeros_like(largest)[..., None], max=largest[..., None]).int()
        difference = (integers - right).abs()
        if difference.amax() > 1 or difference.float().mean() > 1e-3:
            raise SystemExit(
                f"encoding is wrong: {difference.float().mean():.2%} of the integers differ, by up to {difference.amax()}"
            )
        time = milliseconds(partial(encode, x, mean, encoder, widths), repeats, waste)
        rows.append(
            (f"{tokens:,}", name, f"{time:.3f}", f"{x.nbytes / time / 1e6:,.0f}", f"{difference.float().mean():.1e}")
        )
    return rows


def tile_rows(case: tuple[int, int], bits: str, repeats: int, waste: Tensor) -> list[tuple[str, ...]]:
    """Return a row for every tile of the kernels, for one case and width."""
    from eigencache.kernels.packed.triton import launch

    context, batch = case
    widths = (WIDTHS[bits],) * KV_HEADS
    keys, values = packed(widths, batch, context // BLOCK), packed(widths, batch, context // BLOCK)
    projected = torch.randn(batch, KV_HEADS, HEADS // KV_HEADS, WIDTHS[bits].coefficients, device="cuda") / 100
    storage, queries = PackedStorage([keys], [values], (widths, widths)), AttentionQueries(projected, exact=False)
    rows = []
    for paired, every in ((True, launch.PAIRED_TILES), (False, launch.TILES)):
        for tiles in every:
            for splits in (None, 8, 16, 32, 64):
                options = {"splits": splits, "tiles": tiles, "paired": paired}
                run = partial(launch.attend, storage, queries, **options)
                name = ("pairs" if paired else "halves", *map(str, tiles), str(splits))
                try:
                    time = milliseconds(captured(run), repeats, waste)
                except Exception as error:  # noqa: BLE001 - a tile that does not fit the GPU is a row of the table
                    rows.append((*name, type(error).__name__, ""))
                    continue
                rows.append((*name, f"{time:.3f}", f"{(keys.nbytes + values.nbytes) / time / 1e6:,.0f}"))
    return rows


def main() -> int:
    """Check the kernels, time them and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", default="4096x1,32768x16,131072x1", help="cases to time, as tokens x sequences; default: %(default)s"
    )
    parser.add_argument(
        "--bits", default=",".join(WIDTHS), help="bits per number, of " + ", ".join(WIDTHS) + "; default: all"
    )
    parser.add_argument("--tokens", type=int, default=131_072, help="tokens to encode; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=30, help="runs per measurement; default: %(default)s")
    parser.add_argument("--tiles", action="store_true", help="time every tile, for the last case and width")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device: this benchmark measures a GPU", file=sys.stderr)
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
        columns = ("Tokens", "Bits", "ms", "GB/s", "Integers that differ")
        console.print(Table("Encoding keys", columns, tuple(rows), notes=(note,)))
        if arguments.tiles:
            columns = ("Tiles", "Blocks", "Warps", "Stages", "Registers", "Splits", "ms", "GB/s")
            rows = tile_rows(cases[-1], bits[-1], arguments.repeats, waste)
            console.print(Table(f"Tiles, {cases[-1][0]:,} x {cases[-1][1]}, {bits[-1]} bits", columns, tuple(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
