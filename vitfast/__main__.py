"""`python -m vitfast`: the same as the `vitfast` command."""

import sys

from .cli import main

sys.exit(main())
