"""`python -m npucc` is the command `npucc`."""

from __future__ import annotations

import sys

from npucc.cli import main

if __name__ == "__main__":
    sys.exit(main())
