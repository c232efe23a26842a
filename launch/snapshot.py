"""A copy of the program for a job, so that a requeued job runs what was submitted. Free of torch."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILE = "SNAPSHOT.json"
"""In a snapshot: commit, and whether the files differ from it."""


def take_snapshot(directory: Path, allow_dirty: bool) -> Path:
    """Copy the files under version control into `directory`/COMMIT; returns the copy.

    A clean one that is there is used again. With changes it is made anew, as COMMIT-dirty-N.

    Raises:
        ValueError: as `refuse_changes`.
    """
    commit = _git("rev-parse", "HEAD").strip()
    changed, untracked = refuse_changes(allow_dirty)
    name = commit[:12]
    if changed:
        name += f"-dirty-{len(list(directory.glob(f'{name}-dirty-*')))}"
    target = directory / name
    if target.is_dir():
        return target
    partial = directory / f".{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    for file in [*_git("ls-files").splitlines(), *untracked]:
        if (ROOT / file).is_file():  # not one that was deleted
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, partial / file)
    (partial / FILE).write_text(json.dumps({"commit": commit, "dirty": bool(changed)}) + "\n")
    partial.replace(target)
    return target


def refuse_changes(allow_dirty: bool) -> tuple[list[str], list[str]]:
    """Files that differ from the commit, new ones included, and of these the new ones.

    Raises:
        ValueError: no git clone, or there are some and `allow_dirty` is false.
    """
    changes = _git("status", "--porcelain", "--untracked-files=no").splitlines()
    untracked = _git(
        "ls-files", "--others", "--exclude-standard", "--", "*.py", "*.sh", "*.yaml"
    ).splitlines()
    changed = [line[3:] for line in changes] + untracked
    if changed and not allow_dirty:
        some = ", ".join(changed[:5]) + (", ..." if len(changed) > 5 else "")
        raise ValueError(
            f"{len(changed)} files differ from the commit ({some}): commit them, or submit with --allow-dirty"
        )
    return changed, untracked


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(
            "not a git clone, so no code to take a snapshot of; submit with --no-snapshot"
        ) from error
