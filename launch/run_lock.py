"""One launcher at a time in a run directory."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType

_PATIENCE_S = 10.0  # for ranks of a killed launcher to be gone


class RunLock:
    """Exclusive use of a run directory, from now until `release` or the death of this process, however it dies.

    An flock on the file LOCK, which says who holds it; the file itself means nothing and stays.

    Args:
        run_directory: created if missing.
        patience_s: seconds to wait for another holder to go.

    Raises:
        ValueError: another process holds it; says which.
    """

    def __init__(self, run_directory: Path, patience_s: float = _PATIENCE_S) -> None:
        run_directory.mkdir(parents=True, exist_ok=True)
        path = run_directory / "LOCK"
        self._file = path.open("a+")
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    self._file.close()
                    raise ValueError(
                        f"'{run_directory}' is in use by {_describe(path)}. Wait for it, stop it, "
                        "or choose another name (name=...)"
                    ) from None
                time.sleep(0.1)
        # A forked child would share the lock and could keep it beyond this process's death.
        os.register_at_fork(after_in_child=self._file.close)
        holder = {
            "host": platform.node(),
            "pid": os.getpid(),
            "since": datetime.now().isoformat(" ", "seconds"),
        }
        self._file.truncate(0)
        self._file.write(json.dumps(holder) + "\n")
        self._file.flush()

    def release(self) -> None:
        """Let others in. A second call does nothing."""
        self._file.close()

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _describe(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has just started"
