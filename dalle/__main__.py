"""python -m dalle COMMAND ...: the same as `dalle COMMAND ...`."""

import sys

from dalle.cli import main

if __name__ == "__main__":
    sys.exit(main())
