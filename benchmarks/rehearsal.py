"""Rehearses a whole table of docs/reproduce.md: all its runs with tiny models on a hub on 127.0.0.1, killed twice on the way.

    python -m benchmarks.rehearsal [opt_table|llama_table]

Takes a few minutes. Prints the table, and exits with 1 if a record is missing, incomplete or was made twice.
"""

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.reproduce import ROOT  # puts the helpers of the tests on the path

from support.fakehub import Hub  # isort: skip
from support.rehearsal import make_tables_hub, models_of, record_paths, run_table  # isort: skip

KILLED_AT = (9, 33)  # records


def main() -> int:
    experiment = sys.argv[1] if len(sys.argv) > 1 else "opt_table"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hub = Hub(make_tables_hub(folder / "hub", models_of(experiment)))
        times: dict[Path, int] = {}
        for kill_after in (*KILLED_AT, None):
            done = run_table(hub, folder, f"experiment={experiment}", kill_after=kill_after)
            paths = record_paths(folder)
            print(f"exit status {done.returncode}, {len(paths)} records")
            if any(path.stat().st_mtime_ns != time for path, time in times.items()):
                sys.exit("a finished record was written again")
            times = {path: path.stat().st_mtime_ns for path in paths}
        hub.close()
        records = [json.loads(path.read_text()) for path in paths]
        cells = Counter((record["model"], record["pruner"], record["sparsity"]) for record in records)
        num_pruned = sum(sparsity != "dense" for _, _, sparsity in cells)
        complete = all(record["status"] == "completed" and record["metrics"]["wikitext2_perplexity"] for record in records)
        print(f"{num_pruned} pruned, {len(cells) - num_pruned} dense")
        sys.path.insert(0, str(ROOT))
        from nnprune.collect import main as collect

        collect(["--records", str(folder / "outputs"), "--metric", "wikitext2_perplexity"])
        is_whole = done.returncode == 0 and complete and set(cells.values()) == {1} and (num_pruned, len(cells)) == (54, 60)
        return 0 if is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
