"""The report as tests use it: what a person does with it, and what it shows."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

from overlay.answers.matrix import Cell

Colour = tuple[float, float, float]


def colour(css: str) -> Colour:
    """Red, green and blue of a computed colour, which must be opaque."""
    found = re.fullmatch(r"rgba?\((\d+), (\d+), (\d+)(, 1)?\)", css)
    assert found, f"{css} is no opaque colour"
    red, green, blue = (int(found[i]) / 255 for i in (1, 2, 3))
    return red, green, blue


def contrast(one: Colour, other: Colour) -> float:
    """WCAG 2's contrast ratio."""

    def luminance(colour: Colour) -> float:
        red, green, blue = (
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour
        )
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@dataclass(frozen=True)
class Page:
    """The report in a browser."""

    browser: Chrome
    file: Path

    def open(self) -> None:
        self.browser.get(self.file.as_uri())

    def emulate(
        self,
        width: int = 1280,
        height: int = 900,
        scheme: str = "light",
        script: bool = True,
    ) -> None:
        """A screen of CSS pixels, the system's colour scheme, and whether scripts run."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not script})

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def run(self, script: str, *arguments: object) -> Any:
        return self.browser.execute_script(script, *arguments)

    def style(self, element: WebElement, name: str) -> Colour:
        return colour(element.value_of_css_property(name))

    def pick(self, axis: str, value: str) -> None:
        """Choose a setting in its control, as a person does."""
        if axis == "backend":
            Select(self.one("select[name=backend]")).select_by_value(value)
            return
        radio = self.one(f"input[name={axis}][value='{value}']")
        assert radio.is_enabled(), f"{axis} {value} cannot be chosen"
        radio.click()

    def choose(self, cell: Cell) -> None:
        """All settings that are not of the grid itself."""
        self.pick("backend", cell.backend)
        self.pick("v1", cell.v1)
        self.pick("dtype", cell.dtype)
        self.pick("length", cell.length)
        self.pick("flashinfer", "yes" if cell.flashinfer else "no")

    def button(self, release: str, cell: Cell) -> WebElement:
        place = f"{release}, capability {cell.capability}, KV cache {cell.kv_cache_dtype}: "
        return self.one(f".cell[aria-label^='{place}']")

    def click(self, button: WebElement) -> None:
        """Scroll to a button, which the sheet may cover, and click it."""
        self.run("arguments[0].scrollIntoView({block: 'nearest', inline: 'nearest'})", button)
        button.click()

    def names(self) -> list[str]:
        """What is said of every cell, in the order of the grid."""
        script = "return [...document.querySelectorAll('.cell')].map((cell) => cell.ariaLabel)"
        names: list[str] = self.run(script)
        return names

    def glyphs(self) -> str:
        """All cells' glyphs, in the order of the grid."""
        return str(self.run("return document.querySelector('#grid tbody').textContent"))

    def detail(self, variant: str) -> dict[str, str]:
        """What the open sheet says of stock or patched."""
        script = """
            const side = document.querySelector(`#detail [data-variant=${arguments[0]}]`);
            const said = {verdict: side.querySelector("h4 b").textContent};
            for (const term of side.querySelectorAll("dt"))
              said[term.textContent] = term.nextElementSibling.textContent;
            return said;
        """
        said: dict[str, str] = self.run(script, variant)
        return said

    def press(self, *keys: str) -> None:
        """Keys, to whatever has the focus."""
        for key in keys:
            self.browser.switch_to.active_element.send_keys(key)

    @property
    def focused(self) -> WebElement:
        return self.browser.switch_to.active_element

    def requests(self) -> set[str]:
        """What has been asked for since the log was read last."""
        messages = [json.loads(line["message"])["message"] for line in self.logged("performance")]
        return {
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        }

    def logged(self, kind: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.browser.get_log(kind)  # type: ignore[no-untyped-call]
        return found

    def picture(self, selector: str) -> bytes:
        """An element as a PNG."""
        box = self.run(
            "const box = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return {x: 0, y: box.y + scrollY, width: innerWidth, height: box.height, scale: 1}",
            selector,
        )
        command = {"format": "png", "captureBeyondViewport": True, "clip": box}
        shot = self.browser.execute_cdp_cmd("Page.captureScreenshot", command)
        return base64.b64decode(shot["data"])
