"""Device memory: the arithmetic against measured peaks, and what is chosen where it is short."""

import pytest
import torch
import transformers
from conftest import compose_config
from support.engine import engine_of
from support.memory import peak_bytes

from nnprune.engine.memory import Workload, fit_device, groups_of
from nnprune.engine.pruning_pass import PruneTask, PruningPass
from nnprune.experiment.build import build
from nnprune.experiment.job import Job
from nnprune.kernels import library
from nnprune.patterns import parse_pattern
from nnprune.runtime import Runtime

GIB = 1 << 30
SEQ_LEN = 64


@pytest.fixture
def engine(tmp_path):
    """Llama-3-8B's proportions at a sixteenth of its width."""
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 896, "num_attention_heads": 4, "num_key_value_heads": 1}
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=1, pad_token_id=0, **shape)
    library.enable(False)
    yield engine_of(transformers.AutoModelForCausalLM.from_config(config).eval(), tmp_path, batch_tokens=256)
    library.enable(True)


def load_of(engine, method, propagate, tokens):
    shapes = engine.decoder.shapes_by_layer()[0]
    return Workload(shapes, groups_of(engine), [method], propagate == "sequential", 4, 256, SEQ_LEN, 0, tokens, 0)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "alps", "alps one_by_one", "sparsegpt_refit", "best_medium", "best"])
def test_the_estimate_is_near_the_measured_peak(name, engine):
    name, _, one_by_one = name.partition(" ")
    more = ["recover.epochs_after=1"] if name == "best" else []
    config = compose_config(f"pruner={name}", "sparsity=2:4", *more)
    method, propagate = build(config).method, config.propagate
    ids = torch.randint(3, 64, (16, SEQ_LEN), generator=torch.Generator().manual_seed(0))
    load, engine.runtime.one_by_one = load_of(engine, method, propagate, ids.numel()), bool(one_by_one)
    plan = dict.fromkeys(engine.decoder.shapes(), parse_pattern("2:4"))
    task = PruneTask(method, plan, engine.store.layer_files)
    measured = peak_bytes(lambda: PruningPass(engine, [task], propagate).run(ids))
    estimated = sum(load.hidden_bytes()) + load.workspace_bytes(engine.runtime)
    print(name, one_by_one, round(measured / 2**20, 1), round(estimated / measured, 2))
    assert 0.9 * measured <= estimated <= 1.5 * measured
