"""One file an algorithm; `base.py` is the contract."""
