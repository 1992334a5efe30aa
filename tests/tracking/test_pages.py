"""The pages that a user opens, in a real Chromium: MLflow's, served by `vqmoe ui`, and the report's.

Without a Chromium these tests are skipped, or fail where VQMOE_NEED_CHROMIUM is set.
"""

import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest

from pipeline import config
from pipeline.moe.layer import SETTINGS
from pipeline.tracking import store
from stages.execute import execute
from stages.paths import GRID_STAGES, Paths, cells
from tests.stages import repository
from tests.tracking.conftest import free_port

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Nothing that leaves this machine, and no sandbox, which root has none of.
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
SECONDS = 30
RATES = (0.05, 0.2)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        reason = "there is no Chromium: install it (Debian: apt-get install chromium)"
        pytest.fail(reason) if os.environ.get("VQMOE_NEED_CHROMIUM") else pytest.skip(reason)
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=1000 * SECONDS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def recorded(browser, tmp_path_factory):
    """A repository with a tiny experiment of two methods, run and recorded."""
    root = repository.make(
        tmp_path_factory.mktemp("pages"), "grid.methods=[vqmoe, smoe]", f"robustness.rates={list(RATES)}", "compute.repeats=6"
    )
    params, paths = config.load(root / "params.yaml", SETTINGS), Paths(root, root)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
            patch.delenv(name, raising=False)
        execute("prepare", params, paths)
        for stage in (*GRID_STAGES, "compute"):
            for cell in cells(stage, params.grid.methods, params.grid.seeds, params.data.tasks):
                execute(stage, params, paths, cell)
        execute("report", params, paths)
    return root


@pytest.fixture(scope="module")
def pages(recorded):
    """The address that `vqmoe ui` prints, that of its server, and the ids of the experiments by stage."""
    opened = recorded / "opened"
    browser = recorded / "browser"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    port = free_port()
    process = repository.start(recorded, "vqmoe", "ui", "--open", "--port", str(port), BROWSER=f"{browser} %s")
    try:
        line = next((line for line in process.stdout if line.startswith("MLflow: ")), "")
        found = re.fullmatch(rf"MLflow: ((http://127\.0\.0\.1:{port}/)\S*) \(Ctrl-C stops it\)\n", line)
        assert found, line
        names = {one.name: one.experiment_id for one in store.connect(recorded).search_experiments()}
        yield SimpleNamespace(address=found[1], server=found[2], opened=opened, experiments=names)
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture
def page(browser):
    """A page that may not ask for anything that fails, nor anyone but this machine."""
    page = browser.new_page(viewport={"width": 1600, "height": 1200})
    # The assistant opens at the first visit; and a server without accounts has no user of now.
    page.add_init_script("localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')")
    asked, failed = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("response", lambda response: failed.append(response.url) if response.status >= 400 else None)
    yield page
    page.close()
    assert [url for url in asked if not re.match("(http://127.0.0.1:|data:|blob:|file:)", url)] == []
    assert [url for url in failed if not url.endswith("/users/current")] == []


def visible(page, *texts):
    from playwright.sync_api import expect

    for text in texts:
        expect(page.get_by_text(text).first).to_be_visible()
    for banner in page.get_by_role("alert").all():
        assert not re.search("error|wrong|fail", banner.inner_text(), re.IGNORECASE), banner.inner_text()


def charts(page, address, search):
    """The traces of the two charts whose metrics match `search`, once they are drawn."""
    page.goto(address)
    page.get_by_placeholder("Search metric charts").fill(search)
    drawn = "chart => chart.data && chart.data.length && chart.data.every(trace => trace.x && trace.x.length)"
    page.wait_for_function(f"""() => {{
        const charts = [...document.querySelectorAll(".js-plotly-plot")];
        return charts.length === 2 && charts.every({drawn});
    }}""")
    return page.locator(".js-plotly-plot").evaluate_all("charts => charts.map(chart => JSON.parse(JSON.stringify(chart.data)))")


