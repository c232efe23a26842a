from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from launch import report_figures
from launch.config import load_config
from launch.figure_style import Figure
from launch.metrics_log import MetricsLog
from launch.report_formats import duration, number, percent
from launch.report_run import headline_rows, read_inputs, write_report

ROOT = Path(__file__).parents[3]
TINY = ROOT / "configs" / "tiny_rqvae.yaml"
VOID = {"meta", "link", "br", "hr", "img", "input", "path", "use", "rect", "circle", "line", "polygon"}


def curve(stage: str, steps: int) -> list[dict[str, Any]]:
    lines = []
    for step in range(10, steps + 1, 10):
        loss = 2 + 6 * math.exp(-step / (steps / 4)) + 0.2 * math.sin(step)
        line = {
            "stage": stage,
            "phase": "frozen" if stage == "rqvae" and step <= 200 else "full",
            "step": step,
        }
        train = {**line, "split": "train", "loss": loss, "token_accuracy": 1 - loss / 8.5}
        if stage == "rqvae" and step > 400:
            for level in range(8):
                train[f"codebook/perplexity_{level}"] = (
                    1024 * (0.5 + 0.05 * level) * (1 - math.exp(-step / 400))
                )
                train[f"codebook/used_fraction_{level}"] = 1 - 0.3 * math.exp(-step / 200) - 0.01 * level
                train[f"codebook/dead_replaced_{level}"] = step // (level + 2)
                train[f"codebook/distortion_{level}"] = 0.7**level
        lines.append(train)
        if step % 100 == 0:
            lines.append(
                {**line, "split": "validation", "loss": loss + 0.3, "token_accuracy": 0.95 - loss / 8.5}
            )
    return lines


REPORT: dict[str, Any] = {
    "reconstruction": {"token_accuracy": 0.97312, "chunk_accuracy": 0.9123, "nats_per_token": 0.1172},
    "bits_per_byte": {
        "uniform": 4.12, "unigram": 3.21, "base_lm": 1.98, "latent_bound": 4.61,
        "latent_codes": 4.556, "latent_reconstruction": 0.054,
    },
    "perplexity": {"uniform": 4096, "unigram": 812.3, "base_lm": 71.2, "latent_bound": 18211.0},
    "codebook": {
        "levels": [
            {
                "perplexity": 900.0 - 20 * level, "perplexity_normalized": 0.88, "used_fraction": 0.99,
                "dead_replaced": 3 * level, "distortion": 2.0 * 0.6**level, "nats_per_code": 6.6,
                "token_accuracy": 1 - 0.9 * 0.62 ** (level + 1),
            }
            for level in range(8)
        ],
        "histograms": [[int(900 * math.exp(-i / (60 + 9 * n))) for i in range(256)] for n in range(8)],
    },
    "rate": {"codes_bits_per_token": 20.0, "log2_vocabulary": 12.0},
    "speed": {
        "ar_tokens_per_s": 412.0, "latent_tokens_per_s": 1203.0, "speedup": 2.92, "ar_ms": 2.43,
        "speedup_over_lean_loop": 1.31, "encode_ms": 0.05, "repeats": 5,
        "depth_ms": 0.32, "spatial_ms": 0.41, "decode_ms": 0.1, "kept_tokens": 128, "batch_size": 1,
        "rows": [
            {"name": "base LM, generate", "tokens_per_s": 412.0, "ms_per_token": 2.43,
             "spread_ms_per_token": 0.2, "speedup_over_generate": 1.0, "layer_calls_per_token": 2,
             "flops_per_token": 5.6e6, "note": "transformers, dynamic cache"},
            {"name": "latent, streaming", "tokens_per_s": 1203.0, "ms_per_token": 0.83,
             "speedup_over_generate": 2.92, "layer_calls_per_token": 3.0, "flops_per_token": 4.1e6,
             "note": None},
        ],
    },
    "compute": {"base_lm": {"train_tokens": 1228800, "train_flops": 1.3e13, "wall_s": 212.0},
                "rqvae": {"train_tokens": 3072000, "train_flops": 9e13, "wall_s": 6531.0}},
    "evaluation": {"split": "test", "tokens": 51200, "bytes": 166400, "documents": 431},
    "environment": {"commit": "0123abc", "dirty": False, "torch": "2.13.0", "accelerators": [], "cores": 2},
    "samples": {
        "reconstructions": [
            {"tokens": [["Return", "Return", True], [" the", " the", True], [" <b>", " a", False],
                        ["\n", "", False]]}
        ],
        "generations": [{"prompt": "Return the", "latent": " value <script>", "base_lm": " number"}],
    },
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path)


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_report(write_run(tmp_path_factory.mktemp("run"))).read_text()


def write_run(tmp_path: Path) -> Path:
    for stage, steps in (("base_lm", 600), ("rqvae", 1500), ("rq_transformer", 900)):
        (tmp_path / stage).mkdir()
        log = MetricsLog(tmp_path / stage / "metrics.jsonl")
        for line in curve(stage, steps):
            log.append(line)
        log.close()
        (tmp_path / stage / "config.yaml").write_text(load_config(TINY, stage=stage).to_yaml())  # type: ignore[arg-type]
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    return tmp_path


