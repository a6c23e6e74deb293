"""Browser tests of the MLflow UI, with a run on a real server, and of the HTML reports."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import http.client
import json
import shutil
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager, contextmanager

import aiohttp
import numpy as np
import pytest
from mlflow import MlflowClient

from m2f.cluster.compare.compare import compare_runs
from m2f.cluster.compare.page import as_page
from m2f.cluster.compare.records import RunRecord
from m2f.cluster.compare.set_result import SetResult
from m2f.cluster.recipe.load import parse_recipe
from m2f.cluster.tracking.tracking import Tracking, create_run
from m2f.data_pipeline.categories import Category, CategoryTable
from m2f.eval.metrics.error_types import panoptic_errors
from m2f.eval.metrics.panoptic_quality import PanopticPrediction, PanopticTruth, TruthSegment
from m2f.eval.metrics.segment_errors import panoptic_candidates
from m2f.eval.report.evaluation_page import evaluation_page
from m2f.eval.report.panels import decode_picture, encode_png
from m2f.eval.results.results import EvaluationSubject
from m2f.eval.results.states import EvaluationStates

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium"),
]
RECIPE = """
name: seen_in_a_browser
datasets: {train: {shards: shards/train}}
data: {train: [{dataset: train}]}
training: {max_steps: 10, optimizer: {lr: 0.00123}}
"""
PATIENCE_S = 240.0


class Tab:
    """A browser tab, controlled through the DevTools protocol."""

    def __init__(self, socket):
        self._socket, self._number = socket, 0

    async def call(self, method, **params):
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": params})
        while True:
            message = json.loads((await asyncio.wait_for(self._socket.receive(), PATIENCE_S)).data)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    async def evaluate(self, script):
        return (await self.call("Runtime.evaluate", expression=script, returnByValue=True))["result"].get("value")

    async def open(self, url, width=1300, height=3000):
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        await self.call("Page.navigate", url=url)

    async def wait_for_text(self, *texts):
        """Wait until the page shows every text."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            shown = await self.evaluate("document.body ? document.body.innerText : ''") or ""
            missing = [text for text in texts if text not in shown]
            if not missing:
                return
            assert time.monotonic() < deadline, f"{missing} not on the page: {shown[:2000]}"
            await asyncio.sleep(0.2)

    async def picture(self):
        screenshot = await self.call("Page.captureScreenshot", format="png")
        return decode_picture(base64.b64decode(screenshot["data"]))

    async def wait_for_color(self, red, green, blue):
        """Wait until at least 300 pixels have the colour. It also works in iframes, whose text scripts cannot read."""
        deadline = time.monotonic() + PATIENCE_S
        while (np.abs((await self.picture()).astype(int) - (red, green, blue)).max(axis=-1) <= 6).sum() < 300:
            assert time.monotonic() < deadline, "the colour does not appear"
            await asyncio.sleep(0.3)


@asynccontextmanager
async def browser(folder):
    folder.mkdir(exist_ok=True)
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--remote-debugging-port=0",
    ]
    with (folder / "chromium.log").open("wb") as log:
        process = subprocess.Popen([*command, f"--user-data-dir={folder / 'profile'}"], stdout=log, stderr=log)
    try:
        ready, deadline = folder / "profile" / "DevToolsActivePort", time.monotonic() + PATIENCE_S
        while not ready.exists() or not ready.read_text().strip():
            assert process.poll() is None, (folder / "chromium.log").read_text()
            assert time.monotonic() < deadline, "Chromium does not start"
            await asyncio.sleep(0.1)
        address = f"http://127.0.0.1:{ready.read_text().split()[0]}"
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{address}/json/list") as response:
                target = next(t for t in await response.json() if t["type"] == "page")
            async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0) as connection:
                tab = Tab(connection)
                await tab.call("Page.enable")
                yield tab
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def mlflow_server(folder, database):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    (folder / "server.db").write_bytes(database)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/server"]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                time.sleep(0.2)
            assert process.poll() is None, (folder / "server.log").read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


