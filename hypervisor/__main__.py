"""`python -m hypervisor` is `hv`."""

from hypervisor.cli import command

if __name__ == "__main__":
    command()
