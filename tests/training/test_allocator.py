"""Big blocks go back to the system when they are freed, also ones between blocks that stay."""

import platform
import subprocess
import sys

import pytest

from sarm.training import allocator

SCRIPT = """
import torch
from sarm.training.allocator import return_big_blocks

def resident():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS:")) / 1024

if {asked}:
    assert return_big_blocks()
torch.ones(2**20 * 31 // 4)  # glibc now takes blocks up to this size from its heap
blocks = [torch.ones(20 * 2**20 // 4) for _ in range(8)]
full = resident()
del blocks[:-1]
print(full - resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a function of glibc")
@pytest.mark.parametrize(("asked", "freed"), [(True, 140), (False, 0)])
def test_freed_blocks_leave_the_process(asked, freed):
    command = [sys.executable, "-c", SCRIPT.format(asked=asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(freed, abs=25)


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert not allocator.return_big_blocks()
