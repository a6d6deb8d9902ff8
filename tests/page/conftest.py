"""A real browser for the pages: chromium, headless, without a network, told what to do by Playwright."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="session")
def axe() -> str:
    """The source of axe-core: `AXE` names its `axe.min.js`, which `nox -s page` gets from npm."""
    return Path(os.environ["AXE"]).read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def chromium() -> str:
    """Where the browser is."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert found, "These tests need chromium: install it, or name it in CHROMIUM."
    return found


@pytest.fixture(scope="session")
def playwright():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        yield started


@pytest.fixture
def show(playwright, chromium, tmp_path_factory):
    """Open a page; at the end of the test its console must be empty, and nothing may have been asked of a network."""
    said, contexts = [], []

    def opened(path: Path, *, theme: str = "light", width: int = 1280, scripts: bool = True):
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=chromium,
            headless=True,
            args=list(QUIET),
            viewport={"width": width, "height": 900},
            color_scheme=theme,
            java_script_enabled=scripts,
            offline=True,
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if not request.url.startswith(("data:", "file:")) else None)
        page.goto(path.resolve().as_uri())
        return page

    opened.said = said
    yield opened
    for context in contexts:
        context.close()
    assert said == []
