"""The page over many runs: what it says, and that it works in a real browser without a network."""

from __future__ import annotations

import html as escaping
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch.experiments import resolve
from launch.report import main
from launch.report_answers import Answer, answers
from launch.report_scaling import fit_power_law, gaps, series
from launch.report_sweeps import qwen3_sizes, read_sources, write_overview
from launch.report_trials import learned
from launch.results import write_results
from launch.sweep import PlannedTrial, load_sweep, plan_trials
from launch.trial_records import write_record
from tests.unit.launch.test_report import Page

ROOT = Path(__file__).parents[3]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium here to show the page in (apt-get install chromium)"
)


def invented(trial: PlannedTrial) -> dict[str, Any]:
    """A report.json with figures that depend on the trial."""
    codec, width = trial.config.codec, trial.config.codec.backbone.architecture.hidden_size
    ar = 8.0 * width**-0.25
    bound = ar * {"identity": 1.05, "anchor": 1.1, "rqvae": 1.5}[codec.model] + 0.01 * len(trial.name)
    bits = {"base_lm": ar, "unigram": 3.8, "uniform": 4.5}
    if trial.stages != ("base_lm",):
        bits |= {"latent_bound": bound, "latent_codes": 0.8 * bound, "latent_reconstruction": 0.2 * bound}
    level = {"perplexity_normalized": 0.7, "used_fraction": 0.876, "nats_per_code": 5.0}
    sizes = codec.codebook_sizes
    rate = sum(map(math.log2, sizes)) / codec.compression_factor
    accuracy = 1 - 0.01 * codec.compression_factor
    return {
        "bits_per_byte": bits,
        "reconstruction": {"continuous_token_accuracy": accuracy, "token_accuracy": accuracy - 0.1},
        "bits_per_byte_intervals": {name: [value - 0.1, value + 0.1] for name, value in bits.items()},
        "brier_lm": {"base_lm": 2.0, "latent": 1.0},
        "rate": {"codes_bits_per_token": rate},
        "codebook": {"levels": [level] * len(sizes)},
        "speed": {
            "ar_tokens_per_s": 100.0,
            "latent_tokens_per_s": 100.0 * codec.compression_factor,
            "speedup": float(codec.compression_factor),
            "speedup_over_lean_loop": codec.compression_factor / 2,
            "rows": [{"name": "base LM, prompt lookup", "tokens_per_s": 130.0, "speedup_over_generate": 1.3}],
        },
        "compute": {"total_latent": {"train_tokens": 10, "train_flops": 1e12, "wall_s": 5.0}},
        "samples": {
            "reconstructions": [{"tokens": [["Return", "Return", True], [" <b>", " a", False]]}],
            "generations": [{"prompt": "Raised", "latent": " when <script>"}],
        },
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of four sweeps, one trial of which has failed, and of Unsloth without a GPU."""
    directory = tmp_path_factory.mktemp("experiments")
    for name in ("compression", "codebook", "quantizer", "model_size", "convolutions", "unsloth"):
        sweep = load_sweep(ROOT / "configs" / "sweeps" / f"{name}.yaml")
        trials = plan_trials(sweep, [f"run_root={directory}"])
        for trial in trials:
            if trial.spec.not_run:
                write_record(trial, {"state": "not run", "reason": trial.spec.not_run})
            elif trial.name == "rq-k16-d8":
                write_record(
                    trial, {"state": "failed", "reason": "train-rqvae ended with status 1: no <memory>"}
                )
            else:
                flops = resolve(trial, data_is_there=False).flops
                record = {"state": "finished", "planned_flops": flops}
                write_record(trial, record)
                (trial.directory / "report.json").write_text(json.dumps(invented(trial)))
        write_results(sweep, trials, directory / "sweeps" / name)
    return directory / "sweeps"


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    sweeps = [root / name for name in ("compression", "codebook", "quantizer", "model_size", "unsloth")]
    return write_overview(sweeps).read_text()


def answer(root: Path, part: str, *sweeps: str) -> Answer:
    found = answers(read_sources([root / name for name in sweeps]), qwen3_sizes())
    return next(row for row in found if part in row.question)


def test_the_page_is_whole_and_needs_no_network(page: str) -> None:
    parsed = Page(page)
    assert "://" not in page
    for tag, name, value in parsed.attributes:
        assert name not in ("src", "srcset", "action"), (tag, name, value)
        if name == "href" and value.startswith("#"):
            assert value.removeprefix("#") in parsed.ids, value
        if name in ("aria-labelledby", "clip-path") and value:
            assert value.removeprefix("url(#").removesuffix(")") in parsed.ids, value
    assert len(parsed.ids) == len(set(parsed.ids))
    assert page.count("<svg") == 6  # frontier, rate, two heat maps, scaling, gap
    assert "<del> &lt;b&gt;</del><ins> a</ins>" in page
    assert "no &lt;memory&gt;" in page
    assert "prompt lookup" in page
    assert "EXTRAPOLATION" in page


def test_links_lead_to_the_runs(page: str, root: Path) -> None:
    links = {
        value for tag, name, value in Page(page).attributes if name == "href" and not value.startswith("#")
    }
    assert len(links) > 20
    for target in links:
        assert (root / "compression" / target).exists(), target


def test_answers_come_from_the_sweeps_and_from_nowhere_else(root: Path) -> None:
    found = answer(root, "plain AR's", "compression")
    best, ar = 8 * 256**-0.25 * 1.1 + 0.01 * len("anchor-k4"), 8 * 256**-0.25  # the shortest name
    assert found.number == f"{best / ar:.2f} x"
    assert [name for name, _ in found.links] == ["anchor-k4"]
    assert "1 seed" in found.certainty
    assert answer(root, "codebooks used", "compression").number == "87.6 %"
    race = answer(root, "How much faster", "compression")  # no sweep of seeds among these
    assert race.number == "1.09 x bits, 2.00 x speed"  # the fewest bits of what is faster, not the fastest
    first, *others = race.answer.split("; ")
    assert first.startswith("identity codec, K=4") and "at 2.00 times its speed" in first
    speeds = [float(re.findall(r"at ([\d.]+) times its speed", text)[0]) for text in others]
    assert speeds[-1] <= 1 and [speed > 1 for speed in speeds] == sorted(
        (speed > 1 for speed in speeds), reverse=True
    )
    by_k = answer(root, "as K grows", "compression")
    assert "over a lean loop of the base LM: anchors, K=4, D=2, 5 bits per token: " in by_k.answer
    assert by_k.number == "8.00 x at most"  # not the 16 times of generate
    assert answer(root, "Unsloth", "unsloth").answer == "needs a GPU to answer"
    assert answer(root, "Which quantizer", "quantizer").answer.startswith("EMA codebooks, straight-through")
    lost = answer(root, "convolutions", "convolutions")
    assert lost.number == "2.0 % to 16.0 % lost"
    assert "K=4: 96.0 % of the tokens right, 86.0 % at 20.0 bits per token" in lost.answer
    assert answer(root, "8B", "model_size").number.endswith("(extrapolation)")
    for part in ("Which quantizer", "8B", "standard tasks"):
        row = answer(root, part, "compression")
        assert (row.answer, row.sweep, row.number) == ("not run", None, "")
        assert row.command.startswith("python launch/")


def test_a_bound_of_drawn_codes_counts_where_it_is_lower(root: Path) -> None:
    results = json.loads((root / "quantizer/results.json").read_text())
    anchor, other = (
        next(trial for trial in results["trials"] if trial["trial"] == name) for name in ("anchor-k4", "beam")
    )
    assert learned(results)[0] is anchor
    other["figures"]["stochastic_bound"] = {**anchor["figures"]["bound"], "mean": 1.0, "interval": [0.9, 1.1]}
    assert learned(results)[0] is other
    row = next(row for row in answers({"quantizer": results}, {}) if row.question == "Which quantizer?")
    assert (row.number, row.interval[:8]) == ("1.00 bits per byte", "0.900 to")
    # Above the other, it says less.
    other["figures"]["stochastic_bound"]["mean"] = 99.0
    assert learned(results)[0] is anchor


def test_a_codec_with_a_level_that_says_nothing_never_wins(root: Path) -> None:
    results = json.loads((root / "quantizer/results.json").read_text())

    def row(question: str) -> Answer:
        found = answers({"quantizer": results}, {})
        return next(row for row in found if row.question == question)

    winner = next(trial for trial in results["trials"] if trial["trial"] == "ema")
    assert row("Which quantizer?").answer.startswith(winner["about"])
    run = next(run for run in results["runs"] if run["trial"] == "ema")
    run["codebook"] = {**run["codebook"], "nats_per_code": [*run["codebook"]["nats_per_code"][:-1], 0.001]}
    assert learned(results)[-1] is winner
    told = row("Which quantizer?").answer
    assert not told.startswith(winner["about"])
    assert told.count("collapsed") == 1
    assert "ema " not in row("Is uniform usage a goal?").answer


def test_the_trend_is_over_what_was_trained_longest(root: Path) -> None:
    runs = json.loads((root / "model_size/results.json").read_text())["runs"]
    for run in runs:  # short training is worse
        if run["codec"] == "anchor" and not run["trial"].endswith("-1000"):
            run["figures"]["bound"] += 1
    long = {
        run["figures"]["bound"] for run in runs if run["codec"] == "anchor" and run["trial"].endswith("-1000")
    }
    assert {bits for _, bits in series(runs, "anchor", "bound")} == long
    by_size = gaps(runs)
    assert [len(places) for places in by_size.values()] == [3, 3, 3]
    for places in by_size.values():
        flops, ratios = zip(*places, strict=True)
        assert list(flops) == sorted(flops) and ratios[2] < ratios[0]
    identity = next(run for run in runs if run["codec"] == "identity")
    assert gaps([identity, *(run for run in runs if run["codec"] is None)]) == {}


def test_a_known_power_law_is_found() -> None:
    law = fit_power_law([10.0, 100.0, 1000.0], [5 * size**-0.3 for size in (10.0, 100.0, 1000.0)])
    assert law is not None
    assert (law.scale, law.exponent) == (pytest.approx(5), pytest.approx(0.3))
    assert law(1e6) == pytest.approx(5 * 1e6**-0.3)
    assert fit_power_law([10.0, 10.0], [1.0, 2.0]) is None


def test_wrong_sources_are_named(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    assert main([str(root / "codebook"), str(tmp_path / "run")]) == 2
    assert "neither results.json (a sweep) nor report.json (a run)" in capsys.readouterr().err
    assert main([str(root / "codebook"), str(root / "codebook/results.json")]) == 2
    assert "another source named codebook" in capsys.readouterr().err
    (tmp_path / "run/report.json").write_text(json.dumps({"bits_per_byte": {"base_lm": 2.0}}))
    pngs = ["--pngs", str(tmp_path / "pngs")]
    assert (
        main([str(root / "codebook"), str(tmp_path / "run"), "--out", str(tmp_path / "page.html"), *pngs])
        == 0
    )
    drawn = sorted((tmp_path / "pngs").iterdir())
    assert [path.name for path in drawn] == [f"figure-{number}.png" for number in range(1, len(drawn) + 1)]
    assert len(drawn) >= 4
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert "codebook, run" in " ".join((tmp_path / "page.html").read_text().split())


def shown(page: str, directory: Path, probe: str, width: int = 1000) -> dict[str, Any]:
    """What a script makes of the page after it was laid out `width` pixels wide in a frame of its own.

    Scripts' errors and anything the page tries to load are part of it. Nothing can be resolved to an address.
    """
    catch = "addEventListener('error', (e) => parent.errors.push(String(e.message)), true);"
    catcher = f"<script>parent.errors = []; {catch}</script>"
    framed = page.replace("<head>", "<head>" + catcher, 1)
    outer = f"""<!doctype html><meta charset="utf-8"><title>probe</title><pre id="found"></pre>
<iframe id="frame" style="width: {width}px; height: 900px; border: 0" srcdoc="{escaping.escape(framed)}"></iframe>
<script>
document.getElementById("frame").addEventListener("load", (event) => {{
  const page = event.target.contentDocument, view = event.target.contentWindow;
  const loaded = view.performance.getEntriesByType("resource").map((entry) => entry.name);
  let found = {{}};
  try {{ found = (() => {{ {probe} }})(); }} catch (error) {{ errors.push(String(error)); }}
  document.getElementById("found").textContent = JSON.stringify({{ ...found, errors, loaded }});
}});
</script>"""
    (directory / "probe.html").write_text(outer)
    result = subprocess.run(
        [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={directory / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=5000", "--window-size=1200,1000",
            "--dump-dom", (directory / "probe.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    found = re.search(r'<pre id="found">(.*?)</pre>', result.stdout, flags=re.DOTALL)
    assert found is not None and found[1], result.stdout[:2000]
    values: dict[str, Any] = json.loads(escaping.unescape(found[1]))
    return values


REACTS = """
  const get = (id) => page.getElementById("ex-" + id), words = () => get("words").textContent;
  const set = (id, value, kind) => { get(id).value = value; get(id).dispatchEvent(new view.Event(kind)); };
  const count = (id, kind) => get(id).querySelectorAll("." + kind).length;
  const figures = [...page.querySelectorAll("figure svg")].map((svg) => {
    const box = svg.getBoundingClientRect();
    return box.width > 100 && box.height > 50 && svg.querySelectorAll("path, text").length > 10;
  });
  const start = { words: words(), direct: count("seen", "direct"), future: count("seen", "future") };
  get("latents").dispatchEvent(new view.KeyboardEvent("keydown", { key: "ArrowRight" }));
  const right = words();
  get("latents").children[5].click();
  const clicked = words();
  set("k", "3", "input");
  const k8 = { direct: count("seen", "direct"), latents: get("latents").children.length };
  set("k", "2", "input");
  set("preset", "reference", "change");
  const reference = { words: words(), direct: count("seen", "direct"), future: count("seen", "future") };
  get("attention").click();
  const alone = { future: count("seen", "future"), fed: count("fed", "direct") };
  set("preset", "custom", "change");
  set("stride", "3", "input");
  return { figures, start, right, clicked, k8, reference, alone, custom: words() };
"""


@needs_browser
def test_chromium_shows_the_plots_and_the_explorer_reacts(page: str, tmp_path: Path) -> None:
    found = shown(page, tmp_path, REACTS)
    assert (found["errors"], found["loaded"]) == ([], [])
    assert found["figures"] == [True] * 6
    assert found["start"]["words"].startswith(
        "Latent 3 of 1 layer sees tokens 12 to 15 through the convolutions"
    )
    assert "and tokens 0 to 15 in all" in found["start"]["words"]
    assert (found["start"]["direct"], found["start"]["future"]) == (4, 0)
    assert found["right"].startswith("Latent 4 of 1 layer sees tokens 16 to 19")
    assert found["clicked"].startswith("Latent 5")
    assert found["k8"] == {"direct": 8, "latents": 8}
    # Two layers of kernel 3, stride 2, padding 1 at K=4: 7 tokens around the 20th, and attention without a mask.
    assert "sees tokens 17 to 23 through" in found["reference"]["words"]
    assert (found["reference"]["direct"], found["reference"]["future"]) == (7, 40)
    # Two transposed layers of kernel 4, stride 2, padding 1 feed 10 tokens.
    assert found["alone"] == {"future": 0, "fed": 10}
    assert "no power of the stride 3" in found["custom"]


@needs_browser
@pytest.mark.parametrize("width", [360, 800])
def test_chromium_lays_the_page_out_without_sideways_scrolling(page: str, tmp_path: Path, width: int) -> None:
    found = shown(page, tmp_path, "return { width: page.documentElement.scrollWidth };", width)
    assert found["width"] <= width
    assert found["errors"] == []