def lines(chart):
    """Its curves, without the bands around them."""
    return [trace for trace in chart if trace.get("mode") == "lines+markers"]


def result(root, place):
    return json.loads((root / f"results/{place}.json").read_text())


def test_the_address_shows_the_runs_of_pre_training_grouped_by_method(page, pages, recorded):
    page.goto(pages.address)
    visible(page, "Group by: method", "Group: vqmoe", "Group: smoe", "vqmoe-s0", "smoe-s0", "pretrain-vqmoe-s0")
    for method in ("vqmoe", "smoe"):
        score = result(recorded, f"pretrain/{method}-s0")["metrics"]["test"]["bpc"]
        visible(page, re.compile(re.escape(f"{score:.9g}"[:7])))
    assert pages.opened.read_text().strip() == pages.address
    # Each method has its colour, and its curve the steps of validation alone.
    final, curves = charts(page, f"{pages.address}&compareRunsMode=CHART", "(test|valid)/bpc$")
    assert len(set(final[0]["marker"]["color"])) == 2
    assert [line["x"] for line in lines(curves)] == [[6, 12]] * 2


def test_a_chart_has_the_robustness_of_all_methods_against_severity(page, pages, recorded):
    place = f"#/experiments/{pages.experiments['vqmoe/robustness']}/runs?{pages.address.split('?')[1]}&compareRunsMode=CHART"
    drawn = charts(page, pages.server + place, "curve/.*/noise/score")
    for model, chart in zip(("language", "toy"), drawn, strict=True):
        key = f"curve/{model}/noise/score"
        visible(page, f"vqmoe ({key})", f"smoe ({key})")
        # Without noise, and at each severity.
        assert [line["x"] for line in lines(chart)] == [[0, *(round(1000 * rate) for rate in RATES)]] * 2
        for line, method in zip(lines(chart), ("smoe", "vqmoe"), strict=True):
            found = result(recorded, f"robustness/{method}-s0")["metrics"][model]
            (*_, inference) = found.values()
            clean, *noisy = line["y"]
            assert clean == pytest.approx(inference["clean"]["score"])
            assert sum(noisy) / len(noisy) == pytest.approx(inference["noise"]["score"])


def test_a_model_has_its_page_with_metrics_data_and_files(page, pages, recorded):
    page.goto(f"{pages.server}#/experiments/{pages.experiments['vqmoe/pretrain']}/models?workflowType=machine_learning")
    page.get_by_text("pretrain-vqmoe-s0").first.click()
    visible(page, "About this logged model", "Ready", "test/bpc")
    visible(page, str(result(recorded, "pretrain/vqmoe-s0")["metrics"]["test"]["bpc"])[:12])
    dataset = page.get_by_text("Datasets used").locator("..")
    assert "corpus" in dataset.inner_text()
    page.get_by_text("Artifacts", exact=True).click()
    visible(page, "model.safetensors", "model.json")


def test_a_run_has_its_dataset_with_digest_and_source(page, pages, recorded):
    run = result(recorded, "finetune/vqmoe-s0/toy")
    (given,) = store.connect(recorded).get_run(run["run_id"]).inputs.dataset_inputs
    page.goto(f"{pages.server}#/experiments/{pages.experiments['vqmoe/finetune']}/runs/{run['run_id']}")
    visible(page, "vqmoe-s0-toy", "Datasets", "test/accuracy")
    page.get_by_text(given.dataset.digest).first.click()
    visible(page, "Data details for", given.dataset.digest)


def test_the_report_asks_for_nothing_and_complains_of_nothing(page, recorded):
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    asked = []
    page.on("request", lambda request: asked.append(request.url.partition(":")[0]))
    page.goto((recorded / "report/index.html").as_uri())
    visible(page, "Claims", "Methods compared", "Compute")
    pictures = page.locator("img").evaluate_all("all => all.map(one => one.naturalWidth)")
    assert len(pictures) > 5 and min(pictures) > 100
    assert asked.count("file") == 1 and set(asked) <= {"file", "data"}
    assert said == []
