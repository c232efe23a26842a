"""Ranks that die with the launcher that started them.

A launcher that is killed with SIGKILL cannot end its ranks. They would train on as orphans, in the run directory
that the next start of the same command works in.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
from pathlib import Path

_SCRIPTS = ("deepspeed", "torchrun")
_MODULES = ("deepspeed.launcher.launch", "torch.distributed.run", "torch.distributed.launch")
_SET_BY_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
_PR_SET_PDEATHSIG = 1


def die_with_launcher() -> None:
    """Arrange that this process gets SIGKILL when the launcher above it ends, whichever way. Linux only.

    The kernel looks after the direct parent (PR_SET_PDEATHSIG). `deepspeed` has a process above that one, which a
    thread watches. A process that no launcher started is left alone: it may well outlive its shell.
    """
    if not any(name in os.environ for name in _SET_BY_LAUNCHERS) or sys.platform != "linux":
        return
    launchers = _launchers_above(os.getpid())
    if not launchers or _has_lost_its_own(launchers[-1]):
        # It died while this process was still importing.
        print("ends, because its launcher has ended", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        descriptors = [os.pidfd_open(pid) for pid in launchers]
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
    except OSError:
        return  # a kernel before 5.3: the direct parent only
    threading.Thread(target=_watch, args=(descriptors,), name="launcher", daemon=True).start()


def _watch(descriptors: list[int]) -> None:
    ends = select.poll()
    for descriptor in descriptors:
        ends.register(descriptor, select.POLLIN)
    ends.poll()  # returns when one of them has ended
    os.kill(os.getpid(), signal.SIGKILL)


def _launchers_above(pid: int) -> list[int]:
    """The launchers among a process's ancestors, nearest first; a user's own wrapper may stand in between."""
    found: list[int] = []
    while True:
        pid, _ = _parent_and_session(pid)
        if pid == 0:
            return found
        if _is_launcher(_command(pid)):
            found.append(pid)


def _has_lost_its_own(launcher: int) -> bool:
    """Whether it is the lower process of `deepspeed` and the upper one, which started it, is no more.

    It then has another parent, outside of the session that both were in.
    """
    if "deepspeed.launcher.launch" not in _command(launcher).split("\0"):
        return False
    parent, session = _parent_and_session(launcher)
    return parent == 1 or (parent != 0 and session not in (launcher, _parent_and_session(parent)[1]))


def _parent_and_session(pid: int) -> tuple[int, int]:
    status = Path(f"/proc/{pid}/stat").read_text()
    fields = status.rpartition(")")[2].split()  # the name in parentheses may hold anything
    return int(fields[1]), int(fields[3])


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")


def _is_launcher(command: str) -> bool:
    """Whether a command line (words ended by NUL) is a Python that runs a launcher."""
    interpreter, *words = command.split("\0")
    program = next((word for word in words if word and not word.startswith("-")), "")
    files = tuple(name.replace(".", "/") + ".py" for name in _MODULES)
    return "python" in Path(interpreter).name and (
        Path(program).name in _SCRIPTS or program in _MODULES or program.endswith(files)
    )
