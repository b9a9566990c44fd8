"""`push=ORG/NAME`: a saved model becomes a repository that loads, and what would stop it is told before anything is computed."""

import pytest
from huggingface_hub import HfApi, constants
from support.fakehub import Hub
from transformers import AutoModelForCausalLM

from nnprune.model import push
from nnprune.run import run

SETTINGS = ("pruner=magnitude",)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on 127.0.0.1, and a user with a token and an empty cache."""
    (tmp_path / "hub" / "models").mkdir(parents=True)
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    push._whoami.cache_clear()
    yield hub
    hub.close()


def refused(name: str, is_private: bool = True) -> str:
    """The line that stops a push."""
    push._whoami.cache_clear()
    with pytest.raises(ValueError, match=f"^push={name}: ") as caught:
        push.check_destination(name, is_private, "f" * 12, overwrite=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_is_pushed_with_its_card_and_loads(hub, tiny_config, tmp_path, caplog):
    caplog.set_level("INFO")
    cfg = tiny_config(*SETTINGS, "sparsity=2:4", "push=alice/tiny-${sparsity}")
    run(cfg)
    pushed, name = hub.root / "models/alice/tiny-2of4/main", "alice/tiny-2of4"
    [saved] = tmp_path.glob("outputs/tiny-opt/2of4/*/model")
    assert {path.name: path.read_bytes() for path in pushed.iterdir()} == {p.name: p.read_bytes() for p in saved.iterdir()}
    assert name in hub.private
    assert f'AutoModelForCausalLM.from_pretrained("{name}")' in (pushed / "README.md").read_text()
    weight = AutoModelForCausalLM.from_pretrained(HfApi().snapshot_download(name)).model.decoder.layers[0].fc1.weight
    assert weight.unflatten(1, (-1, 4)).count_nonzero(-1).max() <= 2

    (pushed / "config.json").unlink()  # as if the upload had been interrupted
    run(cfg)
    assert (pushed / "config.json").exists()
    assert "finished already, nothing to do" in caplog.text


def test_another_models_repository_is_left_alone_unless_overwritten(hub, tiny_config, tmp_path):
    run(tiny_config(*SETTINGS, "sparsity=2:4", "push=alice/model"))
    pushed = hub.root / "models/alice/model/main/pruning.json"
    first = pushed.read_text()
    for name in ("chat_template.jinja", "pytorch_model.bin", "modeling_old.py", "NOTICE"):
        (pushed.parent / name).write_text("of the first model")
    other = (*SETTINGS, "sparsity=4:8", "push=alice/model")
    with pytest.raises(ValueError, match="holds another model; choose another name, or replace it with overwrite=true"):
        run(tiny_config(*other))
    assert pushed.read_text() == first
    assert not list(tmp_path.glob("outputs/tiny-opt/4of8/*/model"))
    run(tiny_config(*other, "overwrite=true"))
    assert '"sparsity": "4:8"' in pushed.read_text()
    assert {path.name for path in pushed.parent.iterdir() if path.read_bytes() == b"of the first model"} == {"NOTICE"}


def test_a_repository_made_by_hand_is_taken_if_it_is_as_private_as_asked(hub):
    (hub.root / "models/alice/empty/main").mkdir(parents=True)
    (hub.root / "models/alice/empty/main/README.md").write_text("to come")
    assert "exists and is public; set push_private=false" in refused("alice/empty")
    push.check_destination("alice/empty", False, "f" * 12, overwrite=False)
    hub.private.add("alice/empty")
    push.check_destination("alice/empty", True, "f" * 12, overwrite=False)


def test_names_and_owners_are_checked(hub):
    hub.user["orgs"] = [{"name": "team", "roleInOrg": "write"}, {"name": "press", "roleInOrg": "read"}]
    assert "must name an owner and a model; write push=ORG/NAME" in refused("model")
    assert "is no name of a repository" in refused("alice/two words")
    assert "alice may not write to bob; write to alice or team, or log in with" in refused("bob/model")
    assert "alice may not write to press; write to alice or team" in refused("press/model")
    assert not list((hub.root / "models").iterdir())


def test_login_permission_and_a_hub_that_is_away_are_told_apart(hub, monkeypatch):
    hub.is_closed = True
    assert "the token may not write there" in refused("alice/model")
    hub.user["auth"] = {"accessToken": {"role": "read"}}
    assert f"the token may only read; make one that may write at {hub.url}/settings/tokens" in refused("alice/model")
    hub.status = 503
    assert "cannot be reached" in refused("alice/model")
    hub.status = 401
    assert "the hub refuses the token; log in with `hf auth login`" in refused("alice/model")
    hub.status = None
    monkeypatch.setenv("HF_TOKEN", "")
    assert "you are not logged in to the hub; log in with `hf auth login`" in refused("alice/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids to ask the hub" in refused("alice/model")


def test_a_hub_that_is_down_is_told_before_the_run(hub):
    hub.close()
    assert "cannot be reached" in refused("alice/model")
