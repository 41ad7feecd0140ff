"""Device memory, accounted by purpose: one arena each for weights and KV cache, and a pool for forward passes.

All of it comes from `cudaMalloc` (no managed memory, no host pages); `check_residency` asks the driver. On the CPU, the
same classes use NumPy memory, so the host build has the same layout as a GPU.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from refengine.array import Array
from refengine.errors import DeviceError

ALIGNMENT = 256  # bytes; W-1220
PURPOSES = ("weights", "kv", "workspace")


def aligned(n_bytes: int) -> int:
    """`n_bytes` rounded up to a multiple of ALIGNMENT."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def settled(n_bytes: int) -> int:
    """The bytes that a pool keeps after it has used `n_bytes`: a quarter more, for later passes."""
    return n_bytes * 5 // 4


class Arena:
    """`n_bytes` of device memory. `take` gives out its parts from the start, at multiples of 256 bytes."""

    def __init__(self, xp: Any, purpose: str, n_bytes: int) -> None:
        self._xp, self.purpose, self.n_bytes, self.used = xp, purpose, n_bytes, 0
        self._base: Any
        if xp is np:
            memory = np.zeros(n_bytes + ALIGNMENT, np.uint8)
            self._base = memory[-memory.ctypes.data % ALIGNMENT :][:n_bytes]
        else:
            memory = xp.cuda.Memory(max(n_bytes, ALIGNMENT))
            self._base = xp.cuda.MemoryPointer(memory, 0)
            self._base.memset(0, n_bytes)

    @property
    def pointer(self) -> int:
        return int(self._base.ctypes.data if self._xp is np else self._base.ptr)

    def take(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """The next part as an array; zeros if it was not used before. Raises DeviceError if it does not fit."""
        n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if self.used + n_bytes > self.n_bytes:
            raise DeviceError(
                f"{self.purpose} arena of {self.n_bytes} bytes has no room for {n_bytes} more at {self.used}"
            )
        start, self.used = self.used, self.used + aligned(n_bytes)
        return self.view(start, shape, dtype)

    def view(self, start: int, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array at offset `start` in bytes; other arrays may use the same memory."""
        if self._xp is np:
            n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            return self._base[start : start + n_bytes].view(dtype).reshape(shape)
        return self._xp.ndarray(shape, dtype, memptr=self._base + start)


class DeviceMemory:
    """The memory of a device that one model uses."""

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self._arenas: weakref.WeakSet[Arena] = weakref.WeakSet()
        self._weights: list[Arena] = []  # live as long as the model; a cache's arena lives as long as the cache
        self._chunks: weakref.WeakSet[Any] = weakref.WeakSet()  # the pool's chunks of device memory
        self._pool = None if xp is np else _pool(xp, self._chunks)

    def arena(self, purpose: str, n_bytes: int) -> Arena:
        """Allocate an arena. Raises DeviceError, with both numbers, if too little memory is free (W-1020)."""
        free = self.free_bytes()
        if free is not None and n_bytes > free:
            raise DeviceError(
                f"device {self._xp.cuda.Device().id} has {free} bytes free, {purpose} needs {n_bytes}: "
                "use a smaller model, a shorter context (n_ctx) or another device",
                n_bytes,
                free,
            )
        arena = Arena(self._xp, purpose, n_bytes)
        self._arenas.add(arena)
        if purpose == "weights":
            self._weights.append(arena)
        return arena

    def free_bytes(self) -> int | None:
        """The free memory of the whole device in bytes; None on the CPU."""
        return None if self._xp is np else int(self._xp.cuda.runtime.memGetInfo()[0])

    def workspace(self) -> AbstractContextManager[Any]:
        """While the context is active, new arrays come from the pool."""
        return nullcontext() if self._pool is None else self._xp.cuda.using_allocator(self._pool.malloc)

    def trim(self) -> None:
        """Return the pool's unused chunks to the device."""
        if self._pool is not None:
            self._pool.free_all_blocks()

    def settle(self) -> None:
        """Replace the pool's chunks by a single one, a quarter larger, so that similar passes never need another."""
        if self._pool is not None:
            n_bytes = settled(int(self._pool.total_bytes()))
            self._pool.free_all_blocks()
            self._pool.malloc(n_bytes)

    def accounted(self) -> dict[str, int]:
        """The allocated bytes by purpose (W-1011)."""
        n_bytes = dict.fromkeys(PURPOSES, 0)
        for arena in self._arenas:
            n_bytes[arena.purpose] += arena.n_bytes
        n_bytes["workspace"] += 0 if self._pool is None else int(self._pool.total_bytes())
        return n_bytes

    def check_residency(self) -> None:
        """Raises DeviceError, naming a buffer, unless all arenas and chunks are plain device memory (W-1012)."""
        if self._xp is np:
            return
        buffers = [(f"{arena.purpose} arena", arena.pointer) for arena in self._arenas]
        buffers += [("workspace chunk", int(chunk.ptr)) for chunk in self._chunks]
        for what, pointer in buffers:
            try:
                attributes = self._xp.cuda.runtime.pointerGetAttributes(pointer)
            except Exception as e:
                kind = type(e).__name__
                raise DeviceError(f"{what} at {pointer:#x}: the driver cannot tell its type ({kind})") from None
            if attributes.type != 2 or attributes.hostPointer:  # cudaMemoryTypeDevice
                raise DeviceError(f"{what} at {pointer:#x} is not plain device memory: {attributes}")


def _pool(xp: Any, chunks: weakref.WeakSet[Any]) -> Any:
    """A pool that allocates chunks with cudaMalloc and keeps freed memory. chunks: the set to which it adds them."""

    class Chunk(xp.cuda.Memory):
        __slots__ = ("__weakref__",)

    def allocate(n_bytes: int) -> Any:
        chunk = Chunk(n_bytes)
        chunks.add(chunk)
        return xp.cuda.MemoryPointer(chunk, 0)

    return xp.cuda.MemoryPool(allocate)
