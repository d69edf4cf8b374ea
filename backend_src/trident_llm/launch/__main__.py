"""Command line of the launcher: ``python -m trident_llm.launch``."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
