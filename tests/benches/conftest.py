"""benches/ holds scripts, not a package: its folder is on sys.path, as for `benches/run.py`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benches"))
