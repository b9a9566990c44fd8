"""One file per algorithm; `base.py` defines the contract."""
