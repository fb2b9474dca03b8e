"""Bytes of files into tensors, by several threads at a time: one alone reads a fraction of what a
disk gives, and a copy to a GPU waits for none of them where its source is pinned.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

CHUNK_BYTES = 16 << 20
"""Read at a time."""
MAX_THREADS = 8
NUM_BUFFERS = 2
"""Of a thread: it reads into one while the other's bytes are on their way to the device."""


class _Buffer:
    """Host memory of a chunk."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.bytes = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=on_gpu)
        self.copied = torch.cuda.Event() if on_gpu else None


class ParallelReader:
    """Fills tensors from files; `finish` waits for all of them."""

    def __init__(self) -> None:
        num_threads = min(MAX_THREADS, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(num_threads)
        self._room = threading.Semaphore(2 * num_threads)  # whoever reads on waits for the disk
        self._pending: list[Future[None]] = []
        self._devices: set[torch.device] = set()
        self._files: dict[Path, int] = {}
        self._own = threading.local()

    def read(self, path: Path, offset: int, dtype: torch.dtype, destination: torch.Tensor) -> None:
        """Begin to fill a contiguous tensor, on any device, with as many elements of a file.

        Args:
            path: of the file.
            offset: of the first byte.
            dtype: of the file's elements; the tensor may have another.
            destination: is not looked at before `finish`.
        """
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        if destination.device.type == "cuda":
            self._devices.add(destination.device)
        flat = destination.view(-1)
        count = CHUNK_BYTES // dtype.itemsize
        for first in range(0, len(flat), count):
            self._room.acquire()
            target, start = flat[first : first + count], offset + first * dtype.itemsize
            self._pending.append(self._pool.submit(self._fill, path, start, dtype, target))

    def finish(self) -> None:
        """Wait until all tensors are full. ValueError where a file could not be read."""
        pending, self._pending = self._pending, []
        for read in pending:
            read.result()
        for device in self._devices:
            torch.cuda.synchronize(device)

    def close(self) -> None:
        """Give up what is not finished."""
        self._pool.shutdown(cancel_futures=True)
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    @torch.inference_mode()  # of the thread; parameters may be inference tensors
    def _fill(self, path: Path, offset: int, dtype: torch.dtype, target: torch.Tensor) -> None:
        try:
            if target.device.type == "cpu" and target.dtype == dtype:
                self._read_bytes(path, offset, target)
                return
            buffer = self._next_buffer(target.device)
            source = buffer.bytes[: len(target) * dtype.itemsize].view(dtype)
            if buffer.copied is None:
                self._read_bytes(path, offset, source)
                target.copy_(source)
                return
            buffer.copied.synchronize()  # what was here before has gone
            self._read_bytes(path, offset, source)
            with torch.cuda.device(target.device):
                target.copy_(source, non_blocking=True)
                buffer.copied.record()
        finally:
            self._room.release()

    def _next_buffer(self, device: torch.device) -> _Buffer:
        buffers: dict[torch.device, list[_Buffer]] = self._own.__dict__.setdefault("buffers", {})
        if device not in buffers:
            buffers[device] = [_Buffer(device) for _ in range(NUM_BUFFERS)]
        buffers[device].append(buffers[device].pop(0))
        return buffers[device][-1]

    def _read_bytes(self, path: Path, offset: int, target: torch.Tensor) -> None:
        left: memoryview = target.view(torch.uint8).numpy().data
        try:
            while left:
                count = os.preadv(self._files[path], [left], offset)
                if not count:
                    raise ValueError(f"{path} is truncated: it ends at byte {offset}")
                left, offset = left[count:], offset + count
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {(error.strerror or '').lower()}") from None
