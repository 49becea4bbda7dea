"""Working arrays that the kernels share: taken when a program is bound, so that a run allocates nothing large.

The one big idea: kernels run one after the other, so two of them may use the same bytes. Arrays of one role are views of
one buffer, which is replaced by a larger one when it is too small (arrays taken before keep the old one).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from runtime.memory import Array, aligned

#: elements that a kernel works on at once, so that its float32 working arrays stay in the first- and second-level cache
PIECE = 32768
LARGEST_WORK = 1 << 31  # bytes of one working array


class Scratch:
    """A pool of working arrays by role."""

    def __init__(self) -> None:
        self._buffers: dict[str, Array] = {}
        self._held: dict[int, Any] = {}

    def take(self, role: str, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """An array whose content lasts until the next kernel that takes the same role. Raises MemoryError."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if size > LARGEST_WORK:
            raise MemoryError(f"{size} bytes of working memory; at most {LARGEST_WORK}")
        buffer = self._buffers.get(role)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers[role] = aligned(max(size, len(buffer) * 3 // 2 if buffer is not None else 0))
        taken: np.ndarray[Any, Any] = buffer[:size].view(dtype).reshape(shape)
        return taken

    def holds(self, taken: Array, content: Any) -> bool:
        """Whether the kernel before that took this memory left `content` (any key; None is never held) in it; from now on it does."""
        place = taken.ctypes.data
        before, self._held[place] = self._held.get(place), content
        return content is not None and before == content


def collapse(arrays: list[Array], *, keep: int = 0) -> list[Array]:
    """The same arrays (of one shape) with neighbouring dimensions merged where every array allows it; the last `keep` stay apart."""
    shape, rank = arrays[0].shape, arrays[0].ndim - keep
    sizes: list[int] = []
    outer = 0
    for axis in (axis for axis in range(rank) if shape[axis] != 1):
        if sizes and all(a.strides[outer] == a.strides[axis] * shape[axis] for a in arrays):
            sizes[-1] *= shape[axis]
        else:
            sizes.append(shape[axis])
        outer = axis
    return [a.reshape(*(sizes or [1]), *shape[rank:]) for a in arrays]


def pieces(arrays: list[Array], limit: int = PIECE) -> list[list[Array]]:
    """The same arrays (of one shape) cut along their first dimension into parts of at most about `limit` elements."""
    shape = arrays[0].shape
    if not shape or math.prod(shape) <= limit:
        return [arrays]
    rows = max(1, limit // max(1, math.prod(shape[1:])))
    return [[a[start : start + rows] for a in arrays] for start in range(0, shape[0], rows)]
