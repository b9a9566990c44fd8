"""The programs that are compared: whether each can run here, and one run of one of them in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from benchmarks.peers.common import Result, Spec, result_path

ROOT = Path(__file__).resolve().parent.parent
LOG_LINES = 3
"""Last lines of a failed program's output that its error repeats."""


class ProgramFailed(Exception):
    """A program ended without a result; the message says how."""


@dataclass
class Program:
    """One program.

    Args:
        name: as in the table, and with an underscore for each dash the module under benchmarks/peers.
        python: the interpreter that runs it.
        options: settings of it alone.
        missing: why it cannot run here; None if it can.
    """

    name: str
    python: str = sys.executable
    options: dict[str, Any] = field(default_factory=dict)
    missing: str | None = None

    def run(self, spec: Spec, tag: str, timeout: float | None = None) -> tuple[Result, float]:
        """Run it as `spec` says, with files named after `tag`; returns its result and the seconds its process lived.

        Raises ProgramFailed, also when it takes longer than `timeout` seconds.
        """
        path = Path(spec.scratch) / f"{self.name}-{tag}.json"
        log = path.with_suffix(".log")
        spec = replace(spec, scratch=str(path.with_suffix("")), options=self.options)
        shutil.rmtree(spec.scratch, ignore_errors=True)  # of an earlier benchmark
        Path(spec.scratch).mkdir(parents=True)
        path.write_text(json.dumps(asdict(spec), indent=1), encoding="utf-8")
        result_path(path).unlink(missing_ok=True)
        threads = {"OMP_NUM_THREADS": str(spec.threads)} if spec.threads else {}
        module = f"benchmarks.peers.{self.name.replace('-', '_')}"
        start = time.perf_counter()
        with log.open("w", encoding="utf-8") as output:
            try:
                process = subprocess.run(
                    [self.python, "-m", module, str(path)],
                    cwd=ROOT,
                    env={**os.environ, "TOKENIZERS_PARALLELISM": "false", **threads},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    check=False,
                    timeout=timeout,
                )
            except subprocess.TimeoutExpired:
                raise ProgramFailed(f"{self.name} was stopped after {timeout:.0f} s") from None
        seconds = time.perf_counter() - start
        if process.returncode or not result_path(path).exists():
            lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            said = " / ".join(lines[-LOG_LINES:])
            raise ProgramFailed(f"{self.name} ended with status {process.returncode}: {said}")
        return Result(**json.loads(result_path(path).read_text(encoding="utf-8"))), seconds


def nnprune(overrides: list[str]) -> Program:
    """nnprune from this checkout, with further settings of its own."""
    return Program("nnprune", options={"overrides": overrides})


def official() -> Program:
    """The authors' loop, written plainly."""
    return Program("official")


def llmcompressor(python: str | None) -> Program:
    """llm-compressor in the environment of the interpreter `python`; None: this one's."""
    python = os.path.abspath(python) if python and os.sep in python else python  # it is started in other folders
    program = Program("llmcompressor", python or sys.executable)
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('llmcompressor') is None)"
    try:
        found = subprocess.run([program.python, "-c", find], cwd=os.sep, check=False).returncode == 0
    except OSError as error:
        program.missing = f"{program.python}: {error.strerror}"
        return program
    if not found:
        program.missing = f"not installed for {program.python}; give --llmcompressor-python an interpreter that has it"
    return program


def nn_pruning(checkout: str | None, model: str) -> Program:
    """The nn-pruning toolkit in the folder `checkout`, which prunes OPT models only."""
    program = Program("nn-pruning")
    if checkout is None:
        program.missing = "no checkout of it; give --nn-pruning a folder"
    elif not (Path(checkout) / "pruning.py").is_file():
        program.missing = f"{checkout} holds no pruning.py"
    elif (kind := AutoConfig.from_pretrained(model).model_type) != "opt":
        program.missing = f"it prunes OPT models only, and this is {kind}"
    else:
        program.options["checkout"] = str(Path(checkout).resolve())
    return program
