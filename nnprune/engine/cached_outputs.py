"""Caches outputs within a decoder layer that no longer change, from one pass of the calibration to the next.

Sequential propagation runs the calibration through a layer once for each group of linears that share an input. Once a linear is
pruned, its output is final; once all linears of the attention but the last are pruned, so is the input of the last. Later passes
look these up. A trial forward finds what can be cached, so no architecture is known by name.

Letters: N samples, B batch, T tokens.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from nnprune.engine.hidden_buffer import HiddenBuffer
from nnprune.engine.hidden_states import HiddenStates
from nnprune.runtime import available_host_bytes, resident_host_bytes

ROOM_SHARE = 0.25  # of the free host memory, which the cached outputs of one linear may take


class Part(NamedTuple):
    """A submodule of a decoder layer that returns the output of one of its linears: the attention, or the linear itself."""

    linear: str
    nones: tuple[None, ...] | None  # returned after the output; None: the submodule returns a bare tensor


@dataclass
class CachedOutputs:
    """Cached outputs of the parts of one decoder layer, for all rows of some hidden states.

    For the attention, the input of its last linear is cached until that linear is pruned, then its output. Outputs are cached only
    in the device's own memory: reading them from anywhere else takes longer than computing them again.
    """

    modules: dict[str, nn.Module]  # name -> submodule of the layer
    parts: dict[str, Part]  # from `find_parts`
    states: HiddenStates  # those that pass through the layer
    path: Path  # prefix of the mapped files, for hidden states offloaded to disk
    _final: set[str] = field(default_factory=set, init=False)  # linears that are pruned
    _inputs: dict[str, HiddenBuffer] = field(default_factory=dict, init=False)
    _outputs: dict[str, HiddenBuffer | None] = field(default_factory=dict, init=False)  # None: no room

    @contextmanager
    def replaying(self, seen: Collection[str], is_last: bool) -> Iterator[None]:
        """A pass of all rows through the layer that skips what is cached. The caller prunes the linears `seen` afterwards.

        Final outputs are cached on the way, unless this pass `is_last`.
        """
        with ExitStack() as stack:
            for name, part in self.parts.items():
                self._install(stack, name, part, part.linear in seen, is_last)
            yield
        self._final.update(seen)

    def _install(self, stack: ExitStack, name: str, part: Part, is_seen: bool, is_last: bool) -> None:
        """Replace a part's forward by a look-up, or hook it to record, until the stack unwinds."""
        module, linear = self.modules[name], self.modules[part.linear]
        inputs, outputs = self._inputs.get(name), self._outputs.get(name)  # from earlier passes

        def forward(*_: Any, **__: Any) -> Any:
            rows = self.states.batch
            output = linear(inputs.get(rows)) if outputs is None else outputs.get(rows).clone()  # some layers write into it
            return output if part.nones is None else (output, *part.nones)

        if is_seen and module is not linear:
            keep = linear.register_forward_pre_hook(lambda _, args: self._keep(self._inputs, name, args[0]), prepend=True)
            stack.callback(keep.remove)
        if part.linear in self._final and name not in self._outputs and not is_last:
            keep = linear.register_forward_hook(lambda _, args, output: self._keep(self._outputs, name, output))
            stack.callback(keep.remove)
        if inputs is not None or outputs is not None:
            module.forward = forward  # on the instance, where it hides the class's own
            stack.callback(delattr, module, "forward")

    def _keep(self, cache: dict[str, HiddenBuffer | None], name: str, value: Tensor) -> None:
        if name not in cache:
            cache[name] = self._buffer(name, value.shape[-1], is_output=cache is self._outputs)
        if cache[name] is not None:
            cache[name].put(self.states.batch, value)

    def _buffer(self, name: str, width: int, is_output: bool) -> HiddenBuffer | None:
        """A buffer (N, T, width) for all rows; None for outputs that are cheaper to compute again."""
        like, device = self.states.activations, self.states.device
        shape = (*like.tensor.shape[:2], width)
        if is_output:
            room = ROOM_SHARE * (available_host_bytes() - resident_host_bytes())
            too_large = device.type == "cpu" and shape[0] * shape[1] * width * like.tensor.itemsize > room
            if too_large or not like.is_on_device:
                return None
        path = self.path.with_name(f"{self.path.name}-{name}.bin")
        buffer = HiddenBuffer(shape, like.tensor.dtype, self.states.runtime, path)
        return buffer if buffer.is_on_device or not is_output else None

    def close(self) -> None:
        """Free the memory and remove mapped files."""
        for buffer in (*self._inputs.values(), *self._outputs.values()):
            if buffer is not None:
                buffer.close()


def find_parts(modules: dict[str, nn.Module], linears: Collection[str], forward: Callable[[], object]) -> dict[str, Part]:
    """The parts of a decoder layer whose outputs can be cached, by name: outermost submodules that hold several linears and return
    just the output of the last, and linears outside of these. All are called once per forward.

    `modules` holds the layer's submodules, outer ones first; `linears` names the linears among them; `forward()` runs the layer.
    """
    calls: dict[str, list[Any]] = defaultdict(list)
    with ExitStack() as stack:
        for name, module in modules.items():
            hook = module.register_forward_hook(lambda _, args, output, name=name: calls[name].append(output))
            stack.callback(hook.remove)
        forward()
    once = {name: outputs[0] for name, outputs in calls.items() if len(outputs) == 1}
    order = [name for name in calls if name in linears]
    parts: dict[str, Part] = {}
    for name in modules:
        inside = [linear for linear in order if linear == name or linear.startswith(f"{name}.")]
        if name not in once or not inside or any(name.startswith(f"{outer}.") for outer in parts):
            continue
        output, last = once[name], inside[-1]
        first, *others = output if isinstance(output, tuple) else (output,)
        is_plain = getattr(first, "ndim", 0) == 3 and first is once.get(last) and all(other is None for other in others)
        # A module that ends the layer, such as the MLP, is final when the layer is: its linears are cached one by one.
        if is_plain and (name == last or (len(inside) > 1 and last != order[-1])):
            parts[name] = Part(last, tuple(others) if isinstance(output, tuple) else None)
    return parts
