"""The checks before a start name the node that is at fault."""

from __future__ import annotations

import json
import time
from pathlib import Path

from slurm import preflight


def report(directory: Path, node: str, time_there: float, *problems: str) -> None:
    (directory / f"{node}.json").write_text(json.dumps({"time": time_there, "problems": problems}))


def test_silent_broken_and_late_nodes(tmp_path: Path) -> None:
    now = time.time()
    report(tmp_path, "good", now + 1)
    report(tmp_path, "broken", now + 1, "3 GPUs answer, 8 are expected")
    report(tmp_path, "late", now - 60)
    nodes = ("good", "broken", "late", "silent")
    problems = preflight.problems_of_nodes(tmp_path, nodes, now, now + 2)
    assert set(problems) == {"broken", "late", "silent"}
    assert problems["late"] == ["its clock is off by -60.0 s"]


def test_gpus() -> None:
    healthy = "0, 3, 0\n1, 3, 0\n"
    assert preflight.problems_of_gpus(healthy, 2) == []
    assert preflight.problems_of_gpus("0, 3, [N/A]\n1, 3, [N/A]\n", 2) == []
    assert preflight.problems_of_gpus(healthy, 4) == ["2 GPUs answer, 4 are expected"]
    assert "uncorrected" in preflight.problems_of_gpus("0, 3, 2\n1, 3, 0\n", 2)[0]
    assert "another process" in preflight.problems_of_gpus("0, 30000, 0\n1, 3, 0\n", 2)[0]


def test_a_directory_that_is_not_shared(tmp_path: Path) -> None:
    (tmp_path / preflight.TOKEN).write_text("of an earlier start")
    assert "stale" in preflight.problems_here(tmp_path, "abc", 1)[0]
    assert "does not see" in preflight.problems_here(tmp_path / "absent", "abc", 1)[0]


def test_slow_node_is_told_from_its_neighbours() -> None:
    pairs = {("a", "b"): 40.0, ("b", "c"): 2.0, ("c", "d"): 1.0, ("d", "e"): 41.0}
    assert set(preflight.slow_nodes(pairs, 20.0)) == {"c"}
    # Where all are slow, it is not one node's fault.
    assert preflight.slow_nodes({("a", "b"): 1.0}, 20.0) == {}
    assert preflight.slow_nodes(pairs, 0.0) == {}


def test_who_did_not_join_the_all_reduce(tmp_path: Path) -> None:
    (tmp_path / "n1.joined").touch()
    assert set(preflight.problems_of_network(tmp_path, ("n1", "n2"))) == {"n2"}
