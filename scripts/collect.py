"""Runs the collector of this checkout, installed or not. See `python scripts/collect.py --help` and nnprune/collect.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

try:
    from nnprune.collect import main
except ModuleNotFoundError as error:
    sys.exit(f"collect.py: {error.name} is missing; pip install {error.name}")

if __name__ == "__main__":
    sys.exit(main())
