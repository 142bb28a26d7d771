"""Decoding entropy-coded blocks on a GPU, in GB/s of the 16-bit cache that they represent, against the copy bandwidth.

    python benchmarks/rans_gpu.py [--tokens 8192 16384 32768 65536] [--lanes 16] [--repeats 20]

The blocks have 128 tokens of a cache like that of Llama 3 8B: 65,536 numbers per token, of which 6 % are coded coefficients
of about 1.2 bits. 16 different blocks are repeated. `Kernel`: words and tables are on the GPU, integers are written there.
`All`: from bytes in memory to checked integers on the GPU. `Copy`: the 16-bit cache is copied within the GPU. Times are the
fastest of all repeats.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console

from eigencache.codec.eigen.entropy_coder import RansCoder
from eigencache.codec.eigen.entropy_tables import EntropyTables, fit_tables
from eigencache.errors import CodecError
from eigencache.kernels.rans.backend import choose_backend
from eigencache.report.core.table import Table

NUMBERS, COEFFICIENTS, BLOCK, DIFFERENT, CLASSES = 65_536, 3_932, 128, 16, 40
SCALES = np.geomspace(3, 0.02, COEFFICIENTS)  # of Laplace distributions, in quantization steps


def coded_blocks(lanes: int) -> tuple[EntropyTables, list[bytes]]:
    """Return tables and `DIFFERENT` encoded blocks."""
    rng = np.random.default_rng(0)
    symbols = np.rint(rng.laplace(size=(COEFFICIENTS, DIFFERENT * BLOCK)) * SCALES[:, None]).astype(np.int32)
    tables = fit_tables(symbols, np.arange(COEFFICIENTS) * CLASSES // COEFFICIENTS)
    coder = RansCoder(tables, lanes)
    return tables, [coder.encode(symbols[:, at : at + BLOCK]) for at in range(0, DIFFERENT * BLOCK, BLOCK)]


def fastest(work: Callable[[], object], repeats: int) -> float:
    """Return the shortest time in seconds by the GPU's clock, the host's work included, after one run to warm up."""
    work()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times)


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8_192, 16_384, 32_768, 65_536], help="context lengths")
    parser.add_argument("--lanes", type=int, default=16, help="states of a block; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=20, help="runs per measurement; default: %(default)s")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device: this benchmark measures a GPU")
    device = torch.device("cuda")
    try:
        choose_backend("triton", device)
    except CodecError as error:
        parser.error(str(error))
    from eigencache.kernels.rans.triton import decode_blocks, launch, upload_blocks

    tables, different = coded_blocks(args.lanes)
    bits = 8 * sum(map(len, different)) / (DIFFERENT * BLOCK * COEFFICIENTS)
    rows = []
    for tokens in args.tokens:
        count = tokens // BLOCK
        sections = [different[i % DIFFERENT] for i in range(count)]
        lengths = [BLOCK] * count
        words, spans = upload_blocks(sections, lengths, args.lanes, device)
        out = torch.empty(count, COEFFICIENTS, BLOCK, dtype=torch.int32, device=device)
        kernel = fastest(lambda: launch(words, spans, tables, args.lanes, out), args.repeats)  # noqa: B023
        whole = fastest(lambda: decode_blocks(sections, lengths, tables, args.lanes, device, out), args.repeats)  # noqa: B023
        cache = torch.empty(count * BLOCK, NUMBERS, dtype=torch.bfloat16, device=device)
        other = torch.empty_like(cache)
        copy = fastest(lambda: other.copy_(cache), args.repeats)  # noqa: B023
        gigabytes = cache.nbytes / 1e9
        speeds = (f"{gigabytes / seconds:,.0f}" for seconds in (kernel, whole, copy))
        rows.append((f"{tokens:,}", f"{count:,}", f"{1e3 * kernel:.2f}", *speeds, f"{copy / kernel:.2f}"))
    columns = ("Tokens", "Blocks", "Kernel ms", "Kernel GB/s", "All GB/s", "Copy GB/s", "Kernel over copy")
    note = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.lanes} lanes, {bits:.2f} bits a coefficient"
    Console().print(Table("Decoding on a GPU", columns, tuple(rows), notes=(note,)))


if __name__ == "__main__":
    main()
