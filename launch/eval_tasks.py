"""Standard tasks through lm-evaluation-harness, every model a row of the same table.

    python launch/eval_tasks.py --model runs/tiny/model --local-data DIR --max-length 256
    python launch/eval_tasks.py --huggingface runs/pretrained/smollm2-135m --tasks arc_easy,piqa
    torchrun --nproc-per-node 2 launch/eval_tasks.py ...      # each rank takes its part of the requests

Needs the extra `eval` (pip install '.[eval]'). Tasks are those of the harness, with its prompts and metrics. Their
data come from the Hugging Face hub, or with `--local-data DIR` from DIR/TASK/SPLIT.jsonl, one row of the task's
dataset a line. Every figure says whether it is exact, a bound or a heuristic (launch/harness.py).
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from launch.precision import add_precision, placed
from launch.ranks import Ranks, join_ranks, leave_ranks
from launch.report_data import update_report
from launch.scored_models import load_models
from rqvae import BaseLM

TASKS = ("hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande", "lambada_openai", "wikitext")
HIGHER_BOUNDS = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte")
"""Metrics of likelihoods: bounds from above where these are bounds."""
SPLITS = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
"""Names of files, and of the harness's settings for them."""


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="directory of the exported models")
    parser.add_argument(
        "--huggingface",
        type=Path,
        action="append",
        default=[],
        help="causal LM in Hugging Face layout; repeatable",
    )
    parser.add_argument("--identity-codec", type=Path, help="directory of the identity codec's two models")
    parser.add_argument(
        "--tasks", default=",".join(TASKS), help=f"of the harness (default: {','.join(TASKS)})"
    )
    parser.add_argument("--local-data", type=Path, help="directory with TASK/SPLIT.jsonl instead of the hub")
    parser.add_argument("--limit", type=int, help="only the first requests of every task")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens a model sees at once")
    parser.add_argument("--batch-size", type=int, default=8)
    add_precision(parser)
    parser.add_argument("--json", type=Path, help="report to update (default: report.json beside --model)")
    args = parser.parse_args(arguments)
    try:
        if args.model is None and not args.huggingface:
            raise ValueError("give --model, --huggingface or both")
        if args.json is None and args.model is None:
            raise ValueError("--json: say which report to write")
        ranks, device = join_ranks()
        tasks = [name for name in args.tasks.split(",") if name]
        specification = local_tasks(args.local_data, tasks) if args.local_data else tasks
        rows: dict[str, Any] = {}
        for name, model in harness_models(args, ranks, device).items():
            rows[name] = run_tasks(model, specification, args.limit)
        path = args.json or args.model.parent / "report.json"
        if ranks.is_first:
            update_report(path, {"tasks": rows})
            print(f"{table(rows)}\nReport: {path}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    leave_ranks()
    return 0


def harness_models(args: argparse.Namespace, ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """By name: all models to evaluate.

    Raises:
        ValueError: lm-eval is not installed, or a model cannot be loaded.
    """
    try:
        from launch.harness import BaseLMScorer, HarnessModel, LatentScorer
    except ImportError as error:
        raise ValueError(f"{error}: install the extra `eval` (pip install '.[eval]')") from error
    found: dict[str, Any] = {}

    def add(name: str, scorer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        found[name] = HarnessModel(scorer, tokenizer, args.max_length, args.batch_size, ranks, device)

    if args.model is not None:
        tokenizer = AutoTokenizer.from_pretrained(args.model / "tokenizer")
        models = load_models(args.model, tokenizer.eos_token_id, device, args.identity_codec, args.precision)
        if models.base_lm is not None:
            add("base_lm", BaseLMScorer(models.base_lm), tokenizer)
        for name, pair in (("latent", models.pair), ("identity_codec", models.identity)):
            if pair is not None:
                add(name, LatentScorer(pair, tokenizer), tokenizer)
    for directory in args.huggingface:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        base_lm = placed(BaseLM.from_pretrained(directory, tokenizer.eos_token_id), device, args.precision)
        add(directory.name, BaseLMScorer(base_lm), tokenizer)
    return found


def local_tasks(directory: Path, tasks: list[str]) -> list[dict[str, Any]]:
    """Specification of the harness's own tasks on files in place of the hub's datasets.

    Raises:
        ValueError: a task has no files.
    """
    members = []
    for task in tasks:
        files = {split: directory / task / f"{split}.jsonl" for split in SPLITS}
        there = {split: str(path) for split, path in files.items() if path.is_file()}
        if not there:
            raise ValueError(f"'{directory / task}' holds none of {', '.join(f'{s}.jsonl' for s in SPLITS)}")
        members.append(
            {
                "task": task,
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": there},
                # It looks for examples in the training split even when it shows none.
                **{setting: None for split, setting in SPLITS.items() if split not in there},
            }
        )
    return [{"group": "local", "task": members}]


@functools.cache
def task_manager() -> Any:
    """The harness's index of its tasks; reading thousands of files takes longer than small models do."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def run_tasks(model: Any, tasks: list[Any], limit: int | None) -> dict[str, Any]:
    """Results by task: metrics, their kinds, number of documents; empty on all ranks but the first."""
    from lm_eval import simple_evaluate

    model.truncated.clear()
    results = simple_evaluate(
        model,
        tasks=tasks,
        limit=limit,
        bootstrap_iters=0,
        log_samples=False,
        task_manager=task_manager(),
    )
    truncated = set().union(*model.ranks.gather(model.truncated))
    if results is None:
        return {}
    rows: dict[str, Any] = {}
    for task, values in results["results"].items():
        metrics = {
            name.partition(",")[0]: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and "_stderr" not in name and name != "sample_len"
        }
        if not metrics:
            continue  # the group that local tasks are in
        output = results["configs"][task]["output_type"]
        rows[task] = {
            "metrics": metrics,
            "kinds": {name: kind(name, output, model.scorer.is_bound) for name in metrics},
            "documents": results["n-samples"][task]["effective"],
        }
    return {"tasks": rows, "max_length": model.max_length, "contexts_truncated": len(truncated)}


def kind(metric: str, output_type: str, is_bound: bool) -> str:
    """What a figure is: exact, a bound, or a heuristic."""
    if not is_bound:
        return "exact"
    if metric in HIGHER_BOUNDS:
        return "upper bound"
    if output_type == "multiple_choice":
        return "heuristic (answers ranked by bounds)"
    return "exact (by generation)"


def table(rows: dict[str, Any]) -> str:
    """All figures as Markdown."""
    lines = ["| task | metric | model | value | documents | kind |", "| --- | --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        for task, result in row["tasks"].items():
            lines += [
                f"| {task} | {metric} | {name} | {value:.4f} | {result['documents']} | {result['kinds'][metric]} |"
                for metric, value in result["metrics"].items()
            ]
    header, body = lines[:2], sorted(lines[2:])
    return "\n".join(header + body)


if __name__ == "__main__":
    sys.exit(main())
