"""Fetches decoder layers to the device and releases them to where they are offloaded: host memory, or disk.

The next layer can be fetched while another computes: a thread reads it, and a CUDA stream for copies moves it to the device.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from nnprune.engine.layer_files import LayerFiles
from nnprune.model.checkpoint import Checkpoint
from nnprune.model.decoder import Decoder


class LayerStore:
    """Fetches decoder layers in the computing dtype, and keeps those that are not on the device in the stored dtype.

    Args:
        decoder: its layers hold weights when `checkpoint` is None, otherwise they are on the meta device.
        device: where a fetched layer computes; embeddings and head stay there.
        offload: where layers are kept while they do not compute: host, device or disk.
        finished: the layer files of this run.
        checkpoint: the dense weights, for offload "disk".
        computing_dtype: what the model's 16-bit weights are converted to on the device; None: they stay as they are.
    """

    def __init__(
        self,
        decoder: Decoder,
        device: torch.device,
        offload: str,
        finished: LayerFiles,
        checkpoint: Checkpoint | None,
        computing_dtype: torch.dtype | None = None,
    ) -> None:
        self.decoder = decoder
        self.device = device
        self.stored_dtype = decoder.model.dtype
        self.computing_dtype = computing_dtype or self.stored_dtype
        self.offload = offload
        self.finished = finished
        self.checkpoint = checkpoint
        converts = device.type == "cuda" or self.computing_dtype != self.stored_dtype
        self.is_copied = converts and offload == "host"
        self._stored = {name: tensor.dtype for name, tensor in decoder.model.state_dict().items()}
        self._on_device: set[int] = set()  # layers that can compute
        self._pruned: set[int] = set()  # layers whose weights in memory are the finished ones
        self._offloaded: dict[int, dict[str, Tensor]] = {}  # host tensors of layers that are copied to compute
        self._prefetched: tuple[int, bool, Future] | None = None  # layer, whether pruned, its weights
        self._reader = ThreadPoolExecutor(1, "prefetch")
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        if checkpoint is None:
            for index, layer in enumerate(decoder.layers):
                if self.is_copied:
                    self._offloaded[index] = {name: self._pinned(tensor) for name, tensor in layer.state_dict().items()}
                    self._assign(index, self._offloaded[index])
                    continue
                layer.to(device)
                self._on_device.add(index)
                if self.computing_dtype != self.stored_dtype:
                    self._assign(index, {name: self._computing(tensor) for name, tensor in layer.state_dict().items()})
        else:
            self._load_embeddings_and_head()
        self._move_embeddings_and_head()

    def fetch(self, index: int, pruned: bool = True) -> nn.Module:
        """Decoder layer `index` on the device: its finished weights if there are any and `pruned`, else its dense ones.

        Dense weights cannot be had again once finished ones took their place, unless layers are offloaded to disk.
        """
        pruned = pruned and index in self.finished
        if pruned != (index in self._pruned) or index not in self._on_device:
            assert pruned or self.checkpoint or index not in self._pruned
            self._assign(index, self._take(index, pruned))
            self._on_device.add(index)
            self._pruned.discard(index)
            if pruned:
                self._pruned.add(index)
        return self.decoder.layers[index]

    def prefetch(self, index: int) -> None:
        """Start to fetch the dense weights of layer `index`, if there is such a layer and it is not on the device."""
        if index >= len(self.decoder.layers) or self._prefetched is not None:
            return
        if index not in self._on_device:
            self._prefetched = (index, False, self._reader.submit(self._start_fetch, index, False))

    @torch.no_grad()
    def round(self, index: int) -> None:
        """Round the weights of decoder layer `index`, which is on the device, to the dtype that they are stored in."""
        for name, parameter in self.decoder.layers[index].named_parameters():
            parameter.copy_(parameter.to(self._stored[f"{self.decoder.path}.{index}.{name}"]))

    def stored_state(self, index: int) -> dict[str, Tensor]:
        """Name within the layer -> tensor of decoder layer `index`, as it is now, in the dtype that it is stored in."""
        prefix = f"{self.decoder.path}.{index}."
        return {name: self.as_stored(prefix + name, tensor) for name, tensor in self.decoder.layers[index].state_dict().items()}

    def file_of(self, index: int) -> Path | None:
        """The file of decoder layer `index` if it is finished."""
        return self.finished.path(index) if index in self.finished else None

    def read_dense(self, index: int) -> dict[str, Tensor]:
        """Full name -> tensor of decoder layer `index`, dense, in the dtype that it is stored in."""
        self.fetch(index, pruned=False)
        state = self.finished.named(index, self.stored_state(index))
        self.release(index)
        return state

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the model's, by its full name, in the dtype that it is stored in."""
        return tensor.detach().to(self._stored[name])

    def adopt(self, index: int) -> None:
        """Decoder layer `index` was pruned in place and its file written: its weights in memory are the finished ones."""
        self._pruned.add(index)
        if self.is_copied:
            for name, tensor in self.decoder.layers[index].state_dict().items():
                self._offloaded[index][name].copy_(tensor)

    def release(self, index: int) -> None:
        """Release decoder layer `index` to where it is offloaded. Offloaded to disk, only finished weights survive."""
        if self.is_copied:
            self._assign(index, self._offloaded[index])
            self._on_device.discard(index)
        elif self.checkpoint is not None:
            self._on_device.discard(index)
            self._pruned.discard(index)
            for module in self.decoder.layers[index].modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def _take(self, index: int, pruned: bool) -> dict[str, Tensor]:
        """The weights of a layer on the device, prefetched or not."""
        if self._prefetched is not None and self._prefetched[:2] == (index, pruned):
            future, self._prefetched = self._prefetched[2], None
            state, event = future.result()
        else:
            if self._prefetched is not None and self._prefetched[0] <= index:  # it was not fetched after all
                self._prefetched[2].result()
                self._prefetched = None
            state, event = self._start_fetch(index, pruned)
        if event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            for tensor in state.values():
                tensor.record_stream(stream)
        return state

    def _start_fetch(self, index: int, pruned: bool) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """The weights of a layer on the device, and the CUDA event to wait for before they are used."""
        if self.is_copied and pruned == (index in self._pruned):
            state = self._offloaded[index]
        elif pruned:
            state = self.finished.read(index)
            if self.is_copied:
                state = self._offloaded[index] = {name: self._pinned(tensor) for name, tensor in state.items()}
        else:
            state = self._read_dense(index)
        if self._copies is None:  # the files are mapped: a copy is what reads them, and lets go of them
            return {name: self._computing(tensor, copy=True) for name, tensor in state.items()}, None
        with torch.cuda.stream(self._copies):
            state = {name: self._computing(tensor) for name, tensor in state.items()}
            return state, self._copies.record_event()

    def _computing(self, tensor: Tensor, copy: bool = False) -> Tensor:
        """A stored tensor on the device, in the dtype that computes."""
        dtype = self.computing_dtype if tensor.dtype == self.stored_dtype else tensor.dtype
        return tensor.to(self.device, dtype, non_blocking=True, copy=copy)

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.device.type == "cuda" else tensor.clone()

    def _read_dense(self, index: int) -> dict[str, Tensor]:
        prefix = f"{self.decoder.path}.{index}."
        names = list(self.decoder.layers[index].state_dict())
        tensors = self.checkpoint.read([prefix + name for name in names])
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}

    def _load_embeddings_and_head(self) -> None:
        prefix = f"{self.decoder.path}."
        self.checkpoint.load_shell([name for name in self.decoder.model.state_dict() if not name.startswith(prefix)])

    def _move_embeddings_and_head(self) -> None:
        """Move all outside the decoder layers to the device; tied tensors are moved once and stay tied."""
        inside = set(self.decoder.layers.modules())
        for module in self.decoder.model.modules():
            if module not in inside:
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter.data = self._computing(parameter.data)
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = self._computing(buffer)

    def _assign(self, index: int, state: dict[str, Tensor]) -> None:
        layer = self.decoder.layers[index]
        layer.load_state_dict(state, assign=True)
        layer.requires_grad_(False)
        for module in layer.modules():  # buffers that no checkpoint holds
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != self.device.type and name in module._non_persistent_buffers_set:
                    module._buffers[name] = buffer.to(self.device)
