"""One file a program; each runs in a process of its own, as `python -m benchmarks.peers.NAME SPEC.json`."""
