"""Lines on a terminal on which another process may show a progress bar."""

from __future__ import annotations

import sys

CLEAR_LINE = "\r\x1b[2K\x1b[?25h"  # to the line's beginning, erase it, show the cursor that the bar has hidden


def line_start() -> str:
    """What precedes a line of one's own on standard error: on a terminal, what erases the bar that may be there."""
    return CLEAR_LINE if sys.stderr is not None and sys.stderr.isatty() else ""
