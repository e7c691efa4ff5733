"""The report in a real browser: its script runs without errors, and it loads nothing from elsewhere."""

import html
import json
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


# Elements wider than the screen, the theme, and text whose contrast to its background is below 4.5 (WCAG
# 1.4.3).
LOOK = """<script>addEventListener('load', () => {
  const light = (colour) => colour.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const found = numbers(getComputedStyle(element).backgroundColor);
      if (found.length < 4 || found[3] === 1) return found;
    }
    return [255, 255, 255];
  };
  const faint = new Set();
  const texts = 'h1, h2, h3, h4, p, td, th, dt, dd, li, figcaption, caption, small';
  for (const element of document.querySelectorAll(texts)) {
    if (!element.textContent.trim() || !element.getClientRects().length) continue;
    const [a, b] = [numbers(getComputedStyle(element).color), ground(element)].map(light).sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) faint.add(`${element.tagName}.${element.className}`);
  }
  const wider = Math.max(0, document.documentElement.scrollWidth - innerWidth);
  const dark = matchMedia('(prefers-color-scheme: dark)').matches;
  document.title = JSON.stringify({ wider, dark, faint: [...faint] });
})</script></body>"""


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 800, 1280])
def test_nothing_is_wider_than_the_screen_and_all_text_has_contrast(tiny_run, tmp_path, width, dark):
    page, probe = tiny_run.folder / "results/tiny/report/report.html", tmp_path / "probe.html"
    probe.write_text(page.read_text().replace("</body>", LOOK))
    size, theme = f"--window-size={width},900", f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    reply = chromium(f"--user-data-dir={tmp_path}/profile", size, theme, "--dump-dom", probe.as_uri())
    seen = json.loads(html.unescape(reply.stdout.split("<title>")[1].split("</title>")[0]))
    assert seen == {"wider": 0, "dark": dark, "faint": []}


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
def test_printing_includes_everything_but_the_controls(tiny_run, tmp_path):
    page, pdf = tiny_run.folder / "results/tiny/report/report.html", tmp_path / "page.pdf"
    chromium(f"--user-data-dir={tmp_path}/profile", f"--print-to-pdf={pdf}", "--no-pdf-header-footer", page.as_uri())
    assert 5 <= pdf.read_bytes().count(b"/Type /Page\n") <= 60
