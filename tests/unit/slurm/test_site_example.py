"""The example of a site's file, as it is shipped, for jobs that run a snapshot of the program."""

from __future__ import annotations

import subprocess
from pathlib import Path

SLURM = Path(__file__).parents[3] / "slurm"


def test_a_snapshot_runs_in_the_environment_of_the_project(tmp_path: Path) -> None:
    project, snapshot = tmp_path / "project", tmp_path / "project/runs/demo/code/0123abc"
    (project / ".venv/bin").mkdir(parents=True)
    (project / ".venv/bin/activate").write_text("export ACTIVATED=yes\n")
    snapshot.mkdir(parents=True)
    result = subprocess.run(
        ["bash", "-euc", f"source {SLURM}/environment.sh; echo $ACTIVATED $PYTHONPATH"],
        env={
            "PATH": "/usr/bin:/bin",
            "SLURM_SUBMIT_DIR": str(project),
            "RQVAE_CODE": str(snapshot),
            "RQVAE_SITE": str(SLURM / "site.example.sh"),
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["yes", str(snapshot)]
