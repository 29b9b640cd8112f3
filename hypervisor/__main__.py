"""`python -m hypervisor` is `hv`."""

import sys

from hypervisor.cli import main

if __name__ == "__main__":
    sys.exit(main())
