"""The page in a real browser."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Any]:
    page = browser.new_page(viewport={"width": request.param, "height": 800})
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    requested: list[str] = []
    page.on("request", lambda asked: requested.append(asked.url))
    page.goto(address)
    page.wait_for_selector("section")
    yield page
    assert problems == []
    assert all(url.startswith((address, "data:")) for url in requested), requested
    page.close()


def say(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.locator("#send", has_text="Send").wait_for(timeout=60_000)


def number(page: Any, model: str, place: int) -> float:
    return float(page.locator(f'section[data-model="{model}"] dd span').nth(place).inner_text().replace(",", ""))


@pytest.mark.parametrize("page", [1280, 360], indirect=True)
def test_two_models_answer_side_by_side(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.fill("#tokens", "24")
    say(page, "Hello there")
    for model in ("tiny", "tiny-dense"):
        lines = page.locator(f'section[data-model="{model}"] .talk p')
        assert lines.nth(0).inner_text() == "Hello there"
        assert lines.nth(1).inner_text().strip()
        assert number(page, model, 0) > 0
    assert number(page, "tiny", 1) < number(page, "tiny-dense", 1)
    assert number(page, "tiny", 2) < number(page, "tiny-dense", 2)
    bars = page.locator('section[data-model="tiny"] .bars i')
    assert bars.count() == 3
    heights = [float(bars.nth(at).evaluate("bar => parseFloat(bar.style.getPropertyValue('--h'))")) for at in range(3)]
    assert all(0 < height <= 100 for height in heights)
    say(page, "And more")
    assert page.locator('section[data-model="tiny"] .talk .user').count() == 2
    page.click("#clear")
    assert page.locator('section[data-model="tiny"] .talk .user').count() == 0


@pytest.mark.parametrize("page", [1280], indirect=True)
def test_an_answer_can_be_stopped_and_an_error_is_shown(
    page: Any, served: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = served[0].engine.lanes["tiny"]
    step = lane.step
    monkeypatch.setattr(lane, "step", lambda tokens: (time.sleep(0.02), step(tokens))[1])
    page.fill("#tokens", "900")
    page.fill("#text", "Hello")
    page.press("#text", "Enter")
    page.locator("#send", has_text="Stop").click()
    page.locator("#send", has_text="Send").wait_for(timeout=20_000)
    assert page.locator('section[data-model="tiny"] .talk').inner_text().endswith("(stopped)")
    page.evaluate("document.getElementById('tokens').value = 100")
    page.route("**/v1/**", lambda route: route.fulfill(status=200, content_type="text/event-stream",
               body='data: {"error": {"message": "it broke"}}\n\n'))  # fmt: skip
    say(page, "Again")
    assert page.locator('section[data-model="tiny"] .talk .error').inner_text() == "it broke"
    assert page.input_value("#text") == "Again"
