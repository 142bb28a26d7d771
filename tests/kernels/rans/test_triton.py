"""The Triton decoder, on a GPU or in Triton's interpreter, gives the integers and the errors of the CPU."""

from collections.abc import Iterator
from dataclasses import replace
from os import environ

import numpy as np
import pytest
import torch

from eigencache.codec.base import EncodedBytes
from eigencache.codec.eigen.codec import EigenCodec, SinksAndWindow
from eigencache.codec.eigen.entropy_coder import RansCoder
from eigencache.codec.eigen.entropy_tables import MAX_HALF, EntropyTables, fit_tables
from eigencache.codec.eigen.quantizer import DeadZone
from eigencache.codec.eigen.transform import Prediction, Stage, StagedTransform
from eigencache.codec.layout import Layout, Part
from eigencache.errors import CodecError
from eigencache.kernels.rans.cpu import PRECISION, SLOTS
from rans_cases import GARBAGE, decoded_by_triton, keys_of_first_layer, random_tables
from triton_process import Run, triton_process

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="Triton is not installed: pip install 'eigencache[triton]'")


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    with triton_process() as call:
        yield call


@pytest.mark.parametrize("lanes", [1, 4, 8, 16, 32])
def test_blocks_come_back_and_nothing_else_is_written(run: Run, lanes: int) -> None:
    rng = np.random.default_rng(lanes)
    shifts, halves, starts = random_tables(rng, 3)
    tables = EntropyTables(np.array([2, 0, 1, 0], np.int32), shifts, halves, starts)
    tokens = [lanes + lanes // 2 + 1, lanes // 2 + 1]  # the last block is ragged
    blocks = [rng.laplace(scale=np.array([[0.3], [40], [2], [9]]), size=(4, n)).astype(np.int32) for n in tokens]
    blocks[0][:, -1] = [2**31 - 1, -(2**31), -1, 2**30]
    coder = RansCoder(tables, lanes)
    out = run(decoded_by_triton, [coder.encode(block) for block in blocks], tokens, tables, lanes)
    assert (shifts > 0).any()
    for got, block, count in zip(out, blocks, tokens, strict=True):
        assert (got[:, :count] == block).all()
        assert (got[:, count:] == GARBAGE).all()


def test_entries_of_the_widest_tables_fit_32_bits(run: Run) -> None:
    narrow = np.pad([0, 1, SLOTS - 2, SLOTS - 1, SLOTS], (0, 2 * MAX_HALF - 2), mode="edge")  # of 1, 4093, 1 and 1 slots
    wide = np.append(np.arange(2 * MAX_HALF + 2), SLOTS)  # one each, and 3841 for escapes
    halves, shifts = np.array([1, MAX_HALF], np.int32), np.array([0, PRECISION], np.int32)
    tables = EntropyTables(np.array([0, 1], np.int32), shifts, halves, np.array([narrow, wide], np.int32))
    largest = (MAX_HALF + 1 << PRECISION) - 1
    block = np.array([[0, 0, 1, -1, 2, 0], [largest, -largest, largest + 1, 0, 1, 2**31 - 1]], np.int32)
    out = run(decoded_by_triton, [RansCoder(tables, 4).encode(block)], [6], tables, 4)
    assert (out[0] == block).all()


@pytest.mark.parametrize("harm", ["cut", "short", "odd", "other", "state", "longer", "claim"])
def test_bytes_that_the_cpu_refuses_are_refused_in_the_same_words(run: Run, harm: str) -> None:
    rng = np.random.default_rng(5)
    block = rng.laplace(scale=3, size=(6, 11)).astype(np.int32)
    tables = fit_tables(block, np.zeros(6, int))
    data = RansCoder(tables, 4).encode(block)
    harmed = {
        "cut": data[:14],
        "short": data[:-4],
        "odd": data[:-1],
        "other": data[:20] + bytes(4) + data[24:],
        "state": bytes([data[0] ^ 1]) + data[1:],
        "longer": data + b"\0\0",
        "claim": data,
    }[harm]
    claimed = 4_000 if harm == "claim" else 11
    with pytest.raises(CodecError) as by_cpu:
        RansCoder(tables, 4).decode(harmed, claimed)
    with pytest.raises(CodecError) as by_triton:
        run(decoded_by_triton, [data, harmed], [11, claimed], tables, 4)
    assert harm != "claim" or "4000 tokens take more than" in str(by_cpu.value)
    assert str(by_triton.value) == str(by_cpu.value)


def small_codec() -> tuple[EigenCodec, EncodedBytes]:
    """Return a codec of one layer with one head of 4 numbers, and two encoded rows of 23 tokens in blocks of 8."""
    x = torch.randn(2, 23, 8, generator=torch.Generator().manual_seed(0))
    layout = Layout((Part(0, 0, (0, 1), 4), Part(0, 1, (0, 1), 4)), {})
    prediction = Prediction.of(torch.eye(4) / 4, torch.ones(4))
    stages = Stage.of(0, torch.eye(4), 2), Stage.of(4, torch.eye(4), 2, prediction)
    transform = StagedTransform(torch.zeros(8), stages)
    quantizer = DeadZone(*(torch.full((8,), number) for number in (0.6, 0.1, 0.05, 0.02)))
    tables = fit_tables(np.rint(x[0].T.numpy() / 0.1).astype(np.int32), np.arange(8) // 4)
    codec = EigenCodec("small", layout, transform, 0.1, quantizer, tables, 8, SinksAndWindow(2, 3, 16), 8, torch.float32)
    return codec, codec.encode({0: (x[:, None, :, :4], x[:, None, :, 4:])})


@pytest.mark.parametrize("tokens", [slice(None), slice(12, 19)])
def test_a_codec_decodes_the_same_with_either_backend(run: Run, tokens: slice) -> None:
    codec, encoded = small_codec()
    by_triton = run(keys_of_first_layer, replace(codec, backend="triton"), encoded, tokens)
    by_cpu = keys_of_first_layer(replace(codec, backend="cpu"), encoded, tokens)
    assert by_triton.shape[2] == len(range(23)[tokens])
    assert (by_triton == by_cpu).all()


@pytest.mark.skipif(environ.get("TRITON_INTERPRET") == "1", reason="what is interpreted is not compiled")
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_without_a_gpu_to_a_warp_that_needs_no_shared_memory(
    capability: int, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from eigencache.kernels.rans.triton import _decode

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = ("words", "spans", "specs", "slots", "out", "faults", "width", "stride", "LANES")
    kinds = ("*u16", "*i64", "*i64", "*u32", "*i32", "*i32", "i32", "i32", "constexpr")
    source = ASTSource(_decode, dict(zip(names, kinds, strict=True)), constexprs={(8,): 16})
    options = {"num_warps": 1, "enable_fp_fusion": False}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert "redux.sync" in kernel.asm["ptx"] and "popc.b32" in kernel.asm["ptx"]
    assert kernel.metadata.shared == 0 and "div." not in kernel.asm["ptx"]
