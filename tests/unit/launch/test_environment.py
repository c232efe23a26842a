from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

import launch.environment
from launch.environment import capture_environment


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(
        ["git", *identity, *arguments], cwd=directory, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_commit_diff_packages_and_hardware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = tmp_path / "clone"
    clone.mkdir()
    git(clone, "init", "-q")
    (clone / "file.txt").write_text("before\n")
    git(clone, "add", ".")
    git(clone, "commit", "-q", "-m", "first")
    monkeypatch.setattr(launch.environment, "_ROOT", clone)

    clean = capture_environment(tmp_path / "clean")
    assert (clean["commit"], clean["dirty"]) == (git(clone, "rev-parse", "HEAD"), False)
    assert (tmp_path / "clean" / "env" / "git.diff").read_text() == ""

    (clone / "file.txt").write_text("after\n")
    assert capture_environment(tmp_path / "run")["dirty"] is True
    env = tmp_path / "run" / "env"
    assert "+after" in (env / "git.diff").read_text()
    packages = (env / "packages.txt").read_text().splitlines()
    assert any(line.startswith("deepspeed==") for line in packages)
    assert packages == sorted(packages, key=str.lower)
    assert json.loads((env / "hardware.json").read_text())["cores"] >= 1


def test_no_secret_leaves_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "very-secret-value")
    monkeypatch.setenv("HF_TOKEN", "very-secret-value")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    capture_environment(tmp_path)
    assert json.loads((tmp_path / "env" / "variables.json").read_text())["OMP_NUM_THREADS"] == "1"
    for path in (tmp_path / "env").iterdir():
        assert "very-secret-value" not in path.read_text()


def test_outside_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.environment, "_ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert capture_environment(tmp_path / "run")["commit"] is None
