"""`python -m plumbline_operator`."""

import sys

from plumbline_operator.main import main

if __name__ == "__main__":
    sys.exit(main())
