"""`python -m halovae`, and what each rank runs."""

import sys

from halovae.cli.main import entry

if __name__ == "__main__":
    sys.exit(entry())
