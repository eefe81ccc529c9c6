"""`python -m nanotrain` is `nanotrain`."""

import sys

from nanotrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
