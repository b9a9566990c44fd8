"""Tuning when the device runs out of memory."""

import logging

import pytest
import torch
from support.engine import prune_model, recover

from nnprune.method import Method
from nnprune.pruners.wanda import Wanda
from nnprune.recovery import reconstruction


def tune(folder, monkeypatch, most):
    """A tuned model; losses with gradients of more than `most` rows run out of memory."""
    loss = reconstruction._loss

    def limited(run, inputs, targets, layer, rows):
        if torch.is_grad_enabled() and len(rows) > most:
            raise torch.OutOfMemoryError
        return loss(run, inputs, targets, layer, rows)

    monkeypatch.setattr(reconstruction, "_loss", limited)
    return prune_model(folder, method=Method(Wanda(), recovery=recover(0, 2)))[0].state_dict()


def test_out_of_memory_a_batch_is_tuned_on_in_pieces(tmp_path, monkeypatch, caplog):
    wanted = tune(tmp_path / "a", monkeypatch, 2)
    assert not any("pieces" in message for message in caplog.messages)
    with caplog.at_level(logging.WARNING):
        found = tune(tmp_path / "b", monkeypatch, 1)
    assert any("tuning goes on with a batch in 2 pieces" in message for message in caplog.messages)
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-5)


def test_one_row_for_which_there_is_no_memory_ends_the_run(tmp_path, monkeypatch):
    with pytest.raises(torch.OutOfMemoryError):
        tune(tmp_path, monkeypatch, 0)
