"""The page of several runs in a browser: filters, images laid over the base's, and what axe finds."""

import pytest

from erasekit.runs.pages.comparison import compared, write_comparison
from tests.test_comparison import run
from tests.test_report import HOSTILE


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    runs = [run(folder / name, left=0.1 * i, stayed=0.8, still=(1,) * i, method=name) for i, name in enumerate("abc")]
    runs.append(run(folder / "d", left=0.0, stayed=1.0, method="d", protocol={"sampler": "ddim", "hash": "12121212"}))
    return write_comparison(compared(runs), folder / "page.html")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing(show, axe, path, theme, width):
    page = show(path, theme=theme, width=width)
    page.evaluate(axe)
    assert page.evaluate("async () => (await axe.run()).violations.map(v => [v.id, v.impact, v.nodes[0].html])") == []
    page.locator("#images-1 .shot").first.click()
    assert page.evaluate("async () => (await axe.run('#viewer')).violations.map(v => [v.id, v.nodes[0].html])") == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_each_part_filters_its_own_prompts(show, path):
    page = show(path)
    page.check("#images-1 input[value=differs]", force=True)
    counts = [page.locator(f"#images-{i} output").inner_text() for i in (1, 2)]
    assert counts == ["1 of 20 prompts", "20 of 20 prompts"]
    assert page.locator("#images-1 tbody tr:visible").count() == 1


def test_an_image_is_laid_over_the_bases_and_keys_go_from_run_to_run(show, path):
    page = show(path)
    page.locator("#images-1 .shot").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#viewer-title").inner_text() == f"{HOSTILE} 1"
    assert page.locator("#viewer-facts").inner_text() == "a · gone · seed 1"
    assert page.locator("#viewer .erased > span").inner_text() == "a"
    first, base = page.locator("#viewer .erased img"), page.locator("#viewer .base img")
    seen = first.get_attribute("src"), base.get_attribute("src")
    page.keyboard.press("n")
    assert page.locator("#viewer-facts").inner_text() == "b · still there · seed 1"
    assert first.get_attribute("src") != seen[0]
    assert base.get_attribute("src") == seen[1]
    page.keyboard.press("Home")
    assert page.locator("#viewer .wipe").get_attribute("aria-valuetext") == "0 % base, 100 % erased"
    page.keyboard.press("Escape")
    assert not page.locator("#viewer").is_visible()
