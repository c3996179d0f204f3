"""Reports in a real browser: headings and charts have a place on the page, in any width, and nothing is loaded."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qscope_trl.config.report import ReportConfig
from qscope_trl.monitor.report import run
from tests.monitor import records
from tests.monitor.test_report import HEADINGS, hostile_record

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")

_OWN_HOSTS = (".google.com", ".googleapis.com", ".gvt1.com")

# The report itself may run no script, so a page around it looks into its frames.
MEASURE = """
function seen(frame) {
  const page = frame.contentDocument, view = frame.contentWindow;
  const box = (item) => { const r = item.getBoundingClientRect(); return [r.width, r.height]; };
  const all = (query) => Array.from(page.querySelectorAll(query));
  return {
    headings: all("h2").map((item) => [item.textContent, ...box(item)]),
    charts: all("figure svg").map(box),
    curves: all("figure .curve").map((item) => [item.getTotalLength ? item.getTotalLength() : 1,
                                                view.getComputedStyle(item).stroke]),
    outside: all("figure svg text").filter((item) => {
      const t = item.getBoundingClientRect(), s = item.ownerSVGElement.getBoundingClientRect();
      return t.left < s.left - 1 || t.right > s.right + 1 || t.top < s.top - 1 || t.bottom > s.bottom + 1;
    }).map((item) => item.textContent),
    width: [page.documentElement.scrollWidth, page.documentElement.clientWidth],
    colors: [view.getComputedStyle(page.body).color, view.matchMedia("(prefers-color-scheme: dark)").matches],
    resources: view.performance.getEntriesByType("resource").map((item) => item.name),
    ran: "alerted" in view,
  };
}
window.onload = () => {
  const found = Array.from(document.querySelectorAll("iframe")).map(seen);
  document.body.textContent = JSON.stringify(found);
};
"""


def looked_at(folder: Path, *, widths: tuple[int, ...] = (1200, 375), flags: tuple[str, ...] = ()) -> Any:
    """What the browser shows of a report in frames of these widths, and the hosts asked for but its own services."""
    frames = "".join(f'<iframe src="report.html" width="{width}" height="900"></iframe>' for width in widths)
    around = folder / "around.html"
    around.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{frames}<script>{MEASURE}</script></body>")
    log = folder / "net.json"
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--disable-component-update", "--no-first-run", "--host-resolver-rules=MAP * ~NOTFOUND",
        "--allow-file-access-from-files", f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", *flags,
        "--dump-dom", around.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    body = re.search(r"<body>(.*?)</body>", done.stdout, re.DOTALL)
    assert body is not None, done.stderr[-2000:]
    asked = re.findall(r'"url":\s*"(https?://[^/"]*)', log.read_text(encoding="utf-8"))
    return json.loads(html.unescape(body[1])), {host for host in asked if not host.endswith(_OWN_HOSTS)}


def test_headings_and_charts_are_visible_in_any_width_and_theme(tmp_path: Path) -> None:
    records.write_full(tmp_path)
    run.run(ReportConfig(run_dir=str(tmp_path)))
    (wide, narrow), _ = looked_at(tmp_path)
    for view in (wide, narrow):
        assert [heading[0] for heading in view["headings"]] == HEADINGS
        assert min(min(heading[1:]) for heading in view["headings"]) > 5
        assert len(view["charts"]) == 22
        assert all(width > 200 and height > 100 for width, height in view["charts"])
        assert all(length > 10 for length, _ in view["curves"])
        assert "none" not in {stroke for _, stroke in view["curves"]}
        assert len({stroke for _, stroke in view["curves"]}) > 2
        assert view["outside"] == []
        # Tables scroll by themselves; the page does not.
        assert view["width"][0] <= view["width"][1]
    (dark,), _ = looked_at(tmp_path, widths=(1200,), flags=("--force-dark-mode",))
    assert dark["colors"][1]
    assert dark["colors"][0] != wide["colors"][0]
    assert {stroke for _, stroke in dark["curves"]}.isdisjoint(stroke for _, stroke in wide["curves"])


def test_nothing_is_loaded_or_run_whatever_the_texts_say(tmp_path: Path) -> None:
    hostile_record(tmp_path)
    run.run(ReportConfig(run_dir=str(tmp_path)))
    (view,), asked = looked_at(tmp_path, widths=(1200,))
    assert view["resources"] == []
    assert not view["ran"]
    assert asked == set()
    assert set(HEADINGS) <= {heading[0] for heading in view["headings"]}
    # The same browser does load what a page without these protections names.
    shown = (tmp_path / "report.html").read_text(encoding="utf-8")
    open_page = re.sub(r"<meta http-equiv.*?>", "", shown).replace("</h1>", f"</h1>{records.HOSTILE[:-2]}", 1)
    (tmp_path / "report.html").write_text(open_page, encoding="utf-8")
    (view,), asked = looked_at(tmp_path, widths=(1200,))
    assert view["ran"]
    assert asked == {"http://evil.example"}
