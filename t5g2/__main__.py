"""`python -m t5g2` is the `t5g2` command."""

import sys

from t5g2.cli import main

if __name__ == "__main__":  # data workers are spawned and import this file
    sys.exit(main())
