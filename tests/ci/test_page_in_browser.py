"""The report in a real browser, on a screen as narrow as a phone's: nothing breaks, nothing is missing or cut off."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lehr.ci.checks import (
    Check,
    DistributionSeries,
    Found,
    LoopSeries,
    Outcome,
    Report,
    StepSeries,
    judged,
)
from lehr.ci.page import page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDE = 390  # of an iPhone 12 to 15
PROBE = """<script>
const errors = [];
window.addEventListener("error", e => errors.push(String(e.message || e.target.src)), true);
window.addEventListener("load", () => {
  const images = [...document.images];
  const box = document.createElement("pre");
  box.id = "probe";
  box.textContent = JSON.stringify({
    errors,
    inner: window.innerWidth,
    scroll: document.documentElement.scrollWidth,
    images: images.map(i => [i.naturalWidth, Math.round(i.getBoundingClientRect().width)]),
    charts: document.querySelectorAll("svg").length,
    headings: [...document.querySelectorAll("h2")].map(h => h.textContent),
  });
  document.body.appendChild(box);
});
</script>"""


def report():
    """One with everything that a page can show, and long names."""
    rng = np.random.default_rng(0)
    samples = rng.uniform(-1, 1, (10, 1, 28, 28)).astype(np.float32)
    loop = LoopSeries(
        timesteps=tuple(np.linspace(1000, 50, 20)),
        drift=tuple(np.geomspace(1e-7, 1e-2, 21)),
        explained=tuple(np.geomspace(1e-6, 1e-3, 21)),
        diverges_at=15,
        eager=samples,
        engine=samples + 0.01,
    )
    picture = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (300, 1200, 3), dtype=np.uint8)).save(picture, format="PNG")
    long = "blocks.23.attn.to_out.0.a_very_long_name_of_a_layer_that_no_screen_is_wide_enough_for/MatMul" * 2
    return Report(
        bundle="a-bundle-with-quite-a-long-name-for-a-telephone.lehr",
        model="m",
        engine="engines/cpu--fp32--onnxruntime-1.31.1",
        target="cpu",
        recipe="fp32",
        baseline="old.lehr",
        policy="release",
        policy_sha256="0" * 64,
        required=("L0", "L1"),
        checks=(
            judged("L0.runs", True, "ran"),
            judged("L1.score", False, long),
            Check(name="L2.guided.drift", outcome=Outcome.NOTED, reason="diverges"),
            judged("L3.frechet", True, "0.1 [0.05, 0.2], must lie below 2"),
        ),
        steps=StepSeries(timesteps=(1000.0, 500.0, 1.0), rel_error=(1e-6, 1e-5, 1e-3), limits=(1e-4, 1e-4, 1e-4)),
        loops={"guided": loop},
        value_range=(-1.0, 1.0),
        environment={"processor": "x" * 80},
        hashes={"model/step.onnx": "0" * 64},
        culprit=Found(kind="layer", text=f"layer {long}"),
        distribution=DistributionSeries(
            network="n.onnx", sha256="0" * 64, samples=100, noise=1.0, reference=samples, engine=samples
        ),
        pictures={"calibration/ranges.png": picture.getvalue()},
        history={"old.lehr": {"L1.max_rel_error": 1e-6}, "this bundle": {"L1.max_rel_error": 2e-6}},
    )


def probed(text, width, folder):
    """What the browser says of a page: (findings, what it logged)."""
    file = folder / "page.html"
    # A frame has the width that is asked for; windows have a least width of their own.
    inner = html.escape(text.replace("<body>", f"<body>{PROBE}", 1), quote=True)
    script = """<script>window.onload = () => {
      const found = document.querySelector("iframe").contentDocument.getElementById("probe");
      const copy = document.createElement("pre");
      copy.id = "found"; copy.textContent = found ? found.textContent : "none";
      document.body.appendChild(copy); };</script>"""
    file.write_text(
        f'<!doctype html><body><iframe width="{width}" height="3000" style="border:0" srcdoc="{inner}"></iframe>'
        + script
    )
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--enable-logging=stderr")
    done = subprocess.run(
        [BROWSER, *options, f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    return json.loads(html.unescape(found[1])), done.stderr


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [WIDE, 1200])
def test_a_browser_shows_every_picture_logs_no_error_and_needs_no_scrolling_sideways(width, tmp_path):
    text = page(report())
    assert len(text) < 2_000_000
    found, log = probed(text, width, tmp_path)
    assert found["errors"] == []
    assert "CONSOLE" not in log
    assert found["inner"] == width
    assert found["scroll"] <= width
    assert found["charts"] == 2
    assert len(found["images"]) == 3 + 3 + 1
    assert all(natural > 0 and shown > 50 for natural, shown in found["images"])
    assert {"Checks", "Curves", "History", "Calibration", "Distribution (L3)"} <= set(found["headings"])


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_the_probe_sees_a_page_that_is_too_wide_and_a_picture_that_is_none(tmp_path):
    text = page(report())
    broken = base64.b64encode(b"no picture").decode()
    text = text.replace("</body>", f'<div style="width:900px">x</div><img src="data:image/png;base64,{broken}"></body>')
    found, _ = probed(text, WIDE, tmp_path)
    assert found["scroll"] > WIDE
    assert [0, 0] in [[natural, 0] for natural, _ in found["images"]]


def test_only_pictures_are_shown_as_such():
    made = report()
    text = page(made)
    assert text.count('class="map"') == 1
    other = {"calibration/x.png": b"<script>alert(1)</script>"}
    assert 'class="map"' not in page(replace(made, pictures=other))
