"""Write a report: one self-contained HTML page, of one run or over many.

    python launch/report.py runs/tiny                              # one run: runs/tiny/report.html
    python launch/report.py runs/sweeps/compression runs/sweeps/codebook runs/tiny --out runs/report.html

A run is the directory with the stages' directories in it; a sweep is a directory with results.json, or that file
(launch/experiments.py). The page needs no network. Whatever was not run is named on it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from launch.report_run import write_report
from launch.report_sweeps import write_overview


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", type=Path, metavar="DIR", help="runs, sweeps or results.json")
    parser.add_argument(
        "--out", type=Path, help="file to write (default: report.html in the first directory)"
    )
    parser.add_argument("--pngs", type=Path, metavar="DIR", help="also write the figures there, as PNG files")
    args = parser.parse_args(arguments)
    first = args.sources[0]
    try:
        if len(args.sources) == 1 and not first.is_file() and not (first / "results.json").is_file():
            written = write_report(first, args.out, args.pngs)
        else:
            written = write_overview(args.sources, args.out, args.pngs)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"report: {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
