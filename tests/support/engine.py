"""Engines around tiny models: pruning, inputs of linears by plain forwards, hidden states through all layers."""

from contextlib import contextmanager

import torch

from nnprune.engine.engine import LayerwiseEngine
from nnprune.engine.layer_files import LayerFiles
from nnprune.engine.layer_store import LayerStore
from nnprune.engine.pruning_pass import PruneTask, PruningPass
from nnprune.method import Method
from nnprune.model.decoder import Decoder
from nnprune.patterns import NM
from nnprune.pruners.base import Pruner
from nnprune.pruners.sparsegpt import SparseGPT
from nnprune.pruners.wanda import Wanda
from nnprune.recovery import Reconstruction
from nnprune.runtime import Runtime
from nnprune.statistics import Hessian
from support.families import FAMILIES, VOCAB_SIZE


def random_ids(rows: int = 2, seq_len: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (rows, seq_len), generator=torch.Generator().manual_seed(seed))


def engine_of(model, folder, device="cpu", **runtime) -> LayerwiseEngine:
    decoder, runtime = Decoder(model), Runtime(device, **runtime)
    store = LayerStore(decoder, runtime.torch_device, runtime.layers, LayerFiles(folder / "layers", decoder.path), None)
    return LayerwiseEngine(decoder, store, runtime, folder)


def prune(engine, method, plan, ids, propagate="pruned") -> list[dict]:
    """Prune as a run does, and leave the model pruned; returns the reports of all layers."""
    method = method if isinstance(method, Method) else Method(method)
    layer_files = engine.store.layer_files
    PruningPass(engine, [PruneTask(method, plan, layer_files)], propagate).run(ids)
    for index in range(engine.num_layers):
        engine.store.fetch(index)
    return [layer_files.reports[index] for index in range(engine.num_layers)]


@contextmanager
def through_layers(engine, ids, pruned=True):
    """Hidden states behind the last layer: what an evaluation sees."""
    with torch.no_grad(), engine.hidden_states(ids, "test") as stream:
        chosen = {"pruned": [stream]} if pruned else {"dense": [stream]}
        PruningPass(engine, [], "pruned").run(ids, **chosen)
        yield stream


IDS = random_ids(rows=5, seq_len=16)
ATOL = {"cpu": 1e-6, "cuda": 1e-5}
"""Of statistics in float32 after some layers, against those computed on the CPU."""


def prune_model(folder, family="llama", method=None, propagate="pruned", model=None, **runtime):
    """The pruned model, on the CPU, and the reports of its layers; `method` may be a mere pruner, `runtime` names the device."""
    model = model or FAMILIES[family]()
    engine = engine_of(model, folder, **runtime)
    plan = dict.fromkeys(engine.decoder.shapes(), NM(2, 4))
    reports = prune(engine, method or SparseGPT(), plan, IDS, propagate)
    return model.cpu(), reports


@torch.no_grad()
def expected_inputs(dense, pruned, propagate):
    """Inputs (tokens, I) of each linear from full-model forwards: the reference for what each mode shows."""
    seen = {}
    for index in range(3):
        for group in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
            model = FAMILIES["llama"]()  # dense from here on
            model.load_state_dict(dense)
            for name, linear in model.named_modules():
                if not hasattr(linear, "weight") or "layers." not in name or f"{name}.weight" not in pruned:
                    continue
                layer = int(name.split(".")[2])
                order = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
                short = name.rsplit(".", 1)[1]
                earlier = layer < index or (
                    propagate == "sequential"
                    and layer == index
                    and short in order
                    and order.index(short) < order.index(group[0])
                )
                if propagate != "dense" and earlier:
                    linear.weight.copy_(pruned[f"{name}.weight"])
            captured = {}
            for name, linear in model.model.layers[index].named_modules():
                if name.rsplit(".", 1)[-1] in group:
                    linear.register_forward_pre_hook(lambda _, args, name=name, seen=captured: seen.__setitem__(name, args[0]))
            model(IDS)
            for name, X in captured.items():
                seen[f"model.layers.{index}.{name}"] = X.reshape(-1, X.shape[-1])
    return seen


class Interrupted(Exception):
    pass


class Failing(Wanda):
    """Stops at a chosen linear, as a killed run would."""

    def __init__(self, fatal):
        self.fatal = fatal

    def prune_linear(self, W, module_name, pattern):
        if module_name == self.fatal:
            raise Interrupted
        return super().prune_linear(W, module_name, pattern)


def recover(before, after, lr=1e-2, **settings):
    return Reconstruction(before, after, lr=lr, batch_tokens=32, holdout=0.2, **settings)


class Witness(Pruner):
    """Prunes by magnitude, and keeps the Hessians that it was given, on the CPU."""

    statistic = Hessian

    def __init__(self):
        self.seen = {}

    def prune_linear(self, W, module_name, pattern):
        self.seen[module_name] = self.statistics[module_name].mean().cpu()
        return torch.where(pattern.mask(W.abs()), W, 0)
