"""`erasekit play` in a browser: what is drawn, switches, strengths, another erasure beside it, and what axe finds."""

from __future__ import annotations

import base64
import io
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erasekit.cli import main
from tests.page.conftest import QUIET

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as there:
        there.bind(("127.0.0.1", 0))
        return there.getsockname()[1]


@pytest.fixture(scope="module", params=["sd15-mini", "flux-mini"])
def server(request, tmp_path_factory):
    """The address of a playground: UCE, and the negative prompt beside it."""
    folder = tmp_path_factory.mktemp("erasures")
    for method in ("uce", "negative-prompt"):
        arguments = ["erase", "-m", method, "-b", request.param, "-c", "cat", "-s", "protocol.steps=2"]
        assert main([*arguments, "--out", str(folder / method)]) == 0
    port = free_port()
    command = [sys.executable, "-m", "erasekit", "play", folder / "uce", "--beside", folder / "negative-prompt"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen([*map(str, command), "--port", str(port)], env={**os.environ, "PYTHONPATH": paths}) as process:
        try:
            yield answering(f"http://127.0.0.1:{port}/")
        finally:
            process.terminate()


def answering(address: str) -> str:
    until = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return address
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.5)


@pytest.fixture
def page(playwright, chromium, server, tmp_path):
    """The page; its console must stay empty, and nothing may be asked of any other machine."""
    said = []
    context = playwright.chromium.launch_persistent_context(
        tmp_path / "profile", executable_path=chromium, headless=True, args=list(QUIET), viewport={"width": 1280, "height": 900}
    )
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    own = ("data:", "blob:", server)
    page.on("request", lambda request: None if request.url.startswith(own) else said.append(request.url))
    page.goto(server)
    page.get_by_label("Prompt").wait_for(timeout=60_000)
    yield page
    context.close()
    assert said == []


def images(page, *, other_than=()) -> list[np.ndarray]:
    """The three images, once they are all there and the last one differs from what it was."""
    page.wait_for_function(
        "old => { const now = [...document.querySelectorAll('.drawn img')].map(i => i.src);"
        " return now.length === 3 && now.every((s, i) => s !== old[i]); }",
        arg=list(other_than),
        timeout=60_000,
    )
    sources = sources_of(page)
    files = [io.BytesIO(base64.b64decode(source.partition(",")[2])) for source in sources]
    return [np.asarray(Image.open(file).convert("RGB")) for file in files]


def sources_of(page) -> list[str]:
    return page.evaluate("[...document.querySelectorAll('.drawn img')].map(i => i.src)")


def settled(page) -> str:
    """The line under the images, once a drawing is over."""
    page.wait_for_function("/^\\d+\\.\\d, \\d+\\.\\d, \\d+\\.\\d s/m.test(document.body.innerText)", timeout=60_000)
    return page.locator("body").inner_text()


def test_a_prompt_is_drawn_by_the_base_and_by_both(page):
    page.get_by_label("Prompt").fill("a photo of a cat")
    page.get_by_label("Prompt").press("Enter")
    base, erased, steered = images(page)
    assert base.shape == (64, 64, 3)
    assert np.abs(base.astype(int) - erased).max() > 40
    assert np.abs(base.astype(int) - steered).max() > 40
    seconds = [float(s) for s in re.search(r"(\d+\.\d), (\d+\.\d), (\d+\.\d) s", settled(page)).groups()]
    assert max(seconds) < 60


def test_a_switch_and_a_strength_act_on_their_own_image(page):
    page.get_by_label("Prompt").fill("a cat")
    page.get_by_role("button", name="Draw").click()
    base, erased, steered = images(page)
    settled(page)
    before = sources_of(page)
    page.get_by_label("erased").first.uncheck()
    page.wait_for_function("old => document.querySelectorAll('.drawn img')[1].src !== old", arg=before[1])
    settled(page)
    off = images(page)
    assert np.array_equal(off[1], base)
    assert np.array_equal(off[2], steered)
    before = sources_of(page)
    page.get_by_label("erased").first.check()
    page.wait_for_function("old => document.querySelectorAll('.drawn img')[1].src !== old", arg=before[1])
    settled(page)
    assert np.array_equal(images(page)[1], erased)


def test_a_strength_of_nothing_is_the_base(page):
    page.get_by_label("Prompt").fill("a cat")
    page.get_by_label("Prompt").press("Enter")
    base, erased, _ = images(page)
    settled(page)
    before = sources_of(page)
    strength = page.get_by_role("slider", name="strength: cat").first
    strength.focus()
    strength.press("Home")
    page.wait_for_function("old => document.querySelectorAll('.drawn img')[1].src !== old", arg=before[1])
    settled(page)
    assert np.array_equal(images(page)[1], base)
    assert not np.array_equal(erased, base)


def test_dark_is_dark(page, server):
    page.goto(f"{server}?__theme=dark")
    page.get_by_label("Prompt").wait_for()
    rgb = page.evaluate("getComputedStyle(document.querySelector('.gradio-container')).backgroundColor")
    assert max(map(int, re.findall(r"\d+", rgb)[:3])) < 60


def test_a_wrong_prompt_is_said_and_breaks_nothing(page):
    page.get_by_role("button", name="Draw").click()
    page.get_by_text("There is no prompt").first.wait_for(timeout=30_000)
    page.get_by_label("Prompt").fill("a dog")
    page.get_by_label("Prompt").press("Enter")
    assert len(images(page)) == 3


def test_axe_finds_nothing_serious(page, axe):
    page.get_by_label("Prompt").fill("a cat")
    page.get_by_label("Prompt").press("Enter")
    images(page)
    page.evaluate(axe)
    found = page.evaluate("async () => (await axe.run()).violations.map(v => [v.id, v.impact, v.nodes[0].html])")
    assert [v for v in found if v[1] in ("serious", "critical")] == []


def test_only_this_machine_is_let_in(server):
    port = int(server.rstrip("/").rpartition(":")[2])
    with socket.socket() as probe:
        others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
        for address in (a for a in others if not a.startswith("127.")):
            assert probe.connect_ex((address, port)) != 0
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"]
    assert f"0100007F:{port:04X}" in listening
    assert f"00000000:{port:04X}" not in listening
