"""What layers are tuned on, and tuning when the device runs out of memory."""

import logging

import pytest
import torch
from support.engine import IDS, engine_of, prune, prune_model, recover
from support.families import FAMILIES

from nnprune.method import Method
from nnprune.patterns import NM
from nnprune.pruners.magnitude import Magnitude
from nnprune.pruners.wanda import Wanda
from nnprune.recovery import Reconstruction, reconstruction
from nnprune.recovery.tuning import LOWER, Tuning


def tune(folder, monkeypatch, most, with_gradients=True):
    """A tuned model; losses of more than `most` rows, with gradients or held out, run out of memory."""
    loss = reconstruction._loss

    def limited(*args):
        rows = args[-1]
        if torch.is_grad_enabled() == with_gradients and len(rows) > most:
            raise torch.OutOfMemoryError
        return loss(*args)

    monkeypatch.setattr(reconstruction, "_loss", limited)
    recovery = Reconstruction(0, 2, lr=1e-2, batch_tokens=32, holdout=0.4)
    return prune_model(folder, method=Method(Wanda(), recovery=recovery))[0].state_dict()


def test_copies_are_of_the_sequences_that_are_not_held_out_with_tokens_of_these():
    tuning = Tuning(lr=0.01, batch_tokens=16, holdout=0.2, num_copies=3, replaced=0.3)
    ids = torch.randint(50, (10, 500), generator=torch.Generator().manual_seed(1))
    ids[:8, :2] = torch.tensor([100, 101])  # occurs in them alone
    ids[8:] += 200
    rows = tuning.with_copies(ids)
    assert rows.shape == (40, 500)
    assert torch.equal(rows[:10], ids)
    assert tuning.num_held(10) == 2
    copies, sources = rows[10:], ids[torch.arange(30) % 8]
    is_replaced = copies != sources
    assert float(is_replaced.float().mean()) == pytest.approx(0.3 * 51 / 52, abs=0.015)
    assert set(copies.unique().tolist()) == set(ids[:8].unique().tolist())
    by_token = torch.bincount(copies[is_replaced]).tolist()
    assert by_token[100] == pytest.approx(sum(by_token[:50]) / 50, rel=0.4)  # rare ones are as likely as others
    assert torch.equal(tuning.with_copies(ids), rows)


def test_what_is_held_out_has_no_part_in_the_tuning(tmp_path):
    """The tuned weights do not depend on it, but for the epoch that is kept."""
    found = []
    for held in (IDS[4:], IDS[4:].flip(1)):
        recovery = Reconstruction(0, 1, lr=1e-3, batch_tokens=16, holdout=0.2, num_copies=1)
        engine = engine_of(FAMILIES["llama"](), tmp_path / str(len(found)))
        plan = dict.fromkeys(engine.decoder.shapes(), NM(2, 4))
        report = prune(engine, Method(Magnitude(), recovery=recovery), plan, torch.cat([IDS[:4], held]))[0]
        assert report["recovered"]["after"]["epoch"] == 1
        found.append(engine.decoder.layers[0].mlp.up_proj.weight)
    assert torch.equal(*found)


@pytest.mark.parametrize("with_gradients", [True, False])
def test_out_of_memory_a_batch_is_tuned_on_in_pieces(with_gradients, tmp_path, monkeypatch, caplog):
    wanted = tune(tmp_path / "a", monkeypatch, 2, with_gradients)
    assert not any("pieces" in message for message in caplog.messages)
    with caplog.at_level(logging.WARNING):
        found = tune(tmp_path / "b", monkeypatch, 1, with_gradients)
    assert any("tuning goes on with a batch in 2 pieces" in message for message in caplog.messages)
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-5)


def test_one_row_for_which_there_is_no_memory_ends_the_run(tmp_path, monkeypatch):
    with pytest.raises(torch.OutOfMemoryError):
        tune(tmp_path, monkeypatch, 0)


def test_a_loss_that_is_not_finite_is_told_and_leaves_the_weights(tmp_path, monkeypatch, caplog):
    wanted = prune_model(tmp_path / "a", method=Wanda())[0].state_dict()
    monkeypatch.setattr(reconstruction, "_loss", lambda *args: torch.tensor(float("nan"), requires_grad=True))
    with caplog.at_level(logging.WARNING):
        model, reports = prune_model(tmp_path / "b", method=Method(Wanda(), recovery=recover(0, 2)))
    assert any("not finite" in message for message in caplog.messages)
    assert {report["recovered"]["after"]["epoch"] for report in reports} == {0}
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, wanted[name])


def test_a_rate_that_is_too_high_is_lowered_after_one_epoch(tmp_path, caplog):
    """The second attempt is what the first one would have been at that rate."""
    found = []
    for lr in (0.2, LOWER * 0.2):
        with caplog.at_level(logging.DEBUG, "nnprune.recovery.tuning"):
            model, reports = prune_model(tmp_path / str(lr), method=Method(Wanda(), recovery=recover(0, 2, lr=lr)))
        found.append((model.model.layers[0].mlp.up_proj.weight, reports[0]["recovered"]["after"]))
    (weight, second), (wanted, first) = found
    assert (second.pop("attempts"), first.pop("attempts")) == (2, 1)
    assert second == first and first["epoch"] > 0
    assert torch.equal(weight, wanted)
    epochs = [message.split(":")[0] for message in caplog.messages if message.startswith("rate ")]
    assert epochs[:3] == ["rate 0.2, epoch 1 of 2", "rate 0.06, epoch 1 of 2", "rate 0.06, epoch 2 of 2"]
