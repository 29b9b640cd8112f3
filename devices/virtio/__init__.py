"""Virtio 1.2: the queue, the device models, and the transports that a guest finds them by."""
