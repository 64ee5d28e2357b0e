"""Blocks whose frozen weights wait in main memory and come to the device just before they are used.

Weights never change, so they are only copied to the device, never back: each swapped block has one flat master in main
memory (pinned, where there is a GPU), and a ring of flat buffers on the device takes the masters in turn, the next one
while the current block computes. Hooks on the blocks' calls bring the weights, so they stay outside of compiled graphs;
what a backward needs of them is brought again instead of being kept.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from library.base.errors import UserError

_SLOTS = 2
_ALIGNMENT = 64  # bytes, of torch's own memory


@dataclass
class _Place:
    """A tensor of a block in its flat buffer."""

    owner: nn.Module
    name: str
    offset: int
    shape: torch.Size
    dtype: torch.dtype

    def view(self, buffer: Tensor) -> Tensor:
        """The tensor in a buffer of its block."""
        size = self.shape.numel() * self.dtype.itemsize
        return buffer[self.offset : self.offset + size].view(self.dtype).view(self.shape)

    def put(self, value: Tensor) -> None:
        """Let the block use a tensor."""
        if self.name in self.owner._parameters:
            self.owner._parameters[self.name].data = value
        else:
            self.owner._buffers[self.name] = value


@dataclass
class _Swapped:
    """A block with its master."""

    places: list[_Place]
    master: Tensor
    slot: int | None = None
    arrived: Any = None  # event of its copy
    entered: list[Any] = field(default_factory=list)


class BlockSwapper:
    """Swaps the last blocks of a model.

    Args:
        blocks: in the order of the forward.
        count: how many of them wait in main memory.
        device: where they compute.

    Raises:
        UserError: more blocks than there are, or one that is trained.
    """

    def __init__(self, blocks: Sequence[nn.Module], count: int, device: torch.device) -> None:
        if count > len(blocks):
            raise UserError("--blocks_to_swap", count, f"this model has {len(blocks)} blocks")
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.blocks = [self._taken(block) for block in blocks[len(blocks) - count :]]
        size = max((block.master.numel() for block in self.blocks), default=0)
        self.slots: list[Tensor] = []
        self._size = size
        self._users: list[int | None] = [None] * _SLOTS
        for index, block in enumerate(blocks[len(blocks) - count :]):
            block.register_forward_pre_hook(self._before_forward(index))
            block.register_forward_hook(self._after_forward(index), always_call=True)

    def _taken(self, block: nn.Module) -> _Swapped:
        """Move a block's tensors into a flat master; it keeps empty ones, which cost nothing to move."""
        places, offset, tensors = [], 0, []
        for module in block.modules():
            for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if tensor.requires_grad:
                    raise UserError("--blocks_to_swap", message="works with frozen blocks; these are trained")
                # on a CPU the last bits of a sum depend on how its terms lie in memory: as they lay before
                start = offset + (tensor.data_ptr() % _ALIGNMENT if self.device.type == "cpu" else 0)
                places.append(_Place(module, name, start, tensor.shape, tensor.dtype))
                tensors.append(tensor.data)
                offset = -(-(start + tensor.numel() * tensor.dtype.itemsize) // _ALIGNMENT) * _ALIGNMENT
        master = torch.empty(offset, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        for place, tensor in zip(places, tensors):
            place.view(master).copy_(tensor)
            place.put(torch.empty(0, dtype=place.dtype))
        return _Swapped(places, master)

    def _before_forward(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            del module, args
            self._bring(index, following=index + 1)
            keeping = torch.is_grad_enabled()
            context = torch.autograd.graph.saved_tensors_hooks(self._pack(index), self._unpack)
            entered = context if keeping else nullcontext()
            entered.__enter__()
            self.blocks[index].entered.append(entered)

        return hook

    def _after_forward(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            del module, args
            self.blocks[index].entered.pop().__exit__(None, None, None)
            # hooks on tensors, not on the module: those would change the order in which gradients are added up
            for one in output if isinstance(output, tuple) else (output,):
                if isinstance(one, Tensor) and one.requires_grad:
                    one.register_hook(self._before_backward(index))

        return hook

    def _before_backward(self, index: int) -> Any:
        def hook(gradient: Tensor) -> None:
            del gradient
            self._bring(index, following=index - 1)

        return hook

    def _bring(self, index: int, following: int) -> None:
        """Have a block's weights in place, and begin to fetch those of the one that follows."""
        self._fetch(index, beside=None)
        block = self.blocks[index]
        if block.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(block.arrived)
        for place in block.places:
            place.put(place.view(self.slots[block.slot]))
        if 0 <= following < len(self.blocks):
            self._fetch(following, beside=block.slot)

    def _fetch(self, index: int, beside: int | None) -> None:
        """Copy a master into the ring, unless it is there; `beside`: the slot that is in use."""
        block = self.blocks[index]
        if block.slot is not None:
            return
        if not self.slots:
            self.slots = [torch.empty(self._size, dtype=torch.uint8, device=self.device) for _ in range(_SLOTS)]
        slot = next(number for number in range(_SLOTS) if number != beside)
        if beside is None and None in self._users:
            slot = self._users.index(None)
        former = self._users[slot]
        if former is not None:
            self.blocks[former].slot = None
        self._users[slot], block.slot = index, slot
        target = self.slots[slot][: block.master.numel()]
        if self.stream is None:
            target.copy_(block.master)
            return
        used = torch.cuda.current_stream(self.device).record_event()  # what the slot held may still be computed with
        self.stream.wait_event(used)
        with torch.cuda.stream(self.stream):
            target.copy_(block.master, non_blocking=True)
            block.arrived = self.stream.record_event()

    def _pack(self, index: int) -> Any:
        """Weights that a backward needs are remembered by their place; other tensors are kept."""

        def pack(tensor: Tensor) -> Any:
            slot = self.blocks[index].slot
            if slot is None or tensor.untyped_storage().data_ptr() != self.slots[slot].untyped_storage().data_ptr():
                return tensor
            return index, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()

        return pack

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        index, dtype, size, stride, offset = packed
        self._bring(index, following=index - 1)
        buffer = self.slots[self.blocks[index].slot]
        whole = buffer[: buffer.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        return whole.as_strided(size, stride, offset)
