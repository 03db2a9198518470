"""A browser, and the report of this checkout's files in it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from overlay.answers import report
from overlay.base.project import cache_folder, find_project
from overlay.patches.workspace import Workspace

from .page import Page

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
DRIVER = os.environ.get("CHROMEDRIVER") or shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshot", type=Path, help="Write the picture of the README here.")


@pytest.fixture(scope="session")
def workspace() -> Workspace:
    return Workspace.open(find_project(), cache_folder())


@pytest.fixture(scope="session")
def browser() -> Iterator[webdriver.Chrome]:
    if not (CHROMIUM and DRIVER):
        pytest.skip("Chromium is not installed (apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    # Chromium's sandbox refuses root.
    for flag in (*FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])):
        options.add_argument(flag)
    with tempfile.TemporaryDirectory(prefix="vllm-overlay-") as profile:
        options.add_argument(f"--user-data-dir={profile}")
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        yield driver
        driver.quit()


@pytest.fixture(scope="session")
def file(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(report.render(workspace), "utf-8")
    return path


@pytest.fixture
def page(browser: webdriver.Chrome, file: Path) -> Page:
    """The page as it is when opened: light, on a wide screen."""
    page = Page(browser, file)
    page.emulate()
    page.open()
    page.run("localStorage.clear()")
    page.open()
    return page
