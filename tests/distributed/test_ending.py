"""A process ends with its exit code, whatever its process group still does."""

import os
import subprocess
import sys

MEMBER = """
import atexit, sys
import torch, torch.distributed as dist
from sarm.cli import main

rank, store, command = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
atexit.register(print, "farewell")

@atexit.register
def work():
    for _ in range(20):
        dist.all_reduce(torch.ones(300_000), async_op=True)  # its thread alone holds the tensor

sys.argv = ["sarm", command]
main()
"""


def run(tmp_path, command):
    store = str(tmp_path / "store")
    members = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(rank), store, command],
            env=os.environ | {"WORLD_SIZE": "2", "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [member.communicate(timeout=300) for member in members]
    return [member.returncode for member in members], said


def test_what_threads_still_hold_aborts_nobody(tmp_path):
    """Without its own end most runs had a process killed by SIGABRT."""
    codes, said = run(tmp_path, "--help")
    assert codes == [0, 0], said
    for printed, _ in said:
        assert "train-rm" in printed
        assert printed.endswith("farewell\n")  # atexit has run, everything is flushed


def test_bad_input_is_exit_code_2(tmp_path):
    codes, said = run(tmp_path, "nonsense")
    assert codes == [2, 2], said
    assert all("No such command 'nonsense'" in errors for _, errors in said)
