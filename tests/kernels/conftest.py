"""These tests share modules that are commands or helpers: compiled, budgets, encoded_rows."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
sys.path.insert(0, str(Path(__file__).parent))
