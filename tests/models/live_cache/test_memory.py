"""The process and the GPU allocator grow by the bytes that a compressed cache reports."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

GROWN = """
import gc, os, sys
import torch
sys.path[:0] = {paths!r}
from live_codecs import random_layer

def held():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

layer = random_layer(heads=8, dim=128)
x = lambda: torch.zeros(1, 8, 4096, 128)
def add():
    layer.update(x(), x())
    layer.compact()
add()
before, said = held(), layer.nbytes
for _ in range(16):
    add()
print(held() - before, layer.nbytes - said)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_the_process_grows_by_the_bytes_that_are_said() -> None:
    code = textwrap.dedent(GROWN.format(paths=[path for path in sys.path if path]))
    env = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=env)
    assert run.returncode == 0, run.stderr
    grown, said = map(int, run.stdout.split())
    assert said == 16 * 4096 * 8 * 128 * 2 * 4 // 8  # tokens, numbers of both slots, 4 bits each
    assert said <= grown * 1.02 and grown <= 1.25 * said


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_allocator_gave_the_bytes_that_are_said() -> None:
    from live_codecs import random_layer

    layer = random_layer(heads=8, dim=128)
    x = torch.zeros(1, 8, 4096, 128, device="cuda")
    layer.update(x, x)
    layer.compact()
    before, said = torch.cuda.memory_allocated(), layer.nbytes
    layer.update(x, x)
    layer.compact()
    assert torch.cuda.memory_allocated() - before == pytest.approx(layer.nbytes - said, rel=0.01)
