"""``python -m charioteer``: the command line under the interpreter of one's choice."""

import sys

from charioteer.cli import main

if __name__ == "__main__":
    sys.exit(main())
