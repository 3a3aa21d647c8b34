"""``python -m lehr`` is the same as ``lehr``."""

from __future__ import annotations

from lehr.cli import main

if __name__ == "__main__":
    main()
