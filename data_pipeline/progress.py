"""Progress on standard error: a bar on a terminal, a plain line every few seconds elsewhere (logs, Slurm)."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm


class Progress:
    """Progress through a number of steps.

    Args:
        total: number of steps in all; None where nobody knows.
        description: what is going on, at the front of the bar or line.
        unit: what is counted, in the plural.
        initial: steps already done when starting, as after a resume.
        shown: False counts in silence, as on other ranks than 0.
        every_s: seconds between two plain lines.
    """

    def __init__(
        self,
        total: int | None,
        description: str,
        *,
        unit: str = "steps",
        initial: int = 0,
        shown: bool = True,
        every_s: float = 10.0,
    ) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.done = self._initial = initial
        self._shown = shown
        self._every_s = every_s
        self._start = self._last_line = time.monotonic()
        self._values = ""
        self._bar: tqdm[Any] | None = None
        if self._shown and sys.stderr.isatty():
            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=description,
                unit=f" {unit}",
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def update(self, steps: int = 1, **values: float | str) -> None:
        """Count `steps` as done, and show `values` from now on (floats with four significant digits)."""
        self.done += steps
        if not self._shown:
            return
        if values:
            self._values = " ".join(
                f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
                for name, value in values.items()
            )
        if self._bar is not None:
            self._bar.set_postfix_str(self._values, refresh=False)
            self._bar.update(steps)
        elif time.monotonic() - self._last_line >= self._every_s:
            self._line()

    def write(self, text: str) -> None:
        """A line of text that does not tear the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._shown:
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Show the last state. A second call does nothing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._shown and self.done > self._initial:
            self._line()
        self._shown = False

    def _line(self) -> None:
        self._last_line = time.monotonic()
        seconds = self._last_line - self._start
        rate = (self.done - self._initial) / seconds if seconds > 0 else 0.0
        parts = [f"{self.description}: {self.done} {self.unit}", f"{rate:.3g}/s"]
        if self.total is not None:
            parts[0] = f"{self.description}: {self.done}/{self.total} {self.unit}"
            parts.append(f"{(self.total - self.done) / rate:.0f} s left" if rate > 0 else "-")
        print("  ".join(part for part in [*parts, self._values] if part), file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
