"""`python -m epigone` is the `epigone` command."""

import sys

from epigone.cli import main

sys.exit(main())
