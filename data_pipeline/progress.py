"""Progress of a long command: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

_LINE_INTERVAL_S = 15.0


class Progress:
    """Counts units of work on standard error.

    Args:
        label: what is being done.
        unit: what is counted.
        total: how many there will be, if that is known.
        shown: False counts in silence.
    """

    def __init__(self, label: str, unit: str, total: int | None = None, *, shown: bool = True) -> None:
        self._label, self._unit, self._total = label, unit, total
        self._count = 0
        self._began = self._last_line = time.monotonic()
        self._shown = shown
        terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=label, unit=unit, unit_scale=True) if terminal else None

    def update(self, count: int = 1) -> None:
        """Adds to the count."""
        self._count += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._shown and time.monotonic() - self._last_line > _LINE_INTERVAL_S:
            self._last_line = time.monotonic()
            of_total = f" of {self._total:,}" if self._total is not None else ""
            seconds = self._last_line - self._began
            print(
                f"{self._label}: {self._count:,}{of_total} {self._unit}, "
                f"{self._count / seconds:,.1f} {self._unit}/s",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
