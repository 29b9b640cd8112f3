"""A disk in memory that does as it is told: what tests of models, and of images over images, stand on."""

import errno
import threading


class MemoryImage:
    """Fits devices.backends.image.Image.

    Attributes:
        content: the bytes of the disk.
        writes: how many writes, discards and zeroes were taken.
        flushes: how many flushes.
    """

    readonly = False
    block_size = 512
    cluster_size = 4096
    plain_fd = None

    def __init__(self, content):
        self.size = len(content)
        self.content = bytearray(content)
        self.writes = self.flushes = 0
        self._lock = threading.Lock()

    def readv(self, offset, buffers):
        with self._lock:
            for buffer in buffers:
                buffer[:] = self.content[offset : offset + len(buffer)]
                offset += len(buffer)

    def writev(self, offset, buffers):
        with self._lock:
            data = b"".join(buffers)
            if offset + len(data) > self.size:
                raise OSError(errno.ENOSPC, "beyond the end")
            self.content[offset : offset + len(data)] = data
            self.writes += 1

    def flush(self):
        with self._lock:
            self.flushes += 1

    def discard(self, offset, size):
        self.write_zeroes(offset, size, unmap=True)

    def write_zeroes(self, offset, size, unmap):
        self.writev(offset, [bytes(size)])

    def close(self):
        pass
