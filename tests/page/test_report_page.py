"""The page of a run in a browser: the divider, filters, enlarging, keys, colours, and what axe finds."""

import pytest
from PIL import Image

from erasekit.evaluation.curves import Curve, Interference, Point, Strength
from erasekit.runs.pages.report import write_report
from tests.test_report import HOSTILE, Plain, photograph, write_run


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """The page of a run with all that a page can have; base images are white and erased ones black."""
    folder = write_run(tmp_path_factory.mktemp("run"), side=64, still=(2, 5))
    for file in (folder / "images").rglob("*.png"):
        if file.name != "00003.png":
            Image.new("RGB", (64, 64), "white" if file.parent.name == "base" else "black").save(file)
    points = tuple(Point(strength=s, value=1 - s / 2, ci95=(0.0, 1.0), n=20) for s in (0, 0.5, 1, 1.5))
    curves = tuple(Curve(metric=name, higher_is_better=False, points=points) for name in ("acc_e", "mine"))
    Strength(concepts=("cat",), curves=curves).write(folder / "strength.json")
    matrix = Interference(erased=("cat", "dog"), asked=("cat", "dog"), values=((0.0, 0.9), (0.8, 0.1)), base=(1.0, 1.0))
    matrix.write(folder / "interference.json")
    (folder / "samples").mkdir()
    with (folder / "log.jsonl").open("a") as log:
        for step in (0, 20, 40):
            Image.new("RGB", (64, 64), (step, 0, 0)).save(folder / "samples" / f"step-{step}.webp")
            log.write(f'\n{{"event": "Watched", "step": {step}, "file": "step-{step}.webp", "prompts": ["a cat"]}}')
    return write_report(folder, Plain(), meanings={"erase": "what the erase loss means"})


def brightness(page, box) -> float:
    """The mean brightness of a part of the screen."""
    import io

    shot = page.screenshot(clip=box)
    image = Image.open(io.BytesIO(shot)).convert("L")
    return sum(image.tobytes()) / len(image.tobytes())


def visible(page) -> list[str]:
    return page.eval_on_selector_all(".pairs > li:not([hidden])", "items => items.map(item => item.dataset.outcome)")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_finds_nothing(show, axe, path, theme, width):
    page = show(path, theme=theme, width=width)
    page.evaluate("() => document.querySelectorAll('details').forEach(details => { details.open = true })")
    page.evaluate(axe)
    assert page.evaluate("async () => (await axe.run()).violations.map(v => [v.id, v.impact, v.nodes[0].html])") == []
    page.click(".pairs > li:nth-child(1) .open")
    assert page.evaluate("async () => (await axe.run('#viewer')).violations.map(v => [v.id, v.nodes[0].html])") == []
    page.eval_on_selector("select[name=set] option", "option => { option.textContent = 'a long name of a set '.repeat(9) }")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_divider_shows_more_of_the_one_or_the_other(show, path):
    page = show(path)
    two = page.locator(".pairs > li:nth-child(1) .two")
    two.scroll_into_view_if_needed()
    box = two.bounding_box()
    middle = {"x": box["x"] + 40, "y": box["y"] + 60, "width": box["width"] - 80, "height": 30}
    half = brightness(page, middle)
    two.locator("input").focus()
    page.keyboard.press("End")
    assert two.locator("input").get_attribute("aria-valuetext") == "100 % base, 0 % erased"
    assert brightness(page, middle) > 250
    page.keyboard.press("Home")
    assert brightness(page, middle) < 5
    assert 90 < half < 165
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    assert brightness(page, middle) == pytest.approx(255 * 0.2, abs=45)
    page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 100)
    page.mouse.down()
    page.mouse.up()
    assert abs(int(two.locator("input").input_value()) - 80) <= 3


def test_all_dividers_move_at_once_and_side_by_side_has_none(show, path):
    page = show(path)
    page.locator(".all-at").focus()
    page.keyboard.press("Home")
    assert set(page.eval_on_selector_all(".wipe", "all => all.map(one => one.value)")) == {"0", "50"}  # the viewer's is its own
    page.check("input[value=beside]", force=True)
    two = page.locator(".pairs > li:nth-child(1) .two")
    two.scroll_into_view_if_needed()
    box = two.bounding_box()
    left, right = (
        {"x": box["x"] + at * box["width"], "y": box["y"] + 40, "width": box["width"] * 0.3, "height": 20} for at in (0.05, 0.6)
    )
    assert brightness(page, left) > 250
    assert brightness(page, right) < 5
    assert page.locator(".all-at").is_disabled()


