"""Offloads decoder layers to host memory or disk, and fetches them to the device.

Dense weights are read from the checkpoint when they are fetched, if it can be read in parts. The next layer can be prefetched
while another computes: a thread reads it, and a separate CUDA stream copies it to the device.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor, nn

from nnprune.engine.layer_files import LayerFiles
from nnprune.engine.staging import Staging
from nnprune.model.checkpoint import Checkpoint
from nnprune.model.decoder import Decoder


class LayerStore:
    """Fetches decoder layers to the device, in the computing dtype, and releases them, in the stored dtype.

    Embeddings and head stay on the device.

    Args:
        decoder: its layers are on the meta device if there is a `checkpoint`; otherwise they hold their weights.
        device: where a fetched layer computes.
        offload: host, device or disk.
        layer_files: the pruned layers on disk.
        checkpoint: the dense weights, read when a layer is fetched; None: the decoder holds them.
        computing_dtype: what the model's 16-bit weights are converted to on the device; None: no conversion.
    """

    def __init__(
        self,
        decoder: Decoder,
        device: torch.device,
        offload: str,
        layer_files: LayerFiles,
        checkpoint: Checkpoint | None,
        computing_dtype: torch.dtype | None = None,
    ) -> None:
        self.decoder = decoder
        self.device = device
        self.stored_dtype = decoder.model.dtype
        self.computing_dtype = computing_dtype or self.stored_dtype
        self.offload = offload
        self.layer_files = layer_files
        self.checkpoint = checkpoint
        self._stored = {name: tensor.dtype for name, tensor in decoder.model.state_dict().items()}
        is_converted = self.computing_dtype != self.stored_dtype
        self._is_copied = offload == "host" and (device.type == "cuda" or is_converted)  # at each fetch, from `_offloaded`
        self._stays = not self._is_copied and (checkpoint is None or offload != "disk")  # once fetched, where it computes
        self._offloaded: dict[int, dict[str, Tensor]] = {}  # dense layers in host memory, without a checkpoint
        self._on_device: set[int] = set()  # layers that can compute
        self._pruned: set[int] = set()  # layers whose weights in memory are pruned
        self._prefetched: tuple[int, Future] | None = None  # layer, its dense weights
        self._reader = ThreadPoolExecutor(1, "prefetch")
        self._copy_stream, self._save_stream = (torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2))
        self._staging = Staging(device) if device.type == "cuda" else None
        if checkpoint is not None:
            inside = f"{decoder.path}."
            checkpoint.load_embeddings_and_head([name for name in decoder.model.state_dict() if not name.startswith(inside)])
        for index, layer in enumerate(decoder.layers if checkpoint is None else ()):
            if self._is_copied:
                self._offloaded[index] = layer.state_dict()
                continue
            layer.to(device)
            self._on_device.add(index)
            if is_converted:
                self._assign(index, {name: self._computing(tensor) for name, tensor in layer.state_dict().items()})
        self._move_embeddings_and_head()

    def fetch(self, index: int, pruned: bool = True) -> nn.Module:
        """Decoder layer `index` on the device: with its pruned weights if it is finished and `pruned`, else with its dense ones.

        Without a checkpoint, dense weights are lost once the layer is pruned.
        """
        pruned = pruned and index in self.layer_files
        if pruned != (index in self._pruned) or index not in self._on_device:
            assert pruned or self.checkpoint or index in self._offloaded or index not in self._pruned
            self._assign(index, self._load_or_wait(index, pruned))
            self._on_device.add(index)
            self._pruned.discard(index)
            if pruned:
                self._pruned.add(index)
        return self.decoder.layers[index]

    def prefetch(self, index: int) -> None:
        """Start to load the dense weights of layer `index`, if it exists and is not on the device, while something computes."""
        if index < len(self.decoder.layers) and self._prefetched is None and index not in self._on_device:
            self._prefetched = (index, self._reader.submit(self._load, index, False))

    @torch.no_grad()
    def round(self, index: int) -> None:
        """Round the weights of decoder layer `index`, which is on the device, to their stored dtypes."""
        for name, parameter in self.decoder.layers[index].named_parameters():
            parameter.copy_(parameter.to(self._stored[f"{self.decoder.path}.{index}.{name}"]))

    def stored_state(self, index: int, copy: bool = False) -> Callable[[], dict[str, Tensor]]:
        """Decoder layer `index` as it is now: a function, for any thread, that returns name within the layer -> tensor, in its
        stored dtype, in host memory. If the layer may change in place before that, a `copy` has to be made."""
        prefix = f"{self.decoder.path}.{index}."
        state = self.decoder.layers[index].state_dict()
        state = {name: tensor.detach().clone() if copy else tensor.detach() for name, tensor in state.items()}
        if self._save_stream is None:
            return lambda: {name: self.as_stored(prefix + name, tensor) for name, tensor in state.items()}
        event = torch.cuda.current_stream(self.device).record_event()

        def to_host() -> dict[str, Tensor]:
            with torch.cuda.stream(self._save_stream):
                self._save_stream.wait_event(event)
                return {name: self.as_stored(prefix + name, tensor).cpu() for name, tensor in state.items()}

        return to_host

    def carried_state(self, indices: Sequence[int]) -> Callable[[], dict[str, Tensor]]:
        """As `stored_state`, of copies of several layers: full name -> tensor."""
        states = {f"{self.decoder.path}.{index}.": self.stored_state(index, copy=True) for index in indices}
        return lambda: {prefix + name: one for prefix, state in states.items() for name, one in state().items()}

    def as_stored(self, name: str, tensor: Tensor) -> Tensor:
        """`tensor`, by its full name in the model, in its stored dtype."""
        return tensor.detach().to(self._stored[name])

    def mark_pruned(self, index: int) -> None:
        """Tell the store that decoder layer `index` was pruned in place and is among the layer files."""
        self._pruned.add(index)
        self._offloaded.pop(index, None)

    def release(self, index: int) -> None:
        """Offload decoder layer `index`. Unless layers stay on the device, its pruned weights are from here on those of the layer
        files, and its dense ones those of the checkpoint or, without one, in host memory."""
        if self._stays:
            return
        self._on_device.discard(index)
        self._pruned.discard(index)
        if index in self._offloaded:
            self._assign(index, self._offloaded[index])
        else:
            for module in self.decoder.layers[index].modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def _load_or_wait(self, index: int, pruned: bool) -> dict[str, Tensor]:
        """The weights of a layer on the device, from the prefetch if it was for them. A prefetch that nobody used is dropped."""
        loaded = None
        if self._prefetched is not None and self._prefetched[0] <= index:
            (wanted, future), self._prefetched = self._prefetched, None
            with suppress(torch.OutOfMemoryError):  # alongside what takes most memory; there is room by now
                loaded = future.result()
            if wanted != index or pruned:
                loaded = None
        state, event = loaded or self._load(index, pruned)
        if event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(event)
            for tensor in state.values():
                tensor.record_stream(stream)
        return state

    def _load(self, index: int, pruned: bool) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """The weights of a layer on the device, and the CUDA event to wait for before they are used."""
        if pruned:
            state = self.layer_files.read(index)
        elif index in self._offloaded:
            state = self._offloaded[index]
        else:
            prefix = f"{self.decoder.path}.{index}."
            tensors = self.checkpoint.read([prefix + name for name in self.decoder.layers[index].state_dict()])
            state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        if self._copy_stream is None:  # the files are mapped: the copy reads them, and lets them be unmapped
            return {name: self._computing(tensor, copy=True) for name, tensor in state.items()}, None
        with torch.cuda.stream(self._copy_stream):
            state = {name: self._computing(self._staging.copy(tensor)) for name, tensor in state.items()}
            return state, self._copy_stream.record_event()

    def _computing(self, tensor: Tensor, copy: bool = False) -> Tensor:
        """A stored tensor on the device, in the computing dtype."""
        dtype = self.computing_dtype if tensor.dtype == self.stored_dtype else tensor.dtype
        return tensor.to(self.device, dtype, non_blocking=True, copy=copy)

    def _move_embeddings_and_head(self) -> None:
        """Move everything outside the decoder layers to the device; tied tensors are moved once and stay tied."""
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
        for module in layer.modules():  # buffers that are in no checkpoint
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != self.device.type and name in module._non_persistent_buffers_set:
                    module._buffers[name] = buffer.to(self.device)
