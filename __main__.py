"""``python -m longreach``."""

import sys

from .launch.cli import main

sys.exit(main())
