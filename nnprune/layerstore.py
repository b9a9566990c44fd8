"""Decoder layers at rest: in host memory, on the device, or on disk.

The next layer can be brought while another computes: a thread reads it from disk, and a copy stream of its own moves it
to a CUDA device.
"""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from nnprune.decoder import Decoder
from nnprune.finished import FinishedLayers
from nnprune.loading import Checkpoint


class LayerStore:
    """Brings decoder layers to the device and back.

    Args:
        decoder: its layers hold weights when `checkpoint` is None, otherwise they are on the meta device.
        device: where a fetched layer computes; the shell is kept there for good.
        rest: host, device or disk.
        finished: the pruned layers on disk.
        checkpoint: the dense weights, for rest "disk".
    """

    def __init__(
        self, decoder: Decoder, device: torch.device, rest: str, finished: FinishedLayers, checkpoint: Checkpoint | None
    ) -> None:
        self.decoder = decoder
        self.device = device
        self.rest = rest
        self.finished = finished
        self.checkpoint = checkpoint
        self.moves = device.type == "cuda" and rest == "host"
        self._pruned: set[int] = set()  # layers whose weights in memory are the finished ones
        self._at_rest: dict[int, dict[str, Tensor]] = {}  # pinned host tensors of layers that move
        self._ahead: tuple[int, bool, Future] | None = None  # layer, whether pruned, its weights
        self._reader = ThreadPoolExecutor(1, "prefetch")
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        if checkpoint is None:
            for index, layer in enumerate(decoder.layers):
                if self.moves:
                    self._at_rest[index] = {name: tensor.pin_memory() for name, tensor in layer.state_dict().items()}
                    self._assign(index, self._at_rest[index])
                else:
                    layer.to(device)
        else:
            self._load_shell()
        self._move_shell()

    def fetch(self, index: int, pruned: bool = True) -> nn.Module:
        """Decoder layer `index` on the device: its finished weights if there are any and `pruned`, else its dense ones.

        Dense weights cannot be had again once finished ones took their place, unless layers rest on disk.
        """
        pruned = pruned and index in self.finished
        if pruned != (index in self._pruned) or not self._is_on_device(index):
            assert pruned or self.checkpoint or index not in self._pruned
            self._assign(index, self._take(index, pruned))
            self._pruned.discard(index)
            if pruned:
                self._pruned.add(index)
        return self.decoder.layers[index]

    def prefetch(self, index: int) -> None:
        """Begin to bring the dense weights of layer `index`, if it exists and they are not there, while something computes."""
        if index >= len(self.decoder.layers) or self._ahead is not None:
            return
        if not self._is_on_device(index):
            self._ahead = (index, False, self._reader.submit(self._bring, index, False))

    def adopt(self, index: int) -> None:
        """Decoder layer `index` was pruned in place and its file written: its weights in memory are the finished ones."""
        self._pruned.add(index)
        if self.moves:
            for name, tensor in self.decoder.layers[index].state_dict().items():
                self._at_rest[index][name].copy_(tensor)

    def release(self, index: int) -> None:
        """Put decoder layer `index` back where it rests. On disk only finished weights survive."""
        if self.moves:
            self._assign(index, self._at_rest[index])
        elif self.checkpoint is not None:
            self._pruned.discard(index)
            for module in self.decoder.layers[index].modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def _is_on_device(self, index: int) -> bool:
        return next(self.decoder.layers[index].parameters()).device.type == self.device.type

    def _take(self, index: int, pruned: bool) -> dict[str, Tensor]:
        """The weights of a layer on the device, those that were prefetched if they are the right ones."""
        if self._ahead is not None and self._ahead[:2] == (index, pruned):
            future, self._ahead = self._ahead[2], None
            state, event = future.result()
        else:
            if self._ahead is not None and self._ahead[0] <= index:  # nobody came for it
                self._ahead[2].result()
                self._ahead = None
            state, event = self._bring(index, pruned)
        if event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            for tensor in state.values():
                tensor.record_stream(stream)
        return state

    def _bring(self, index: int, pruned: bool) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """The weights of a layer on the device, and what to wait for before they are used."""
        if self.moves and pruned == (index in self._pruned):
            state = self._at_rest[index]
        elif pruned:
            state = self.finished.read(index)
            if self.moves:
                state = self._at_rest[index] = {name: tensor.pin_memory() for name, tensor in state.items()}
        else:
            state = self._read_dense(index)
        if self._copies is None:  # the files are mapped: a copy is what reads them, and lets go of them
            return {name: tensor.clone() for name, tensor in state.items()}, None
        with torch.cuda.stream(self._copies):
            state = {name: tensor.to(self.device, non_blocking=True) for name, tensor in state.items()}
            return state, self._copies.record_event()

    def _read_dense(self, index: int) -> dict[str, Tensor]:
        prefix = f"{self.decoder.path}.{index}."
        names = list(self.decoder.layers[index].state_dict())
        tensors = self.checkpoint.read([prefix + name for name in names])
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def _load_shell(self) -> None:
        model = self.decoder.model
        names = [name for name in model.state_dict() if not name.startswith(f"{self.decoder.path}.")]
        tied = model.all_tied_weights_keys
        model.load_state_dict(self.checkpoint.read(names, optional=tied), strict=False, assign=True)
        model.tie_weights()

    def _move_shell(self) -> None:
        """Move all outside the decoder layers to the device; tied tensors are moved once and stay tied."""
        inside = set(self.decoder.layers.modules())
        for module in self.decoder.model.modules():
            if module not in inside:
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter.data = parameter.data.to(self.device)
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = buffer.to(self.device)

    def _assign(self, index: int, state: dict[str, Tensor]) -> None:
        layer = self.decoder.layers[index]
        layer.load_state_dict(state, assign=True)
        layer.requires_grad_(False)
        for module in layer.modules():  # buffers that no checkpoint holds
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != self.device.type and name in module._non_persistent_buffers_set:
                    module._buffers[name] = buffer.to(self.device)