class Page(HTMLParser):
    """Checks nesting and collects ids, references, text and headings."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.headings: list[int] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def test_the_page_is_whole_and_needs_no_network(html: str) -> None:
    page = Page(html)
    assert "://" not in html
    assert "url(#" in html or "clip" not in html
    assert "<script" not in html
    for tag, name, value in page.attributes:
        assert name not in ("src", "srcset", "action"), (tag, name, value)
        if name == "href":
            assert value.removeprefix("#") in page.ids, value
        if name in ("aria-labelledby", "clip-path") and value:
            assert value.removeprefix("url(#").removesuffix(")") in page.ids, value
    assert len(page.ids) == len(set(page.ids))
    assert all(after - before <= 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert page.headings.count(1) == 1
    assert "Run:" not in page.text


def test_numbers_stand_where_a_reader_looks_for_them(html: str) -> None:
    text = " ".join(Page(html).text.split())
    for expected in (
        "Latent decoding is 2.92 times as fast",
        "Against the leanest autoregressive loop measured here it is 1.31 times as fast",
        "at most 4.61 (a bound); the base LM's are 1.98",
        "no better than a unigram model's 3.21",
        "97.3 % of held-out tokens",
        "Latent modelupper bound ≤ 4.61 ≤ 18,211 1,203 2.92×",
        "1 h 48 min",
        "every 4 tokens as 8 residual codes out of 1024, 20.0 bits per token",
        "431 documents, 51,200 tokens (166,400 bytes) of the test split",
    ):
        assert expected in text, expected


def test_text_from_models_is_escaped_and_wrong_tokens_are_marked(html: str) -> None:
    assert "<del> &lt;b&gt;</del><ins> a</ins>" in html
    assert "<del>⏎\n</del><ins>∅</ins>" in html
    assert "value &lt;script&gt;" in html


def test_missing_parts_say_so_with_the_command(run: Path) -> None:
    (run / "report.json").unlink()
    shutil.rmtree(run / "rq_transformer")
    text = " ".join(Page(write_report(run).read_text()).text.split())
    assert "The models have not been evaluated. Run: python launch/eval.py --model" in text
    assert "Decoding speed has not been measured. Run: python launch/benchmark.py inference" in text
    assert "RQ-transformer (latent model) has not been trained here. Run: deepspeed launch/train.py" in text


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the rendering of the drawings out: a tenth of a second each."""
    monkeypatch.setattr(report_figures, "finish", lambda _, caption: Figure("<svg></svg>", caption))


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("part", sorted(REPORT))
def test_any_part_may_be_missing_or_alone(run: Path, part: str) -> None:
    for stage in ("base_lm", "rqvae", "rq_transformer"):
        (run / stage / "metrics.jsonl").unlink()
    contents = [{key: value for key, value in REPORT.items() if key != part}, {part: REPORT[part]}]
    if isinstance(REPORT[part], dict):
        keys = list(REPORT[part])
        halves = (keys[::2], keys[1::2])
        contents += [{**REPORT, part: {key: REPORT[part][key] for key in half}} for half in halves]
    for content in contents:
        (run / "report.json").write_text(json.dumps(content))
        Page(write_report(run).read_text())


def test_the_bound_is_labelled_and_only_the_bound() -> None:
    rows = headline_rows(REPORT)
    assert [row["title"] for row in rows if row["is_bound"]] == ["Latent model"]
    assert [row["title"] for row in rows if row["is_part"]] == [
        "of this, the codes",
        "of this, the tokens given the codes",
    ]


def test_tokens_as_codes_lose_nothing_of_a_latent() -> None:
    """Anchors have token accuracy by level, and no distortion to draw."""
    codec = {"compression_factor": 4, "codebook_levels": 2, "codebook_size": 1025}
    levels = [{"distortion": distortion, "token_accuracy": 0.5} for distortion in (0.0, 0.0)]
    drawn = report_figures.codebooks({"codebook": {"levels": levels}}, codec)
    assert [figure.caption.startswith("Token accuracy") for figure in drawn] == [True]


def test_nothing_to_report_is_an_error(tmp_path: Path, run: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"neither report\.json nor the metrics"):
        read_inputs(empty)
    with pytest.raises(ValueError, match="give the directory above it"):
        read_inputs(run / "rqvae")
    (run / "report.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_inputs(run)


def test_command(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "elsewhere" / "page.html"
    run.mkdir()
    (run / "report.json").write_text(json.dumps({"rate": REPORT["rate"]}))
    command = [sys.executable, str(ROOT / "launch" / "report.py")]
    result = subprocess.run(
        [*command, str(run), "--out", str(out)], capture_output=True, text=True, check=True
    )
    assert result.stdout == f"report: {out}\n"
    assert out.is_file()
    failed = subprocess.run([*command, str(tmp_path / "none")], capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr


def test_number_formats() -> None:
    assert [number(v) for v in (0.0, 0.1234, 1.98, 12.0, 412.0, 1203.4, 7, 1e-5, math.nan, None)] == [
        "0.00", "0.123", "1.98", "12.0", "412", "1,203", "7", "1.00e-05", "not finite", "–",
    ]  # fmt: skip
    assert [percent(v) for v in (0.97312, 0.99999, 1.0, None)] == ["97.3 %", "99.9 %", "100.0 %", "–"]
    assert [duration(v) for v in (3.14159, 75, 6531, 90000, None)] == [
        "3.14 s",
        "1 min 15 s",
        "1 h 48 min",
        "1 d 1 h",
        "–",
    ]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium here to show the page in")
def test_chromium_lays_the_page_out_without_sideways_scrolling(html: str, tmp_path: Path) -> None:
    """Lays the page out as a phone would and asks for its width."""
    probe = "<script>document.title = 'w' + document.documentElement.scrollWidth;</script></body>"
    (tmp_path / "probe.html").write_text(html.replace("</body>", probe))
    result = subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=500,900", "--dump-dom", (tmp_path / "probe.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "<title>w500</title>" in result.stdout or "<title>w485</title>" in result.stdout
