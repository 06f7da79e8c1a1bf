"""Memory that two ranks of one host have, for one message at a time.

It is anonymous, so nothing of it is left when both processes have ended, in whichever way.
"""

from __future__ import annotations

import ctypes
import os
import weakref

import torch
from torch import Tensor

_LEAST = 64 << 10
"""Bytes of the smallest segment."""
_HEAD = 64
"""Bytes before a segment's message. The first of them says whether there is one."""


class Segment:
    """Memory that two ranks have.

    Args:
        number: among those of one sender to one receiver.
        room: bytes of the largest message that it can hold.
        file: descriptor of the memory; closed with this segment at the latest.
    """

    def __init__(self, number: int, room: int, file: int) -> None:
        self.number, self.room, self.file = number, room, file
        self._close = weakref.finalize(self, os.close, file)
        with torch.inference_mode(False):  # It outlives the call, and may be written in any mode.
            # Python's mmap would keep a descriptor for each segment.
            memory = torch.from_file(f"/proc/self/fd/{file}", shared=True, size=_HEAD + room, dtype=torch.uint8)
            self._bytes = memory[_HEAD:]
        self._taken = ctypes.c_uint8.from_address(memory.data_ptr())

    @classmethod
    def new(cls, number: int, size: int) -> Segment:
        """One for messages of `size` bytes, or twice as many."""
        room = max(_LEAST, 1 << (size - 1).bit_length())
        file = os.memfd_create("halovae")
        os.ftruncate(file, _HEAD + room)
        return cls(number, room, file)

    @property
    def is_free(self) -> bool:
        return not self._taken.value

    def fill(self, tensor: Tensor) -> None:
        self._bytes[: tensor.nbytes].copy_(tensor)
        self._taken.value = 1

    def empty_into(self, buffer: Tensor) -> None:
        buffer.copy_(self._bytes[: buffer.nbytes])
        self.free()

    def free(self) -> None:
        self._taken.value = 0

    def forget_file(self) -> None:
        """The memory stays as long as one of the ranks has it mapped."""
        self._close()
        self.file = -1
