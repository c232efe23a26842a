"""Metrics of a run: `metrics.jsonl` is the source of truth, Weights & Biases mirrors it.

Resuming. A run that goes on from step s first cuts every line with a later step, so that the file reads as if
the run had never been interrupted. Whatever belongs to step s must therefore be logged before the checkpoint
of step s is marked complete.

Weights & Biases. The run id is kept in `RUN_DIRECTORY/wandb_run_id`, so a resumed run goes on under the same
id. Our own step is logged as `step` and is the x axis of every chart; a step that is repeated after a resume
is logged a second time. Without a login the run is recorded offline, in one `offline-run-*` directory for
each start, all with the same id; `wandb sync RUN_DIRECTORY/wandb/offline-run-*` sends files of one id in the order
of their start times into one run (`--dry-run` shows what it would send).
"""

from __future__ import annotations

import itertools
import json
import netrc
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from launch.config import RunConfig, Stage
from launch.metrics_log import MetricsLog, read_metrics

if TYPE_CHECKING:
    from launch.reconstructions import Reconstruction  # torch, which most readers of metrics do without


TABLES = 10
"""Tables of reconstructions in a run, besides that of the first validation."""


class Tracker:
    """Writes metrics.jsonl on rank 0 and mirrors it to Weights & Biases; does nothing on other ranks.

    Once the mirror has started, its errors are printed and end it, not the training.

    Args:
        run_dir: the stage's run directory; must exist.
        config: the run's configuration, which the mirror shows.
        stage: written into every line.
        rank: this process's rank.
        resume_step: the step that the run goes on from; 0 starts afresh.
        environment: a few facts for the mirror, from `launch.environment.capture_environment`.
    """

    def __init__(
        self,
        run_dir: Path,
        config: RunConfig,
        stage: Stage,
        rank: int,
        resume_step: int = 0,
        environment: Mapping[str, Any] | None = None,
    ) -> None:
        self.stage = stage
        self._train = config.train
        self._log: MetricsLog | None = None
        self._wandb: Any = None
        self._elapsed_before_s = 0.0
        self._start = time.monotonic()
        if rank != 0:
            return
        self._log = MetricsLog(run_dir / "metrics.jsonl", resume_step)
        earlier = [record["time_s"] for record in read_metrics(self._log.path) if "time_s" in record]
        self._elapsed_before_s = earlier[-1] if earlier else 0.0
        mode = wandb_mode(config)
        if mode != "disabled":
            self._wandb = _start_wandb(run_dir, config, stage, mode, resume_step, environment or {})

    @property
    def elapsed_s(self) -> float:
        """Seconds this run has been training for, including before it was resumed."""
        return self._elapsed_before_s + time.monotonic() - self._start

    def log(self, record: Mapping[str, Any]) -> None:
        """Write one line; it needs the keys `split` and `step`. `stage` and `time_s` are added."""
        if self._log is None:
            return
        line = {"stage": self.stage, **record}
        line.setdefault("time_s", round(self.elapsed_s, 3))
        self._log.append(line)
        if self._wandb is not None:
            values = {
                f"{record['split']}/{key}": value
                for key, value in line.items()
                if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
            }
            self._mirror({"step": record["step"], **values})

    def log_code_counts(self, step: int, counts: list[list[int]]) -> None:
        """Keep how often every code of every level was used at a validation.

        Written to `RUN_DIRECTORY/code_counts/step-00000200.json`; the mirror gets a histogram per level, whose bins
        join codes where there are more than wandb takes.
        """
        if self._log is None:
            return
        directory = self._log.path.parent / "code_counts"
        directory.mkdir(exist_ok=True)
        (directory / f"step-{step:08d}.json").write_text(json.dumps({"step": step, "counts": counts}) + "\n")
        if self._wandb is not None:
            self._mirror({"step": step} | _histograms(counts))

    def log_reconstructions(self, step: int, samples: Sequence[Reconstruction]) -> None:
        """Keep what the codec made of validation samples.

        Written to `RUN_DIRECTORY/reconstructions/step-00000200.txt`; the mirror gets a table at the first validation
        and at the first after every tenth of the run, because each table is a file of its own there.
        """
        if self._log is None or not samples:
            return
        directory = self._log.path.parent / "reconstructions"
        directory.mkdir(exist_ok=True)
        parts = [
            f"# {number}: {sample.num_wrong} of {sample.num_tokens} tokens wrong, [wanted|got]\n{sample.marked}\n"
            for number, sample in enumerate(samples)
        ]
        (directory / f"step-{step:08d}.txt").write_text("\n".join(parts), encoding="utf-8")
        if self._wandb is not None and self._table_is_due(step):
            import wandb

            table = wandb.Table(columns=list(samples[0]._fields), data=[list(sample) for sample in samples])
            self._mirror({"step": step, "validation/reconstructions": table})

    def _table_is_due(self, step: int) -> bool:
        before = max(0, step - self._train.eval_every)
        return before == 0 or step * TABLES // self._train.steps > before * TABLES // self._train.steps

    def sync(self) -> None:
        """Force metrics.jsonl to the disk; call it before a checkpoint is marked complete."""
        if self._log is not None:
            self._log.sync()

    def close(self, exit_code: int = 0) -> None:
        """Finish both; a second call does nothing."""
        if self._log is not None:
            self._log.close()
        if self._wandb is not None:
            try:
                self._wandb.finish(exit_code=exit_code)
            except Exception as error:
                self._say_lost(error)
            self._wandb = None

    def _mirror(self, values: dict[str, Any]) -> None:
        # wandb sends through a process of its own. Slurm's SIGTERM to a whole job ends that at once, while this one
        # has a checkpoint to save.
        try:
            self._wandb.log(values)
        except Exception as error:
            self._say_lost(error)
            self._wandb = None

    def _say_lost(self, error: Exception) -> None:
        print(
            f"wandb has ended ({type(error).__name__}: {error}); metrics.jsonl goes on without it",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(exit_code=0 if kind is None else 1)


def _histograms(counts: list[list[int]]) -> dict[str, Any]:
    import wandb

    found = {}
    for level, by_code in enumerate(counts):
        width = -(-len(by_code) // wandb.Histogram.MAX_LENGTH)
        edges = [*range(0, len(by_code), width), len(by_code)]
        bins = [sum(by_code[start:end]) for start, end in itertools.pairwise(edges)]
        found[f"validation/codes_{level}"] = wandb.Histogram(np_histogram=(bins, edges))
    return found


def wandb_mode(config: RunConfig) -> Literal["online", "offline", "disabled"]:
    """`tracking.wandb` with `auto` resolved: WANDB_MODE if set, else online with a login, else offline."""
    wanted = config.tracking.wandb
    if wanted != "auto":
        return wanted
    from_environment = os.environ.get("WANDB_MODE")
    for mode in ("online", "offline", "disabled"):
        if mode == from_environment:
            return mode
    return "online" if _has_login() else "offline"


def _has_login() -> bool:
    """A key or token for Weights & Biases is there. Asking wandb itself could prompt on a terminal."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    own_server = os.environ.get("WANDB_BASE_URL")
    hosts = [urlsplit(own_server).netloc] if own_server else ["api.wandb.ai", "api.forge.coreweave.com"]
    candidates = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for path in (Path(name).expanduser() for name in candidates if name):
        if path.is_file():
            try:
                found = netrc.netrc(path)
            except (netrc.NetrcParseError, OSError):
                return False
            return any(host in found.hosts for host in hosts)
    return False


def _start_wandb(
    run_dir: Path,
    config: RunConfig,
    stage: Stage,
    mode: Literal["online", "offline"],
    resume_step: int,
    environment: Mapping[str, Any],
) -> Any:
    import wandb  # a second to import, and only rank 0 needs it

    def start(actual: Literal["online", "offline"]) -> Any:
        return wandb.init(
            project=config.tracking.project,
            entity=config.tracking.entity,
            id=_run_id(run_dir),
            name=f"{config.name}-{stage}",
            group=config.name,
            job_type=stage,
            dir=str(run_dir),
            mode=actual,
            # Offline runs cannot resume; `wandb sync` joins the parts by their id.
            resume="allow" if actual == "online" else None,
            config={**config.model_dump(mode="json", exclude={"stages"}), "environment": dict(environment)},
            settings=wandb.Settings(
                console="off",  # the launcher's output and progress bars are not metrics
                save_code=False,
                disable_git=True,  # a remote's URL may hold a token; the commit is in `environment`
                silent=True,
                init_timeout=60,
            ),
        )

    try:
        run = start(mode)
    except wandb.errors.Error as error:
        # Compute nodes often have a login but no way out. Only an explicit `online` insists.
        if config.tracking.wandb == "online" or mode == "offline":
            raise
        print(f"wandb cannot be reached ({error}); recording offline", file=sys.stderr)
        mode = "offline"
        run = start(mode)
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    if mode == "offline":
        print(f"wandb: offline; send with: wandb sync {run_dir / 'wandb'}/offline-run-*")
    else:
        print(f"wandb: {run.url}" + (f" (resumed at step {resume_step})" if resume_step else ""))
    return run


def _run_id(run_dir: Path) -> str:
    """The id kept in the run directory, drawn when the run starts for the first time."""
    path = run_dir / "wandb_run_id"
    if path.exists() and (known := path.read_text(encoding="utf-8").strip()):
        return known
    drawn = secrets.token_hex(4)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(drawn + "\n", encoding="utf-8")
    temporary.replace(path)
    return drawn
