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
