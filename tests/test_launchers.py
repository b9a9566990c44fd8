"""Launchers that are not installed; and several processes on several GPUs, with stand-ins for CUDA: each computes on its own."""

import multiprocessing
from types import SimpleNamespace

import pytest
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from nnprune.files.gpus import own_gpu
from nnprune.runtime import Runtime

PROCESSES = multiprocessing.get_context("fork")
GPUS = "abcd"


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """`machine("ab", free=[...])`: what torch.cuda says in this process and those it starts, and nothing locked yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    own_gpu.cache_clear()

    def show(visible, free=None):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(visible))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible))
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=visible[index], total_memory=1 << 34)
        )
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (free[index], 80))

    show(GPUS)
    yield show
    own_gpu.cache_clear()


class Other:
    """Another process that computes until `end`."""

    def __init__(self, setting="auto"):
        self._ours, self._theirs = PROCESSES.Pipe()
        self._process = PROCESSES.Process(target=self._run, args=(setting,))
        self._process.start()

    def _run(self, setting):
        own_gpu.cache_clear()
        self._theirs.send(Runtime(device=setting).torch_device.index)
        self._theirs.recv()

    def gpu(self):
        assert self._ours.poll(60)
        return self._ours.recv()

    def end(self):
        self._process.kill()
        self._process.join()


@pytest.fixture
def start():
    """`start()`: another process, ended after the test."""
    others = []

    def one(setting="auto"):
        others.append(Other(setting))
        return others[-1]

    yield one
    for other in others:
        other.end()


def test_each_process_has_its_own_gpu_until_it_ends(start):
    assert start().gpu() == 0
    other = start("cuda")
    assert (other.gpu(), start().gpu()) == (1, 2)
    other.end()
    assert start().gpu() == 1
    assert Runtime().torch_device == Runtime().torch_device == torch.device("cuda", 3)


def test_processes_that_start_at_once_share_out_the_gpus(start):
    others = [start() for _ in range(4)]
    assert sorted(other.gpu() for other in others) == [0, 1, 2, 3]


def test_processes_that_see_different_gpus_do_not_take_the_same(machine, start):
    found = ""
    for visible in ("cd", "bc", "cba"):
        machine(visible)
        found += visible[start().gpu()]
    assert found == "cba"


def test_more_processes_than_gpus_share_them_evenly_and_say_so(machine, start, caplog):
    machine("abc", free=[10, 30, 20])
    assert [start().gpu() for _ in range(5)] == [0, 1, 2, 1, 2]
    assert Runtime().torch_device.index == 0
    assert caplog.messages == ["warning: all 3 GPUs are in use by other runs; sharing cuda:0"]


def test_what_is_chosen_already_is_not_locked(machine, monkeypatch, tmp_path):
    assert Runtime(device="cuda:1").torch_device.index == 1
    assert Runtime(device="cpu").torch_device.type == "cpu"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert Runtime().torch_device.index == 2
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    machine("a")
    assert Runtime().torch_device == torch.device("cuda")
    machine("")
    assert Runtime().torch_device == torch.device("cpu")
    assert not list(tmp_path.iterdir())


def test_without_a_folder_for_locks_runs_go_on(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert Runtime().torch_device.index == 0
    assert "set runtime.device=cuda:N for each run" in caplog.text


def test_a_run_works_on_its_device_alone(start, monkeypatch):
    """Else pinned memory takes some of GPU 0, and the peaks of the device are not reset."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("empty_cache", "reset_peak_memory_stats", "set_per_process_memory_fraction"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    assert start().gpu() == 0
    Runtime().start(seed=0)
    Runtime(device="cuda:3").start(seed=0)
    assert chosen == [1, 3]


@pytest.mark.parametrize(
    ("launcher", "node", "extra"), [("slurm", "submitit_slurm", "slurm"), ("joblib", "joblib", "parallel")]
)
def test_a_launcher_that_is_not_installed_says_what_brings_it(launcher, node, extra, call_main, monkeypatch):
    Plugins.instance()  # which registers those that are
    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["launcher"], f"{node}.yaml", raising=False)
    status, message = call_main("-m", f"hydra/launcher={launcher}", "seed=0,1")
    assert (status, message) == (1, f"Error: hydra/launcher={node}: is not installed; pip install 'nnprune[{extra}]'")
