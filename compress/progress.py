"""The type of a progress callback; the library reports, the command line draws."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int, str], None]
"""Called as ``progress(done, total, label)`` after each unit of work."""
