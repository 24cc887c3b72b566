"""The Triton kernel without a GPU: its numbers in the interpreter, its code for every target."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

HERE = Path(__file__).parent


def test_in_the_interpreter():
    # A process of its own: TRITON_INTERPRET must be set before Triton is imported.
    env = {k: v for k, v in os.environ.items() if not k.startswith("SARM_")}
    # No configuration and no cache: this is not a part of the suite that runs it.
    pytest_arguments = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(HERE)]
    file = str(HERE / "interpreted_sparse_value.py")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *pytest_arguments, file],
        env={**env, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\d{2} passed", result.stdout), result.stdout


@pytest.mark.skipif(os.getenv("TRITON_INTERPRET") == "1", reason="Triton is interpreting")
@pytest.mark.parametrize("weight", ["fp32", "bf16"])
@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_compiles_without_spills(capability, weight, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sarm.kernels import sparse_value as module

    block_n, block_k = module.block_sizes(192)
    source = ASTSource(
        module.sparse_value_kernel,
        signature={
            "vals_ptr": "*fp32",
            "idx_ptr": "*i64",
            "w_ptr": f"*{weight}",
            "out_ptr": "*fp32",
            **dict.fromkeys("NKLP", "i32"),
            "BLOCK_N": "constexpr",
            "BLOCK_K": "constexpr",
        },
        constexprs={"BLOCK_N": block_n, "BLOCK_K": block_k},
        attrs={(i,): [["tt.divisibility", 16]] for i in range(4)},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": module.NUM_WARPS})
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run(
        [tool, "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    assert found.keys() == {"REG", "STACK", "LOCAL"}, usage
    assert found["STACK"] == found["LOCAL"] == "0", usage  # spills would live there
    assert int(found["REG"]) <= 96, usage  # at least five blocks of 128 threads per SM
