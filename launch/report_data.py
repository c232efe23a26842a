"""`report.json`: every command updates its own keys and leaves the others alone. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_report(path: Path) -> dict[str, Any]:
    """The report so far, empty if there is none.

    Raises:
        ValueError: the file is not JSON.
    """
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"'{path}' is not JSON ({error}); remove it and evaluate again") from error


def update_report(path: Path, keys: Mapping[str, Any]) -> None:
    """Replace these keys, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(read_report(path) | dict(keys), indent=2, allow_nan=False) + "\n")
    temporary.replace(path)
