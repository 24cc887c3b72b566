"""Every CUDA kernel compiled by nvcc for every target: no spills, and the stated occupancy."""

import shutil

import pytest
import resources

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="nvcc is not on the PATH (CUDA toolkit)"
)


@pytest.fixture(scope="module")
def usage(tmp_path_factory):
    return resources.compile_all(tmp_path_factory.mktemp("nvcc"))


def test_every_kernel_for_every_target(usage):
    found = {(one.kernel, one.variant, one.capability) for one in usage}
    kernels = {one.kernel for one in usage}
    assert kernels == {name.partition(",")[0] for name in resources.BUDGETS}
    instances = {(kernel, variant) for kernel, variant, _ in found}
    assert found == {(*instance, c) for instance in instances for c in resources.TARGETS}
    assert len(instances) >= 40  # dtypes x alignments


def test_nothing_spills(usage):
    spilling = [one for one in usage if one.spills or one.stack]
    assert not spilling, spilling


def test_occupancy_and_shared_memory(usage):
    for one in usage:
        assert one.occupancy >= one.budget.occupancy, one
        # None opts in to more: both must fit together.
        assert one.shared <= resources.STATIC_SHARED, one


def test_table_prints_every_instance(usage):
    text = resources.table(usage)
    assert all(f"{one.kernel}{one.variant} " in text for one in usage)
    assert text.endswith(f"spilled bytes over all {len(usage)} instances: 0")
