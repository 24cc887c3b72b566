"""The harness programs, each built once a session, and the tools they are built with."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "cuda_emulator"))

import emulator_build


@pytest.fixture(scope="session")
def harness(tmp_path_factory):
    """harness("address" | "thread" | "none"): the program built with that sanitizer."""

    def get(sanitizer):
        if (reason := emulator_build.missing()) is not None:
            pytest.skip(reason)
        if sanitizer not in built:
            folder = tmp_path_factory.mktemp(f"harness-{sanitizer}")
            built[sanitizer] = emulator_build.Harness(folder, sanitizer)
        return built[sanitizer]

    built = {}
    return get
