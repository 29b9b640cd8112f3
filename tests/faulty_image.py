"""A disk that loses power: what no flush has covered may be gone, torn or there, sector by sector."""

import errno
import threading

SECTOR = 512


class FaultyImage:
    """An image in memory; fits devices.backends.image.Image.

    Attributes:
        flushes: how many flushes were answered.
    """

    readonly = False
    block_size = SECTOR
    cluster_size = 4096
    plain_fd = None

    def __init__(self, content, *, lies=False):
        """Start with `content`, durable. A disk that lies answers a flush and does nothing."""
        self.size = len(content)
        self.flushes = 0
        self.fail_with = None
        self._lies = lies
        self._now = bytearray(content)
        self._durable = bytearray(content)
        self._volatile = []  # (offset, data) in the order of the writes
        self._lock = threading.Lock()

    def readv(self, offset, buffers):
        with self._lock:
            for buffer in buffers:
                buffer[:] = self._now[offset : offset + len(buffer)]
                offset += len(buffer)

    def writev(self, offset, buffers):
        with self._lock:
            if self.fail_with is not None:
                raise OSError(self.fail_with, "injected")
            data = b"".join(buffers)
            if offset + len(data) > self.size:
                raise OSError(errno.ENOSPC, "beyond the end")
            self._now[offset : offset + len(data)] = data
            self._volatile.append((offset, data))

    def flush(self):
        with self._lock:
            self.flushes += 1
            if self._lies:
                return
            for offset, data in self._volatile:
                self._durable[offset : offset + len(data)] = data
            self._volatile.clear()

    def discard(self, offset, size):
        self.write_zeroes(offset, size, unmap=True)

    def write_zeroes(self, offset, size, unmap):
        self.writev(offset, [bytes(size)])

    def power_cut(self, rng):
        """Return what may be on the disk if the power goes now; the machine does not notice.

        Each write that no flush covers is there, or not, or in part; of two to one sector the later one may be gone.
        """
        with self._lock:
            left = bytearray(self._durable)
            for offset, data in self._volatile:
                fate = rng.random()
                if fate < 0.35:
                    continue
                for at in range(0, len(data), SECTOR):
                    if fate < 0.65 and rng.random() < 0.5:
                        continue
                    left[offset + at : offset + at + SECTOR] = data[at : at + SECTOR]
            return bytes(left)

    def close(self):
        pass
