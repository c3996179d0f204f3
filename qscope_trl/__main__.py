"""`python -m qscope_trl`, which `accelerate launch -m qscope_trl` runs."""

import sys

from qscope_trl.cli import main

if __name__ == "__main__":
    sys.exit(main())
