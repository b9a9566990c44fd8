"""Streamed perplexity against the plain full-model one."""

import math

import pytest
import torch
from support.engine import engine_of, through_layers
from support.families import FAMILIES, VOCAB_SIZE
from torch.nn.functional import cross_entropy

import nnprune.engine.logits
from nnprune.evaluation import Perplexity
from nnprune.model.decoder import Decoder


@torch.no_grad()
def plain_perplexity(model, ids):
    """The official evaluation: the mean over windows of each window's mean loss."""
    losses = [cross_entropy(model(row[None]).logits[0, :-1].float(), row[1:]) for row in ids]
    return math.exp(torch.stack(losses).double().mean())


def measured(engine, ids):
    with through_layers(engine, ids) as stream:
        return Perplexity("text", None, ids.shape[1]).measure(stream.ids, stream.logits())["text_perplexity"]


@pytest.mark.parametrize("family", ["opt", "opt_post_norm_projected", "llama", "gemma2", "gpt2", "bloom", "falcon"])
@pytest.mark.parametrize("runtime", [{"batch_tokens": 99}, {"activations": "disk"}])
def test_equals_the_full_models(family, runtime, tmp_path):
    model = FAMILIES[family]()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # so that predictions are far from uniform
    ids = torch.randint(VOCAB_SIZE, (7, 33), generator=torch.Generator().manual_seed(0))
    expected = plain_perplexity(model, ids)
    assert abs(expected - VOCAB_SIZE) > 1
    assert measured(engine_of(model, tmp_path, **runtime), ids) == pytest.approx(expected, rel=1e-5)


def test_bfloat16_is_within_its_rounding(tmp_path):
    model = FAMILIES["llama"]().to(torch.bfloat16)
    ids = torch.randint(VOCAB_SIZE, (4, 33), generator=torch.Generator().manual_seed(0))
    assert measured(engine_of(model, tmp_path), ids) == pytest.approx(plain_perplexity(model, ids), rel=5e-3)


def test_few_logits_live_at_a_time(tmp_path, monkeypatch):
    shapes = []
    logits = Decoder.logits

    def watched(self, ids, hidden):
        result = logits(self, ids, hidden)
        shapes.append(tuple(result.shape))
        return result

    monkeypatch.setattr(Decoder, "logits", watched)
    monkeypatch.setitem(nnprune.engine.logits.LOGITS, "cpu", 64 * VOCAB_SIZE)
    model, ids = FAMILIES["llama"](), torch.randint(VOCAB_SIZE, (3, 129), generator=torch.Generator().manual_seed(0))
    assert measured(engine_of(model, tmp_path), ids) == pytest.approx(plain_perplexity(model, ids), rel=1e-5)
    assert shapes == [(1, 64, VOCAB_SIZE), (1, 64, VOCAB_SIZE), (1, 1, VOCAB_SIZE)] * 3


def test_nan_logits_are_an_error(tmp_path):
    model = FAMILIES["llama"]()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"text perplexity: .*NaN.*model\.dtype"):
        measured(engine_of(model, tmp_path), torch.ones(1, 8, dtype=torch.int64))
