"""`python -m planish`."""

import sys

from planish.cli import main

sys.exit(main())
