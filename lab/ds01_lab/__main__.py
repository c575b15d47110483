"""Entry for `python -m ds01_lab`, which lab/lab runs."""

import sys

from .cli import main

sys.exit(main())
