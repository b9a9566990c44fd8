"""Passes over the same decoder layer that need not compute again what is final.

Sequential propagation forwards a layer once for each group of linears that share an input. As soon as the linears before it are
pruned, what the last linear of the attention receives is final, and so is what a linear gives that is pruned itself: it is kept, and
later passes begin there. Found by the forward itself, so that any architecture either has it or goes without.

Letters: N samples, B batch, T tokens, O output features, I input features.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from nnprune.activations import Activations


@dataclass
class Shortcut:
    """A submodule of a decoder layer whose output is that of one of its linears.

    Args:
        module: the submodule's name within the layer.
        linear: the linear's, likewise.
        as_tuple: how many Nones the submodule returns behind that output; None when it returns a tensor.
        make: a buffer for inputs (N, T, I) of the linear, given I.
    """

    module: str
    linear: str
    as_tuple: int | None
    make: Callable[[int], Activations]
    _inputs: Activations | None = field(default=None, init=False)
    _is_complete: bool = field(default=False, init=False)

    @contextmanager
    def recording(self, layer: nn.Module, rows: Callable[[], slice]) -> Iterator[None]:
        """Within it, all rows of the calibration go through `layer`; `rows()` tells which at the moment."""

        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self._inputs is None:
                self._inputs = self.make(args[0].shape[-1])
            self._inputs.put(rows(), args[0])

        handle = layer.get_submodule(self.linear).register_forward_pre_hook(keep, prepend=True)
        try:
            yield
        finally:
            handle.remove()
        self._is_complete = True

    @contextmanager
    def used(self, layer: nn.Module, rows: Callable[[], slice]) -> Iterator[None]:
        """Within it, forwards of `layer` leave out what leads to the linear, once that is known."""
        if not self._is_complete:
            yield
            return
        module, linear = layer.get_submodule(self.module), layer.get_submodule(self.linear)

        def forward(*_: Any, **__: Any) -> Any:
            output = linear(self._inputs.get(rows()))
            return output if self.as_tuple is None else (output, *[None] * self.as_tuple)

        module.forward = forward  # on the instance, which hides the class's own
        try:
            yield
        finally:
            del module.forward

    def close(self) -> None:
        """Give the buffer back."""
        if self._inputs is not None:
            self._inputs.close()
            self._inputs = None
        self._is_complete = False


@dataclass
class KnownOutputs:
    """What linears of a decoder layer gave in an earlier pass, to be given again without computing it.

    Args:
        make: a buffer for outputs (N, T, O) of a linear, given O; None where recomputing is better than keeping.
    """

    make: Callable[[int], Activations | None]
    _outputs: dict[str, Activations | None] = field(default_factory=dict, init=False)
    _complete: set[str] = field(default_factory=set, init=False)

    @contextmanager
    def used(self, layer: nn.Module, final: Sequence[str], keep: bool, rows: Callable[[], slice]) -> Iterator[None]:
        """Within it, all rows of the calibration go through `layer`, whose linears `final`, by their names within it, will give
        the same in every later pass: those that are known are not computed; with `keep` the others will be known."""
        seen: dict[str, int] = {}  # name -> rows
        known = {name: layer.get_submodule(name) for name in final if name in self._complete}
        for name, linear in known.items():
            linear.forward = lambda X, name=name: self._outputs[name].get(rows()).clone()  # some layers go on in place
        handles = [
            layer.get_submodule(name).register_forward_hook(partial(self._keep, name, seen, rows))
            for name in final
            if keep and name not in known
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for linear in known.values():
                del linear.forward
        self._complete |= seen.keys()

    def _keep(
        self,
        name: str,
        seen: dict[str, int],
        rows: Callable[[], slice],
        linear: nn.Module,
        args: tuple[Tensor, ...],
        output: Tensor,
    ) -> None:
        here = rows()
        if name not in self._outputs:
            self._outputs[name] = self.make(output.shape[-1]) if output.ndim == 3 else None  # some layers flatten their tokens
        if seen.get(name, 0) >= here.stop:  # called twice in one forward
            self._outputs[name] = None
            seen.pop(name)
        if self._outputs[name] is not None:
            self._outputs[name].put(here, output)
            seen[name] = here.stop

    def close(self) -> None:
        """Give the buffers back."""
        for outputs in filter(None, self._outputs.values()):
            outputs.close()
        self._outputs, self._complete = {}, set()


def find_shortcut(
    layer: nn.Module, linears: dict[str, nn.Module], forward: Callable[[], object]
) -> tuple[str, str, int | None] | None:
    """(module, linear, Nones behind its output) of the outermost submodule of `layer` that returns what one of its several
    linears returned, nothing more, and is not the last to do so; None where there is none.

    `linears` are the layer's, by their names within it; `forward()` takes something without meaning through the layer.
    """
    calls: list[tuple[str, Any]] = []
    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: calls.append((name, output)))
        for name, module in layer.named_modules()
        if name
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    outputs = dict(calls)
    once = {name for name in outputs if sum(name == other for other, _ in calls) == 1}
    order = [name for name, _ in calls if name in linears]
    for name in dict(layer.named_modules()):  # outer ones first
        if name not in once or name in linears:
            continue
        inside = [linear for linear in order if linear.startswith(f"{name}.")]
        output = outputs[name]
        rest = output[1:] if isinstance(output, tuple) else ()
        first = output[0] if isinstance(output, tuple) else output
        if len(inside) < 2 or any(other is not None for other in rest):
            continue
        last = inside[-1]
        is_plain = isinstance(first, Tensor) and first.ndim == 3 and last in once and first is outputs[last]
        if is_plain and last != order[-1]:
            return name, last, len(rest) if isinstance(output, tuple) else None
    return None
