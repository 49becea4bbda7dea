"""`python -m npucc` is the command `npucc`."""

import sys

from npucc.cli import main

sys.exit(main())
