"""``python -m fastalign``: the spelling that torchrun needs."""

import sys

from fastalign.cli import main

if __name__ == "__main__":
    sys.exit(main())