def test_filters_by_outcome_set_and_words(show, path):
    page = show(path)
    assert visible(page)[:3] == ["still", "still", "unscored"]
    assert page.locator(".controls output").inner_text() == "20 of 20 pairs"
    page.check("input[name=outcome][value=still]", force=True)
    assert visible(page) == ["still", "still"]
    assert page.locator(".controls output").inner_text() == "2 of 20 pairs"
    page.check("input[name=outcome][value='']", force=True)
    page.select_option("select[name=set]", "clean")
    assert set(visible(page)) == {"kept", "unscored"}
    page.select_option("select[name=set]", "")
    page.fill("input[name=text]", "SCRIPT 17")
    assert visible(page) == ["kept" if 17 % 4 == 3 else "gone"]
    page.fill("input[name=text]", "")
    page.select_option("select[name=order]", "prompt")
    order = page.eval_on_selector_all(".pairs > li", "items => items.map(item => Number(item.dataset.index))")
    assert order == list(range(20))
    page.select_option("select[name=order]", "rank")
    assert visible(page)[:2] == ["still", "still"]


def test_filters_are_reached_and_changed_by_keys_alone(show, path):
    page = show(path)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.locator("input[name=outcome]:checked").focus()
    page.keyboard.press("ArrowRight")
    assert visible(page) == ["still", "still"]


def test_an_image_is_enlarged_and_the_keys_go_on(show, path):
    page = show(path)
    page.check("input[name=outcome][value=still]", force=True)
    page.locator(".pairs > li:nth-child(1) .open").focus()
    page.keyboard.press("Enter")
    viewer = page.locator("#viewer")
    assert viewer.is_visible()
    assert page.locator("#viewer-title").inner_text() == f"{HOSTILE} 2"
    assert "still there · seed 2 · set erase · base shows cat (0.50)" in page.locator("#viewer-facts").inner_text()
    assert page.evaluate("document.querySelector('#viewer img').naturalWidth") == 64
    page.keyboard.press("n")
    assert page.locator("#viewer-where").inner_text() == "2 of 2"
    assert page.locator("#viewer-title").inner_text() == f"{HOSTILE} 5"
    page.keyboard.press("n")
    assert page.locator("#viewer-where").inner_text() == "1 of 2"
    page.keyboard.press("End")
    assert page.locator("#viewer .wipe").input_value() == "100"
    page.keyboard.press("Escape")
    assert not viewer.is_visible()
    assert page.evaluate("document.activeElement.className") == "open"


def test_colours_follow_the_system_until_they_are_chosen_and_are_kept(show, path):
    page = show(path, theme="dark")
    paper = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(paper) == "rgb(20, 20, 23)"
    page.click("#theme")
    assert page.locator("#theme").inner_text() == "Theme: light"
    assert page.evaluate(paper) == "rgb(251, 250, 248)"
    page.reload()
    assert page.evaluate(paper) == "rgb(251, 250, 248)"
    page.click("#theme")
    assert page.evaluate(paper) == "rgb(20, 20, 23)"
    page.click("#theme")
    assert page.locator("#theme").inner_text() == "Theme: system"


def test_images_drawn_while_training_are_shown_step_by_step(show, path):
    page = show(path)
    steps = "figures => figures.filter(one => !one.hidden).map(one => one.dataset.step)"
    assert page.eval_on_selector_all("#film figure", steps) == ["40"]
    page.locator("#film input").focus()
    page.keyboard.press("ArrowLeft")
    assert page.eval_on_selector_all("#film figure", steps) == ["20"]
    assert page.locator("#film input").get_attribute("aria-valuetext") == "20"


def test_without_scripts_the_pairs_stand_side_by_side(show, path):
    page = show(path, scripts=False)
    assert page.locator(".pairs > li").count() == 20
    assert not page.locator(".controls").is_visible()
    base, erased = (page.locator(f".pairs > li:nth-child(1) .side.{side}").bounding_box() for side in ("base", "erased"))
    assert base["x"] + base["width"] <= erased["x"]
    assert base["y"] == erased["y"]
    assert page.locator("#film figure").nth(0).is_visible()


def test_what_a_prompt_says_is_never_run(show, path):
    """A script that got in all the same would be refused: it is not the page's own."""
    page = show(path)
    assert page.evaluate("document.scripts.length") == 1
    handler = "<img src=data:, onerror='document.title = 1'>"
    page.evaluate("text => document.body.insertAdjacentHTML('beforeend', text)", handler)
    page.wait_for_timeout(300)
    assert page.title() != "1"
    (refusal,) = show.said
    assert "Content Security Policy" in refusal
    show.said.clear()


def test_a_whole_page_of_500_images_is_under_5_mb_and_opens(show, tmp_path):
    folder = write_run(tmp_path / "run", pairs=260, side=8)
    some = [photograph(tmp_path / f"{seed}.png", seed) for seed in range(8)]
    for k, file in enumerate(sorted((folder / "images").rglob("*.png"))):
        file.unlink()
        file.hardlink_to(some[k % 8])
    path = write_report(folder, Plain())
    assert path.read_text().count("data:image/webp") == 500
    assert 2_000_000 < path.stat().st_size < 5_000_000
    page = show(path)
    assert page.locator(".controls output").inner_text() == "250 of 250 pairs"
