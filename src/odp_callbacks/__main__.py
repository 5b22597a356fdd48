"""Run the command line with ``python -m odp_callbacks``."""

import sys

from odp_callbacks.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