def evaluation_report():
    classes = CategoryTable((Category(1, "cat", True, (255, 0, 0)), Category(2, "sky", False, (0, 0, 255))))
    states = EvaluationStates.empty(classes, ("panoptic",))
    id_map = np.repeat([[1, 1, 2, 2, 2, 2]], 8, axis=0)
    truth = PanopticTruth(id_map, {1: TruthSegment(0, 16, False), 2: TruthSegment(1, 32, False)})
    prediction = PanopticPrediction(np.where(id_map == 2, 2, 0), {2: 1})
    states.panoptic.update(1, truth, prediction)
    states.segments.update(1, panoptic_candidates(truth, prediction))
    states.errors.add(1, panoptic_errors(panoptic_candidates(truth, prediction)))
    results = states.compute(classes, EvaluationSubject(dataset="val", fingerprint="ab" * 32, step=1000))
    return evaluation_page(results, {1: encode_png(np.full((60, 900, 3), 99, np.uint8))}, {})


def comparison_report():
    def record(name, pq):
        curves = {"val/PQ": ((500, pq - 5), (1000, pq)), "train/loss/total": ((500, 3.0), (1000, 2.0))}
        classes = [{"name": f"class {i}", "PQ": pq + i * (pq - 50)} for i in range(5)]
        found = SetResult(step=1000, fingerprint="f", subset=None, num_images=3, metrics={"PQ": pq}, per_class=classes)
        settings = {"name": name, "training.a_setting_with_a_name_as_long_as_they_come.optimizer.lr": str(pq)}
        source = f"/very/long/folder/of/many/runs/{name}"
        return RunRecord(name=name, source=source, recipe=settings, curves=curves, results={"val": found})

    return as_page(compare_runs([record("first_run_with_a_long_name", 50.0), record("second", 51.5)]))


def test_the_mlflow_ui_shows_metrics_and_artifacts(tmp_path, migrated_database, monkeypatch):
    (tmp_path / "report.html").write_text(evaluation_report())
    (tmp_path / "panels.png").write_bytes(encode_png(np.full((60, 400, 3), (10, 200, 30), np.uint8)))
    with mlflow_server(tmp_path, migrated_database) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        config = dataclasses.replace(parse_recipe(RECIPE), output=str(tmp_path / "runs"))
        run = create_run(config)
        tracking = Tracking(run, "evaluation", interval_s=0.05)
        for step, pq in ((500, 41.25), (1000, 45.75)):
            tracking.log_metrics(step, {"val/PQ": pq, "train/loss/total": 10.0 - pq / 10})
        for name in ("report.html", "panels.png"):
            tracking.log_artifact(tmp_path / name, "evaluations/step_00001000/val")
        assert tracking.finish("FINISHED")
        experiment = MlflowClient(tracking_uri=url).get_experiment_by_name("m2f").experiment_id
        asyncio.run(check_mlflow_pages(tmp_path, f"{url}/#/experiments/{experiment}", run.run_id))


async def check_mlflow_pages(folder, experiment, run_id):
    async with browser(folder) as tab:
        await tab.open(f"{experiment}/runs")
        await tab.wait_for_text("seen_in_a_browser")
        await tab.open(f"{experiment}/runs/{run_id}")
        await tab.wait_for_text("seen_in_a_browser", "val/PQ", "45.75", "training.optimizer.lr", "0.00123")
        files = f"{experiment}/runs/{run_id}/artifacts/evaluations/step_00001000/val"
        await tab.open(f"{files}/panels.png")
        await tab.wait_for_text("panels.png", "report.html")
        await tab.wait_for_color(10, 200, 30)
    async with browser(folder / "again") as tab:  # in one session, the page keeps showing the first opened file
        await tab.open(f"{files}/report.html", height=1000)
        await tab.wait_for_text("report.html")
        await tab.wait_for_color(0, 0x72, 0xB2)  # the bars of the report


@pytest.mark.parametrize("report", [evaluation_report, comparison_report])
def test_reports_are_readable_on_desktop_phone_and_paper(tmp_path, report):
    (tmp_path / "report.html").write_text(report())
    asyncio.run(check_report(tmp_path, (tmp_path / "report.html").as_uri()))


async def check_report(folder, url):
    async with browser(folder) as tab:
        for width in (1300, 390):
            await tab.open(url, width)
            await tab.wait_for_text("Metrics", "PQ")
            await tab.wait_for_color(0, 0x72, 0xB2)
            assert await tab.evaluate("document.documentElement.scrollWidth") <= width  # only tables scroll sideways
            text_heights = "[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)"
            assert await tab.evaluate(f"Math.min(...{text_heights})") >= 6
        pdf = await tab.call("Page.printToPDF", printBackground=False)
        assert base64.b64decode(pdf["data"]).startswith(b"%PDF")
