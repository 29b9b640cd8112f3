"""A real AMD-V host for machines that have none: Debian's own kernel and kvm_amd under QEMU's TCG.

cli: options, statuses. recipe, apt, image: the root image, built once. payload: the checkout, packed at every run.
machine: the QEMU process. session, streams, terminal: the command's input and output. inside/: what runs in there.
bochs: the VT-x host, made of the same image and payload.
Standard library only: this runs before the project's own environment exists.
"""
