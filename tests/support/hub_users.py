"""Users of a hub: processes that read its settings when they start, forked from one that has imported what they need."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

from support.repositories import C4

PRELUDE = f"""
import datasets, json, nnprune.check, nnprune.run, os, pandas, sys, traceback, transformers
from nnprune.model.loading import ModelSource
from nnprune.texts import TextSource
from transformers import LlamaForCausalLM, OPTForCausalLM
def show(value): print(json.dumps(value), flush=True)
def tell(call):
    try: call()
    except ValueError as error: show(str(error))
def wikitext(split='test', key='evaluation.datasets.wikitext2', **more):
    return TextSource(key, dataset='Salesforce/wikitext', data_files=f'wikitext-2-raw-v1/{{split}}-*.parquet', **more)
def c4(file='{C4}', name='allenai/c4', **more):
    return TextSource('calibration', dataset=name, data_files=file, **more)
def model(path, **more):
    return ModelSource(path, **more)
replies = os.fdopen(os.dup(1), 'w')
for request in sys.stdin:
    code, output, environment = json.loads(request)
    if not (child := os.fork()):
        status = 1
        try:
            os.environ.update(environment)
            for number, path in ((1, output), (2, output + '.err')):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            exec(code, globals())
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=replies, flush=True)
os._exit(0)
"""


class Users:
    """Processes with one cache and one hub between them, which start with the settings of their environment and nothing else."""

    def __init__(self, url: str, folder: Path) -> None:
        self.cache, self._folder, self._parents = folder / "cache", folder, {}
        self._settings = {"HF_ENDPOINT": url, "HF_HOME": str(self.cache), "XDG_CACHE_HOME": str(folder / "own")}

    def run(self, code: str, *, offline: bool = False, **environment: str) -> list:
        """What a process prints, a JSON value a line: that of `show(VALUE)`, or the message of a ValueError of `tell(CALL)`."""
        output = self._folder / "output"
        parent = self._parent(offline)
        print(json.dumps([code, str(output), environment]), file=parent.stdin, flush=True)
        assert parent.stdout.readline() == "0\n", output.with_suffix(".err").read_text()[-3000:]
        return [json.loads(line) for line in output.read_text().splitlines()]

    def forget(self) -> None:
        """Start the next test from empty caches."""
        for path in (self.cache, self._folder / "own"):
            path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        for parent in self._parents.values():
            parent.stdin.close()
            parent.wait()

    def _parent(self, offline: bool) -> subprocess.Popen:
        if offline not in self._parents:
            plain = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
            own = {**self._settings, **({"HF_HUB_OFFLINE": "1"} if offline else {})}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            self._parents[offline] = subprocess.Popen([sys.executable, "-c", PRELUDE], env=plain | own, cwd=ROOT, **pipes)
        return self._parents[offline]
