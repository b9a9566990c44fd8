"""Models and datasets of a hub: what is asked of it, what serves without it, and what each failure is told as.

The hub is on 127.0.0.1. Each of its users is a process of its own, of a parent that has its settings: the hub's library reads them
when imported.
"""

import gzip
import json
import shutil
import socket
from pathlib import Path

import pandas as pd
import pytest
from support.fakehub import Hub
from support.hub_users import Users
from support.repositories import C4, make_repositories

from nnprune.model.loading import ModelSource


@pytest.fixture(scope="session")
def repositories(tmp_path_factory) -> Path:
    return make_repositories(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def port():
    """A port that stays that of this module's hubs: a socket that does not listen holds it."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.fixture
def hub(repositories, tmp_path, port):
    """A hub whose repositories a test may change."""
    shutil.copytree(repositories, tmp_path / "hub")
    hub = Hub(tmp_path / "hub", port)
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def users(port, tmp_path_factory):
    users = Users(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("users"))
    yield users
    users.close()


@pytest.fixture
def user(hub, users) -> Users:
    users.forget()
    return users


TEXTS = "show([list(c4().documents()), wikitext().joined(), wikitext('train').joined()])\n"
TEXTS_READ = [
    ["a document"],
    "\n\n".join(["", " = test = \n", " some text \n"]),
    "\n\n".join(["", " = train = \n", " some text \n"]),
]


def test_texts_are_fetched_once_and_serve_without_the_hub(hub, user):
    assert user.run(TEXTS) == [TEXTS_READ]
    assert hub.counted() <= 12
    assert user.run(TEXTS * 3) == [TEXTS_READ] * 3
    assert hub.counted() == 2  # one a repository, however often it is read
    assert user.run(TEXTS, offline=True) == [TEXTS_READ]
    assert hub.counted() == 0
    hub.status = 503
    assert user.run(TEXTS) == [TEXTS_READ]
    hub.close()
    assert user.run(TEXTS) == [TEXTS_READ]


def test_the_hub_goes_down_within_a_process(hub, user):
    user.run("wikitext().documents()")
    hub.counted()
    code = "import urllib.request\nshow(wikitext().joined())\nwikitext('train').documents()\nshow(c4().commit)\n"
    shown = user.run(
        code + "from nnprune.files import hub\nhub._close()\nshow(wikitext('train').joined())\ntell(c4().documents)"
    )
    assert shown[0] == TEXTS_READ[1]
    assert shown[2] == TEXTS_READ[2]
    assert shown[3].startswith("calibration.dataset=allenai/c4: the hub at http://127.0.0.1")


def test_commits(hub, user):
    first = hub.commit("datasets", "Salesforce/wikitext")
    code = "show([wikitext().commit, c4().commit, TextSource('calibration', path='x.txt').commit])\n"
    assert user.run(code + "wikitext().documents()") == [[first, hub.commit("datasets", "allenai/c4"), None]]
    folder = hub.root / "datasets/Salesforce/wikitext/main/wikitext-2-raw-v1"
    pd.DataFrame({"text": ["newer"]}).to_parquet(folder / "test-00000-of-00001.parquet")
    second = hub.commit("datasets", "Salesforce/wikitext")
    assert first != second
    shown = user.run(f"show([wikitext().joined(), wikitext().commit])\nshow(wikitext(revision='{first}').joined())")
    assert shown == [["newer", second], TEXTS_READ[1]]
    assert user.run("show([wikitext().joined(), wikitext().commit])", offline=True) == [["newer", second]]


CELL = """
from hydra import compose, initialize_config_dir
from nnprune.run import CONF, run
brief = ["calibration.num_samples=2", "calibration.seq_len=8", "evaluation.seq_len=8", "outputs=" + OUTPUTS]
with initialize_config_dir(str(CONF), version_base="1.3"):
    cfg = compose("config", ["model=hub", "model.path=meta-llama/Llama", *brief, "pruner=" + PRUNER])
show(run(cfg).status)
"""


def test_cells_that_are_processes_of_their_own_ask_once(hub, user):
    with gzip.open(hub.root / "datasets/allenai/c4/main" / C4, "wt") as file:
        file.write(json.dumps({"text": "a longer document"}) + "\n")
    cell = CELL.replace("OUTPUTS", repr(str(user.cache / "outputs")))
    assert user.run(cell.replace("PRUNER", "'magnitude'")) == ["completed"]
    hub.counted()
    assert user.run(cell.replace("PRUNER", "'wanda'")) == ["completed"]
    asked = ["datasets/Salesforce/wikitext", "datasets/allenai/c4", "models/meta-llama/Llama"]
    assert sorted(line.split("/", 1)[1].split("?")[0] for line in hub.requests) == asked, "each repository once"
    assert user.run(cell.replace("PRUNER", "'ria'"), offline=True) == ["completed"]


def test_a_pinned_revision_asks_nothing_once_it_is_here(hub, user):
    shutil.copytree(hub.root / "datasets/allenai/c4/main", hub.root / "datasets/allenai/c4/v1")
    with gzip.open(hub.root / "datasets/allenai/c4/main" / C4, "wt") as file:
        file.write(json.dumps({"text": "another document"}) + "\n")
    commit = hub.commit("datasets", "allenai/c4", "v1")
    assert user.run("show([list(c4(revision='v1').documents()), c4(revision='v1').commit])") == [[["a document"], commit]]
    hub.counted()
    assert user.run(f"show(list(c4(revision='{commit}').documents()))") == [["a document"]]
    assert hub.counted() == 0


def test_a_renamed_repository(hub, user):
    hub.moved["wikitext/old"] = "Salesforce/wikitext"
    code = "show(TextSource('x', dataset='wikitext/old', data_files='wikitext-2-raw-v1/test-*.parquet').joined())"
    assert user.run(code) == [TEXTS_READ[1]]
    assert user.run(code, offline=True) == [TEXTS_READ[1]]


def test_what_goes_wrong_is_told_with_its_remedy(hub, user):
    hub.private.add("Salesforce/wikitext")
    hub.gated.add("allenai/c4")
    lines = user.run(
        "tell(wikitext().documents)\ntell(c4().documents)\ntell(c4(revision='v9').documents)\n"
        "tell(c4(name='no/where').documents)\ntell(model('meta-llama/Llama', revision='v9').config)"
    )
    private, gated, revision, missing, model = lines
    assert private.startswith("evaluation.datasets.wikitext2.dataset=Salesforce/wikitext: does not exist or is private")
    assert gated.startswith("calibration.dataset=allenai/c4: is gated; accept its licence at ")
    assert all("HF_TOKEN" in text for text in (private, gated, missing))
    assert revision.startswith("calibration.revision=v9: the dataset allenai/c4 has no such branch, tag or commit")
    assert missing.startswith("calibration.dataset=no/where: does not exist or is private")
    assert model.startswith("model.revision=v9: the model meta-llama/Llama has no such branch, tag or commit")
    assert all("\n" not in text for text in lines)
    assert user.run("show(list(c4().documents()))", HF_TOKEN="hf_ok") == [["a document"]]


def test_what_is_cached_does_not_pass_for_all_that_a_pattern_fits(hub, user):
    for part in range(2):
        with gzip.open(hub.root / f"datasets/allenai/c4/main/en/part-{part}.json.gz", "wt") as file:
            file.write(json.dumps({"text": f"part {part}"}))
    read, many = "show(list(c4(file='en/part-1.json.gz').documents()))", "c4(file='en/part-?.json.gz').documents"
    assert user.run(read) == [["part 1"]]
    for status, offline in ((None, True), (503, False)):
        hub.status = status
        (line,) = user.run(f"tell({many})", offline=offline)
        assert line.startswith(
            "calibration.data_files=en/part-?.json.gz: the cache may lack some of these files of the dataset"
        )
        assert "\n" not in line
    hub.status = None
    assert user.run(f"show(list({many}()))") == [["part 0", "part 1"]]
    assert user.run(f"show(list({many}()))", offline=True) == [["part 0", "part 1"]]


def test_missing_files_and_a_hub_that_is_away(hub, user):
    code = "tell(c4(file='en/none.json.gz').documents)\ntell(c4(file='en/none-*.json.gz').documents)"
    for line in user.run(code):
        assert line.startswith("calibration.data_files=en/none")
        assert "the dataset allenai/c4 has no such file" in line
    for message, offline in (
        ("HF_HUB_OFFLINE forbids", True),
        ("cannot be reached (it answers 503)", False),
    ):
        hub.status = 503
        (line,) = user.run("tell(wikitext().documents)", offline=offline)
        assert message in line
        assert "point evaluation.datasets.wikitext2.dataset at a local folder" in line
        assert "\n" not in line
    hub.close()
    (line,) = user.run("tell(wikitext().documents)")
    assert "cannot be reached" in line
    assert "Connection refused" in line


def test_a_cache_that_cannot_be_written(user):
    user.cache.touch()
    (line,) = user.run("tell(c4().documents)")
    assert line.startswith("calibration.dataset=allenai/c4: ")
    assert "\n" not in line


LOADED = (
    "one = model(PATH)\nskeleton = one.skeleton(one.config())\nloaded = one.load(one.config())\ntokenizer = one.tokenizer()\n"
    "show([one.commit, one.digest(), float(sum(p.double().sum() for p in loaded.parameters()))])\n"
)


@pytest.mark.parametrize("name", ["meta-llama/Llama", "facebook/opt"])
def test_models_are_fetched_once_and_serve_without_the_hub(hub, user, name):
    code = LOADED.replace("PATH", repr(name))
    folder = hub.root / "models" / name / "main"
    if name == "meta-llama/Llama":
        code += "state = one.checkpoint(skeleton).read(list(skeleton.state_dict()))\n"
        code += "show(float(sum(tensor.double().sum() for tensor in state.values())))\n"
    else:
        code += "tell(lambda: one.check(skeleton, 'disk'))\n"
    first = user.run(code)
    local = ModelSource(str(folder))
    total = float(sum(parameter.detach().double().sum() for parameter in local.load(local.config()).parameters()))
    assert first[0] == [hub.commit("models", name), None, total]
    if name == "meta-llama/Llama":
        assert first[1] == pytest.approx(total)
    else:
        assert first[1].startswith("runtime.layers=disk: facebook/opt has its weights in pytorch_model.bin")
    fetched = [line.split("/")[-1] for line in hub.requests if line.startswith("GET") and "/resolve/" in line]
    assert len(fetched) == len(set(fetched))
    assert not {"consolidated.safetensors", "model_ema.safetensors", "llama.gguf", "tf_model.h5"} & set(fetched)
    assert len([line for line in fetched if line.endswith((".bin", ".safetensors"))]) == len(local.files.weights())
    hub.counted()
    if name == "meta-llama/Llama":
        assert user.run(code) == first
        assert hub.counted() == 1
    hub.close()
    assert user.run(code, offline=True) == first


def test_weights_that_are_not_cached_are_not_said_to_be_missing_on_the_hub(hub, user):
    configs = (
        "model('facebook/opt').config()",  # as with plan=true
        "from huggingface_hub import hf_hub_download\nhf_hub_download('facebook/opt', 'config.json')",  # another program
    )
    for code in configs:
        user.forget()
        user.run(code)
        for offline, reason in ((True, "could not be read: it is not in the cache"), (False, "cannot be reached")):
            hub.status = 503
            (line,) = user.run("one = model('facebook/opt')\ntell(lambda: one.load(one.config()))", offline=offline)
            hub.status = None
            assert line.startswith("model.path=facebook/opt: ")
            assert reason in line


def test_a_saved_model_is_checked_against_the_commit_that_was_pruned(hub, user, tmp_path):
    commit, out = hub.commit("models", "facebook/opt"), tmp_path / "out"
    settings = ["calibration=random", "calibration.num_samples=2", "calibration.seq_len=16", "evaluation=none", "save=true"]
    user.run(
        "from nnprune import prune\nfrom nnprune.pruners.wanda import Wanda\n"
        f"prune(Wanda(), 'facebook/opt', '2:4', {[*settings, f'outputs={out}']})"
    )
    [saved] = out.rglob("model")
    assert f'base_model_revision: "{commit}"' in (saved / "README.md").read_text()
    check = (
        "import contextlib, io\nfrom nnprune.check import main\n"
        f"with contextlib.redirect_stdout(io.StringIO()) as told: status = main([{str(saved)!r}])\n"
        "show([status, told.getvalue()])"
    )
    hub.close()
    [[status, told]] = user.run(check)
    assert status == 0
    assert f"other tensors are those of facebook/opt at {commit}, bit for bit" in told
    user.forget()
    [[status, told]] = user.run(check)
    assert status == 0
    assert "left alone are not compared with the base model: model.path=facebook/opt: the hub" in told


def test_a_gated_model_and_one_whose_weights_were_replaced(hub, user):
    hub.gated.add("meta-llama/Llama")
    code = "one = model('meta-llama/Llama')\ntell(one.config)\nshow(one.commit)\n"
    gated, before = user.run(code)
    assert gated.startswith("model.path=meta-llama/Llama: is gated; accept its licence at ")
    hub.gated.clear()
    path = next((hub.root / "models/meta-llama/Llama/main").glob("model-00001*"))
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    (after,) = user.run(code)
    assert after == hub.commit("models", "meta-llama/Llama") != before
