"""Take the picture of the MLflow page in the README from the recorded runs.

Needs the package playwright and a Chromium; run from the repository: python docs/screenshot.py /usr/bin/chromium
"""

import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright

from pipeline.tracking import store

OUT = Path(__file__).parent / "images" / "mlflow.png"


def main(chromium: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path.cwd()
    client = store.connect(root)
    experiment = client.get_experiment_by_name("vqmoe/pretrain").experiment_id
    server = subprocess.Popen(["vqmoe", "ui", "--port", str(port)], stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(address, timeout=5).read()
                break
            except OSError:
                time.sleep(0.5)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=chromium,
                args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"],
            )
            page = browser.new_page(viewport={"width": 1300, "height": 1150})
            page.goto(f"{address}/#/experiments/{experiment}/runs")
            page.get_by_text("Model training", exact=True).click(timeout=60_000)
            page.goto(f"{address}/#/experiments/{experiment}/runs?compareRunsMode=CHART")
            page.get_by_placeholder("Search metric charts").fill("bpc", timeout=60_000)
            if page.get_by_role("button", name="Close", exact=True).count():  # the assistant's panel
                page.get_by_role("button", name="Close", exact=True).click()
            page.wait_for_timeout(8_000)
            page.screenshot(path=str(OUT))
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(sys.argv[1])
