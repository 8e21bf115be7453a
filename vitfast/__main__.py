"""`python -m vitfast`: the same as the `vitfast` command."""

import sys

from .cli.main import main

sys.exit(main())
