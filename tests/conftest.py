from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path, int], None]]:
    """Mounts a disk of a given number of kB at a directory."""
    mounted: list[Path] = []

    def mount(directory: Path, size_kb: int) -> None:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_kb}k", "tmpfs", str(directory)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("needs the right to mount")
        mounted.append(directory)

    yield mount
    for directory in mounted:
        subprocess.run(["umount", str(directory)], check=True)
