"""Runs functions of distributed_jobs.py in several gloo processes on the CPU."""

import io
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch

for folder in (Path(__file__).parents[1] / "helpers", Path(__file__).parent):
    sys.path.insert(0, str(folder))

import distributed_jobs  # noqa: E402
import tiny_sarm  # noqa: E402

# a server that has imported the package once: its children start in milliseconds
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["sarm.training.end_to_end", "sarm.training.sae"])
LIMIT_S = 300


@pytest.fixture(scope="session")
def backbone_dir(tmp_path_factory):
    return tiny_sarm.save_backbone(tmp_path_factory.mktemp("distributed") / "backbone")


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """launch(job, size, *args): what job(*args) returns in each of `size` processes, by rank."""

    def run(job, size, *args):
        store = tmp_path_factory.mktemp("store") / "store"
        pipes, processes = [], []
        for rank in range(size):
            mine, theirs = PROCESSES.Pipe()
            process = PROCESSES.Process(
                target=distributed_jobs.run, args=(theirs, str(store), rank, size, job, args)
            )
            process.start()
            theirs.close()
            pipes.append(mine)
            processes.append(process)
        try:
            return [_result(pipe) for pipe in pipes]
        finally:
            for process in processes:
                process.kill()
                process.join()

    return run


def _result(pipe):
    if not pipe.poll(LIMIT_S):
        raise TimeoutError("a process did not answer")
    kind, value = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)  # our own
    if kind == "error":
        raise value
    return value
