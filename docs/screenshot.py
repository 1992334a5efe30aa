"""Take the pictures of pages that README.md and docs/ show, from the runs that are recorded here and the report.

Needs a Chromium. Run from the repository, after `dvc repro` and `vqmoe register`: python docs/screenshot.py
"""

import json
import lzma
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from pipeline.tracking import store

OUT = Path(__file__).parent / "images"
# A visitor who was here before: the assistant stays closed, and experiments are of models that are trained.
VISITED = """
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
localStorage.setItem("mlflow.workflowType_v1", JSON.stringify("machine_learning"));
"""
PLAIN = "[data-assistant-ui] { display: none }"


def main() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    names = {one.name: one.experiment_id for one in store.connect(Path.cwd()).search_experiments()}
    command = ["vqmoe", "ui", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        runs = next(line for line in server.stdout if line.startswith("MLflow: ")).split()[1]
        robustness = runs.replace(f"/{names['vqmoe/pretrain']}/", f"/{names['vqmoe/robustness']}/")
        with sync_playwright() as playwright:
            chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page()
            page.set_default_timeout(120_000)
            page.add_init_script(VISITED)
            _open(page, runs, 400)
            page.get_by_text("vqmoe-s0", exact=True).wait_for()
            _save(page, "mlflow-runs")
            _charts(page, runs, "(train|valid)/(bpc|loss|balance|load_imbalance|margin)$")
            _save(page, "mlflow-charts")
            _charts(page, robustness, "curve/.*/noise/(score|kappa|degradation)")
            _save(page, "mlflow-robustness")
            _open(page, runs.replace("/runs?", "/models?"), 900)
            page.get_by_text("pretrain-vqmoe-s0").first.click()
            page.get_by_text("About this logged model").wait_for()
            _save(page, "mlflow-model")
            _open(page, (Path.cwd() / "report/index.html").as_uri() + "#claims", 1000)
            page.evaluate("scrollBy(0, -20)")
            _save(page, "report")
            with tempfile.TemporaryDirectory() as folder:
                _routing(page, Path(folder))
            browser.close()
    finally:
        server.terminate()
        server.wait()


def _charts(page: Page, address: str, search: str) -> None:
    _open(page, f"{address}&compareRunsMode=CHART", 1120)
    page.get_by_placeholder("Search metric charts").fill(search)


def _routing(page: Page, folder: Path) -> None:
    with lzma.open("data/sotu.jsonl.xz", "rt", encoding="utf-8") as file:
        (folder / "speech.txt").write_text(json.loads(file.readline())["text"][:3000], encoding="utf-8")
    subprocess.run(["vqmoe", "route", folder / "speech.txt", "--noise", "swap", "--html", folder / "page.html"], check=True)
    _open(page, (folder / "page.html").as_uri(), 900)
    page.get_by_label("Block").select_option("1")
    page.locator("#clean span").nth(140).hover()
    _save(page, "routing")


def _open(page: Page, address: str, height: int) -> None:
    page.set_viewport_size({"width": 1480, "height": height})
    # Of an address that differs after # alone, a page keeps what it shows.
    page.goto("about:blank")
    page.goto(address)


def _save(page: Page, name: str) -> None:
    page.wait_for_timeout(6_000)  # charts draw themselves
    for label in ("Toggle sidebar", "Hide banner"):
        if page.get_by_label(label).count():
            page.get_by_label(label).click()
    page.wait_for_timeout(2_000)
    with tempfile.TemporaryDirectory() as folder:
        page.screenshot(path=f"{folder}/page.png", style=PLAIN)
        with Image.open(f"{folder}/page.png") as picture:
            picture.convert("RGB").quantize().save(OUT / f"{name}.png", optimize=True)
    print(OUT / f"{name}.png", (OUT / f"{name}.png").stat().st_size)


if __name__ == "__main__":
    main()
