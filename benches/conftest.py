"""The benchmarks are scripts: their folder is on sys.path, as `python benches/run.py` has it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
