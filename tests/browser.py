"""TensorBoard in a real browser: ``python tests/browser.py RUN_DIR OUT_DIR`` takes the screenshots of the docs."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = """
--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync --hide-scrollbars
"""
LEFT = 350  # pixels of a page that are settings and the place of the data
SECONDS = 90.0  # that TensorBoard or a page may take on a busy machine

# Old parts of TensorBoard lie in shadow trees, which a search of the document does not enter.
WALK = """
const walk = (node, visit) => {
  visit(node);
  if (node.shadowRoot) walk(node.shadowRoot, visit);
  node.childNodes.forEach(child => walk(child, visit));
};
const all = (node, name) => {
  const found = [];
  walk(node, one => { if (one.nodeName.toLowerCase() === name) found.push(one); });
  return found;
};
const text = node => {
  const hidden = ['STYLE', 'SCRIPT', 'TEMPLATE'], found = [];
  walk(node, one => {
    if (one.nodeType === Node.TEXT_NODE && !hidden.includes(one.parentNode.nodeName)) found.push(one.textContent);
  });
  return found.join(' ').replace(/\\s+/g, ' ').trim();
};
"""
CHARTS = """
return all(document.body, 'tf-custom-scalar-multi-line-chart-card').map(card => [
  text(all(card, 'tf-card-heading')[0]),
  text(card),
  all(all(card, 'vz-line-chart2')[0], 'path')
    .filter(path => (path.getAttribute('d') || '').length > 20)
    .map(path => getComputedStyle(path).stroke),
]);
"""
FIGURES = """
return all(document.body, 'img').filter(img => img.complete).map(img => [img.naturalWidth, img.naturalHeight]);
"""


@contextmanager
def tensorboard(log_dir: Path) -> Iterator[str]:
    """Serve a directory of events on a free port of this machine; the address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--logdir", str(log_dir), "--host", "127.0.0.1", "--port", str(port), "--reload_interval", "0"]
    with tempfile.TemporaryFile() as said:
        command = [sys.executable, "-m", "tensorboard.main", *words, "--load_fast", "false"]
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
        try:
            address = f"http://127.0.0.1:{port}/"
            until(lambda: _answers(address) or process.poll() is not None, "TensorBoard answers")
            if process.poll() is not None:
                said.seek(0)
                raise RuntimeError(f"TensorBoard ended: {said.read().decode()}")
            yield address
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def chromium(width: int = 1400, height: int = 900) -> Iterator[Chrome]:
    """A browser with a fresh profile."""
    assert CHROMIUM is not None and DRIVER is not None
    with tempfile.TemporaryDirectory(prefix="longreach-browser-", ignore_cleanup_errors=True) as profile:
        options = ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (*FLAGS.split(), f"--window-size={width},{height}", f"--user-data-dir={profile}"):
            options.add_argument(flag)
        browser = Chrome(options=options, service=Service(DRIVER))
        try:
            browser.set_page_load_timeout(SECONDS)
            browser.set_script_timeout(SECONDS)
            yield browser
        finally:
            browser.quit()


def visit(browser: Chrome, address: str, tab: str) -> None:
    """Open a tab of TensorBoard anew."""
    browser.get("about:blank")  # a new fragment alone would load nothing
    browser.get(f"{address}#{tab}")


def shown(browser: Chrome) -> str:
    """All text of the page, scrolled to or not, that of hidden parts included."""
    return browser.execute_script(f"{WALK} return text(document.body);")


def charts(browser: Chrome) -> dict[str, tuple[str, list[str]]]:
    """The charts of the custom scalars: by title, their text and the colours of the curves and marks that are drawn."""
    return {title: (words, curves) for title, words, curves in browser.execute_script(WALK + CHARTS)}


def figures(browser: Chrome) -> list[tuple[int, int]]:
    """Width and height of every image that has arrived; 0 where it is none."""
    return [(width, height) for width, height in browser.execute_script(WALK + FIGURES)]


def until(holds: Callable[[], object], what: str) -> None:
    """Wait for a condition.

    Raises:
        TimeoutError: it does not come.
    """
    deadline = time.monotonic() + SECONDS
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {SECONDS:g} s")
        time.sleep(0.2)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address + "data/environment", timeout=5):
            return True
    except OSError:
        return False


def screenshots(run_dir: Path, out: Path) -> None:
    """Of the five questions, the figures and the table of runs."""
    out.mkdir(parents=True, exist_ok=True)
    with tensorboard(run_dir / "tensorboard") as address, chromium(1400, 3000) as browser:
        visit(browser, address, "custom_scalars")
        until(
            lambda: (found := charts(browser)) and all(curves for _, curves in found.values()), "the charts are drawn"
        )
        _save(browser, out / "questions.png", LEFT)
        for tab, height in (("images", 1500), ("hparams", 420)):
            browser.set_window_size(1400, height)
            visit(browser, address, tab)
            until(lambda: len(figures(browser)) >= 4 or "session groups: 1" in shown(browser), f"{tab} are there")
            _save(browser, out / f"{tab}.png", left=0 if tab == "hparams" else LEFT)


def _save(browser: Chrome, path: Path, left: int) -> None:
    from PIL import Image

    time.sleep(3)  # for what moves to come to rest
    browser.save_screenshot(str(path))
    with Image.open(path) as image:
        small = image.convert("RGB").crop((left, 0, *image.size)).quantize(64)
    small.save(path, optimize=True)


if __name__ == "__main__":
    screenshots(Path(sys.argv[1]), Path(sys.argv[2]))
