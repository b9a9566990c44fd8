"""The loop of the authors' SparseGPT and Wanda code, written anew from the papers and kept as plain as theirs.

The whole model is in memory, one sequence at a time goes through each decoder layer, a hook on every linear keeps a
float32 statistic of its own, and a second forward with the pruned weights makes the inputs of the next layer.
Sources: Frantar & Alistarh 2023 (arXiv:2301.00774), Sun et al. 2023 (arXiv:2306.11695).

Letters: N samples, T tokens, D hidden, O output features, I input features, C columns of a block.
"""

import math
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.peers.common import Run, Spec, decoder_layers

BLOCK_SIZE = 128
DAMPING = 0.01


class HessianStatistic:
    """Running mean over sequences of 2 X^T X, from inputs that are scaled before the product."""

    def __init__(self, linear: nn.Linear) -> None:
        self.hessian = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)
        self.num_sequences = 0

    def add(self, X: Tensor) -> None:
        """Add the inputs X (..., I) of one sequence; some layers flatten their tokens."""
        self.hessian *= self.num_sequences / (self.num_sequences + 1)
        self.num_sequences += 1
        X = math.sqrt(2 / self.num_sequences) * X.reshape(-1, X.shape[-1]).float()
        self.hessian += X.t().matmul(X)

    def prune(self, W: Tensor, spec: Spec) -> Tensor:
        """W (O, I) float32, pruned column by column; the columns still to come absorb the errors."""
        H = self.hessian
        num_columns = W.shape[1]
        dead = H.diagonal() == 0
        H.diagonal()[dead] = 1
        W[:, dead] = 0
        H.diagonal().add_(DAMPING * H.diagonal().mean())
        U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
        for start in range(0, num_columns, BLOCK_SIZE):
            stop = min(start + BLOCK_SIZE, num_columns)
            pruned, errors = prune_block(W[:, start:stop].clone(), U[start:stop, start:stop], spec)
            W[:, start:stop] = pruned
            W[:, stop:] -= errors.matmul(U[start:stop, stop:])
        return W


def prune_block(W: Tensor, U: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    """Pruned columns (O, C) of a block, and the errors (O, C) that the columns after it have yet to absorb."""
    diagonal = U.diagonal()
    kept, group = spec.nm or (None, None)
    pruned, errors = torch.zeros_like(W), torch.zeros_like(W)
    drop = torch.zeros_like(W, dtype=torch.bool)
    if not group:
        cost = W.square() / diagonal.square()
        drop = cost <= cost.flatten().sort().values[int(cost.numel() * spec.sparsity)]
    for j in range(W.shape[1]):
        if group and j % group == 0:
            cost = W[:, j : j + group].square() / diagonal[j : j + group].square()
            drop.scatter_(1, j + cost.topk(group - kept, dim=1, largest=False).indices, True)
        column = W[:, j]
        pruned[:, j] = column.masked_fill(drop[:, j], 0)
        error = (column - pruned[:, j]) / diagonal[j]
        W[:, j:] -= error.unsqueeze(1).matmul(U[j, j:].unsqueeze(0))
        errors[:, j] = error
    return pruned, errors


class SquaredNormStatistic:
    """Running mean over sequences of the squared norms of the inputs' features."""

    def __init__(self, linear: nn.Linear) -> None:
        self.squared_norm = torch.zeros(linear.in_features, device=linear.weight.device)
        self.num_sequences = 0

    def add(self, X: Tensor) -> None:
        """Add the inputs X (..., I) of one sequence; some layers flatten their tokens."""
        self.squared_norm *= self.num_sequences / (self.num_sequences + 1)
        self.num_sequences += 1
        self.squared_norm += X.reshape(-1, X.shape[-1]).float().norm(dim=0).square() / self.num_sequences

    def prune(self, W: Tensor, spec: Spec) -> Tensor:
        """W (O, I) float32 without the weights of lowest |W| ||X|| of each row, or of each group of a row."""
        score = W.abs() * self.squared_norm.sqrt()
        drop = torch.zeros_like(W, dtype=torch.bool)
        if spec.nm:
            kept, group = spec.nm
            for j in range(0, W.shape[1], group):
                lowest = score[:, j : j + group].topk(group - kept, dim=1, largest=False).indices
                drop.scatter_(1, j + lowest, True)
        else:
            lowest = score.sort(dim=1, stable=True).indices[:, : int(W.shape[1] * spec.sparsity)]
            drop.scatter_(1, lowest, True)
        return W.masked_fill(drop, 0)


STATISTICS = {"sparsegpt": HessianStatistic, "wanda": SquaredNormStatistic}


class StopForward(Exception):
    """The first decoder layer has been reached."""


def capture_inputs(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The hidden states (N, T, D) that enter the first decoder layer, and what else it is called with."""
    first = decoder_layers(model)[0]
    captured: list[Tensor] = []
    arguments: dict[str, Any] = {}

    def catch(hidden: Tensor, **kwargs: Any) -> None:
        captured.append(hidden)
        arguments.update(kwargs)
        raise StopForward

    own_forward, first.forward = first.forward, catch
    for row in ids:
        with suppress(StopForward):
            model(row.unsqueeze(0), use_cache=False)
    first.forward = own_forward
    return torch.cat(captured), arguments


@torch.no_grad()
def prune_model(model: PreTrainedModel, ids: Tensor, spec: Spec) -> None:
    """Prune every linear of every decoder layer in place, with calibration ids (N, T)."""
    hidden, arguments = capture_inputs(model, ids)
    outputs = torch.zeros_like(hidden)

    def forward(layer: nn.Module) -> None:
        for j in range(len(hidden)):
            output = layer(hidden[j : j + 1], **arguments)
            outputs[j] = output[0] if isinstance(output, Tensor) else output[0][0]

    for layer in decoder_layers(model):
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        statistics = [STATISTICS[spec.method](linear) for linear in linears]
        hooks = [
            linear.register_forward_hook(lambda module, inputs, output, statistic=statistic: statistic.add(inputs[0]))
            for linear, statistic in zip(linears, statistics, strict=True)
        ]
        forward(layer)
        for hook in hooks:
            hook.remove()
        for linear in linears:
            linear.weight.copy_(statistics.pop(0).prune(linear.weight.clone().float(), spec))  # and frees it
        forward(layer)
        hidden, outputs = outputs, hidden


def main() -> None:
    """Run what the spec says."""
    run = Run()
    with run.stage("load"):
        model, ids = run.load()
        model, ids = model.to(run.spec.device), ids.to(run.spec.device)
    with run.stage("prune"):
        prune_model(model, ids, run.spec)
    run.finish(model)


if __name__ == "__main__":
    main()
