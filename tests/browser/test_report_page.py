"""The report in a real browser: its script runs without errors, and it needs nothing from outside."""

import os
import shutil
import subprocess

import pytest

CHROMIUM = shutil.which("chromium")
if CHROMIUM is None and os.environ.get("CI"):
    raise RuntimeError("chromium is not installed; .ci/run installs it")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def chromium(*options: str) -> subprocess.CompletedProcess:
    quiet = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        "--v=0",
    ]
    return subprocess.run([CHROMIUM, *quiet, *options], capture_output=True, text=True, check=True, timeout=60)


@needs_browser
def test_the_page_opens_from_disk_without_an_error(tiny_run, tmp_path):
    page = tiny_run.folder / "results/tiny/report/report.html"
    reply = chromium(
        f"--user-data-dir={tmp_path}/profile", "--dump-dom", "--host-resolver-rules=MAP * ~NOTFOUND", page.as_uri()
    )
    assert "CONSOLE" not in reply.stderr
    for text in ("best-of-2", "not measured", "simulated"):
        assert text in reply.stdout


@needs_browser
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_wider_than_the_screen(tiny_run, tmp_path, width):
    page = tiny_run.folder / "results/tiny/report/report.html"
    probe = tmp_path / "probe.html"
    script = "<script>addEventListener('load', () => document.title = `overflow ${document.documentElement.scrollWidth - innerWidth}`)</script></body>"
    probe.write_text(page.read_text().replace("</body>", script))
    reply = chromium(f"--user-data-dir={tmp_path}/profile", f"--window-size={width},900", "--dump-dom", probe.as_uri())
    title = reply.stdout.split("<title>")[1].split("</title>")[0]
    if title.startswith("overflow"):
        assert int(title.split()[1]) <= 0
    else:
        pytest.fail(f"the probe did not run; the title is {title!r}")


KEYS = """<script>addEventListener('load', () => {
  const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true }));
  const seen = [];
  for (const key of ['j', 'j', 'k', '/']) { press(key); seen.push(document.activeElement.id); }
  const mark = document.querySelector("#figure-gold .wide [role='graphics-symbol'][aria-label*='mean']");
  mark.dispatchEvent(new PointerEvent('pointerover', { bubbles: true }));
  const tip = document.getElementById('tip');
  seen.push(!tip.hidden && tip.textContent === mark.getAttribute('aria-label'));
  seen.push(document.querySelectorAll('.chart title').length);
  document.title = `seen ${seen.join(' ')}`;
})</script></body>"""


@needs_browser
def test_keys_and_tooltips(tiny_run, tmp_path):
    page = tmp_path / "probe.html"
    page.write_text((tiny_run.folder / "results/tiny/report/report.html").read_text().replace("</body>", KEYS))
    reply = chromium(f"--user-data-dir={tmp_path}/profile", "--window-size=1280,900", "--dump-dom", page.as_uri())
    assert "<title>seen results reward-kl results filter true 0</title>" in reply.stdout


@needs_browser
def test_it_prints_all_of_it_and_no_controls(tiny_run, tmp_path):
    page, pdf = tiny_run.folder / "results/tiny/report/report.html", tmp_path / "page.pdf"
    chromium(f"--user-data-dir={tmp_path}/profile", f"--print-to-pdf={pdf}", "--no-pdf-header-footer", page.as_uri())
    assert 5 <= pdf.read_bytes().count(b"/Type /Page\n") <= 60
