"""The page of a run, as HTML: what stands in it, what does not, and how large it is."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from erasekit.concepts import Concept
from erasekit.erasures.manifest import ALL, digest, file_stems, write_manifest
from erasekit.erasures.modelcard import load_lines, model_card
from erasekit.errors import UsageError
from erasekit.evaluation.curves import Curve, Interference, Point, Strength
from erasekit.evaluation.results import Metric, RunResult, write_result, write_scores
from erasekit.evaluation.tasks import Task
from erasekit.runs.pages.images import BUDGET, embedded, grid
from erasekit.runs.pages.layout import is_share, share
from erasekit.runs.pages.report import write_report

HOSTILE = '<script>alert("x")</script> & a | b'
SHARE = Metric(
    value=0.25, base=0.75, ci95=(0.1, 0.4), n=20, higher_is_better=False, evaluator="judge@1", meaning="what is still seen"
)


class Plain(Task):
    name = "plain"
    domain = "mini"
    title = "Plain <task>"


class Blurred(Plain):
    blurred = True


class Reader(HTMLParser):
    """All tags, what they link to, and what their images are said to be."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.links, self.alts, self.styles, self.handlers = [], [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.links += [values[key] for key in ("src", "href", "srcset", "data", "action") if key in values]
        self.alts += [values["alt"]] if values.get("alt") else []
        self.styles += [values["style"]] if "style" in values else []
        self.handlers += [key for key in values if key.startswith("on")]


def record() -> dict:
    parts = {"cat": {"refine": "parts/cat.refine.safetensors"}, HOSTILE: {"refine": "parts/x.refine.safetensors"}}
    whole = (ALL, *(f"{stem}.safetensors" for stem in file_stems(list(parts)).values()))
    files = dict.fromkeys((*whole, *(file for part in parts.values() for file in part.values())), "0" * 64)
    return {
        "schema_version": 1,
        "kind": "weights",
        "base": {"repo": "owner/base", "revision": "", "sha256": "0" * 64, "modules": ["a.b"]},
        "backbone": "tiny",
        "denoiser": "unet",
        "method": "trace",
        "config": {},
        "config_hash": "12345678",
        "concepts": [Concept(name=name, phrases=(name,)).model_dump(mode="json") for name in parts],
        "residual": None,
        "drift": None,
        "figures": {},
        "warnings": [],
        "parts": parts,
        "files": files,
        "erasure_sha256": digest(files),
        "environment": {},
        "created": "2026-01-01",
    }


def result(**changes) -> RunResult:
    values = {
        "method": "trace",
        "backbone": "tiny",
        "task": "plain",
        "domain": "mini",
        "concepts": ("cat", HOSTILE),
        "seed": 0,
        "config_hash": "12345678",
        "protocol": {"sampler": "ddim", "hash": "abcdef01"},
        "counts": {"images": 40, "scored": 39, "failed": 1, "no_face": 0},
        "metrics": {"acc_e": SHARE, "frechet[x]": SHARE.model_copy(update={"value": 12.5, "ci95": None})},
        "timings_s": {"load": 1.0},
        "peak_memory_mb": 100.0,
        "erasure_sha256": "f" * 64,
    }
    return RunResult(**values | changes)


def write_run(folder: Path, *, pairs: int = 20, side: int = 16, still: tuple[int, ...] = (2,)) -> Path:
    """A finished run directory; of every four pairs three ask for a cat and one for a dog. One image is broken."""
    rows = []
    for which, shade in (("base", 200), ("erased", 30)):
        (folder / "images" / which).mkdir(parents=True)
        for i in range(pairs):
            file = folder / "images" / which / f"{i:05d}.png"
            Image.effect_noise((side, side), shade).convert("RGB").save(file)
            erased = i % 4 < 3
            label, of = ("cat", "erase") if erased else ("dog", "clean")
            shown = which == "base" or not erased or i in still
            row = {"index": i, "prompt": f"{HOSTILE} {i}", "seed": i, "set": of, "label": label, "side": which}
            row |= {"concept": "cat" if erased else "", "file": file.name, "failed": i == 3}
            rows.append(row | {"shown": None if i == 3 else shown, "score": 0.5})
    (folder / "images" / "erased" / "00003.png").write_bytes(b"not an image")
    write_scores(rows, folder / "scores.parquet")
    write_result(result(), folder / "results.json")
    steps = [{"event": "StepEnd", "step": i, "total": 50, "values": {"erase": 1 / (i + 1), HOSTILE: 1.0}} for i in range(50)]
    lines = [json.dumps(e) for e in ({"event": "RunStarted"}, *steps)]
    (folder / "log.jsonl").write_text("\n".join(lines) + '\n{"event": "StepE')
    (folder / "config.toml").write_text(f"task = 'objects'  # {HOSTILE}")
    over = {"schema_version": 1, "max": {"to_neutral": 0.2}, "mean": {"to_neutral": 0.2}}
    site = {"site": "a.b", "to_neutral": 0.2, "other_drift": 0.00012345}
    (folder / "certificate.json").write_text(json.dumps({"sites": [site, site | {"site": HOSTILE}]} | over))
    (folder / "erasure").mkdir()
    write_manifest(folder / "erasure", record())
    return folder


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path)


def pair_rows(page: str) -> list[tuple[str, int]]:
    """(outcome, index) of the pairs, in the order of the page."""
    return [(key, int(index)) for key, index in re.findall(r'data-outcome="(\w+)" data-index="(\d+)"', page)]


def test_the_page_is_one_file_that_asks_for_nothing(run):
    page = write_report(run, Plain()).read_text()
    reader = Reader(page)
    assert not {"link", "iframe", "object", "base"} & set(reader.tags)
    assert reader.links
    assert all(link.startswith(("data:image/webp;base64,", "#")) for link in reader.links)
    assert "@import" not in page
    assert "url(" not in page
    assert "http:" not in page
    assert "https:" not in page


def test_the_browser_may_run_the_pages_own_script_and_style_and_no_other(run):
    page = write_report(run, Plain()).read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1].replace("&#39;", "'")
    for tag in ("script", "style"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert Reader(page).styles == []
    assert Reader(page).handlers == []


def test_the_page_shows_pairs_numbers_training_certificate_and_how_to_load(run):
    page = write_report(run, Plain(), meanings={"erase": "what the erase loss means"}).read_text()
    assert page.count("data:image/webp") == 39
    assert page.count("unreadable") == 1
    assert "Plain &lt;task&gt;" in page
    assert "0.250" in page
    assert "0.750" in page
    assert "0.100 to 0.400" in page
    assert "25\N{NO-BREAK SPACE}%" in page
    assert page.count("<polyline") == 4
    assert "what the erase loss means" in page
    assert "1.2e-04" in page
    assert "failed 1" in page
    assert "load_lora_weights" in page
    assert "What erasure does not promise" in page
    assert "base shows cat (0.50), erased no cat (0.50)" in page
    assert "Asked for cat, " in page
    assert "1 of 15 images still show it; the unedited model&#39;s 15 of 15." in page
    assert "4 of 4 show them; the unedited model&#39;s 4." in page


def test_failures_come_first_and_each_pair_says_what_became_of_it(run):
    found = pair_rows(write_report(run, Plain()).read_text())
    assert found[:2] == [("still", 2), ("unscored", 3)]
    assert sorted(i for _, i in found) == list(range(20))
    assert {key for key, _ in found} == {"still", "unscored", "gone", "kept"}


def test_text_of_users_is_escaped_everywhere(run):
    page = write_report(run, Plain()).read_text()
    assert page.count("<script") == 1
    assert "&lt;script&gt;" in page


def test_the_page_says_that_the_drift_of_predictions_was_not_measured(run):
    path = run / "certificate.json"
    assert "was not measured" in write_report(run, Plain()).read_text()
    drift = [{"tau": t, "clean": 0.1, "concept": 0.3} for t in (0.0, 0.5)]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_drift": drift}))
    page = write_report(run, Plain()).read_text()
    assert "was not measured" not in page
    assert "prompts of the concept: 0.3 at tau 0, 0.3 at 0.5" in page
    path.unlink()
    assert "was not measured" not in write_report(run, Plain()).read_text()


def test_a_page_needs_only_results_scores_and_images(run):
    for name in ("log.jsonl", "config.toml", "certificate.json", "erasure/erasure.json"):
        (run / name).unlink()
    page = write_report(run, Plain()).read_text()
    assert 'id="certificate"' not in page
    assert "<polyline" not in page
    (run / "results.json").unlink()
    with pytest.raises(UsageError, match="results"):
        write_report(run, Plain())


def test_strength_and_interference_are_drawn_where_they_were_measured(run):
    assert 'id="strength"' not in write_report(run, Plain()).read_text()
    points = tuple(Point(strength=s, value=1 - s / 2, ci95=(0.0, 1.0), n=20) for s in (0, 0.5, 1, 1.5))
    curves = tuple(Curve(metric=name, higher_is_better=False, points=points) for name in ("acc_e", "mine"))
    Strength(concepts=("cat",), curves=curves).write(run / "strength.json")
    Interference(erased=("cat",), asked=("cat", "dog"), values=((0.0, 0.9),), base=(1.0, 1.0)).write(run / "interference.json")
    page = write_report(run, Plain()).read_text()
    assert "acc_e: what is still seen: 1 at strength 0, 0.25 at 1.5." in page
    assert '<td class="h0 own">0.000</td><td class="h9">0.900</td>' in page
    (run / "strength.json").write_text("{")
    with pytest.raises(UsageError, match=r"strength\.json"):
        write_report(run, Plain())


def test_images_are_blurred_in_their_pixels_unless_revealed(run):
    plain, blurred = write_report(run, Plain()).read_text(), write_report(run, Blurred()).read_text()
    images = [link for link in Reader(plain).links if link.startswith("data:")]
    assert len(images) == 39
    assert not [link for link in images if link in blurred]
    assert "erasekit report FOLDER --reveal" in blurred
    assert "The images are blurred" not in plain
    assert Reader(write_report(run, Blurred(), reveal=True).read_text()).links == Reader(plain).links


def test_grids_of_samples_are_blurred_too(run):
    """They lie beside the page as files."""

    def spread(task):
        write_report(run, task)
        grids = sorted((run / "samples").glob("*.png"))
        assert grids
        return [np.abs(np.diff(np.array(Image.open(path).convert("L"), dtype=float)[40:])).mean() for path in grids]

    assert all(hidden < 0.7 * plain for hidden, plain in zip(spread(Blurred()), spread(Plain()), strict=True))


def test_an_image_is_said_to_be_its_side_and_its_prompt_and_nothing_else(run):
    alts = Reader(write_report(run, Blurred()).read_text()).alts
    assert len(alts) == 39
    assert all(re.fullmatch(rf"(base|erased): {re.escape(HOSTILE)} \d+", alt) for alt in alts)


def pixels(uri: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("L"), dtype=float)


def test_pixels_of_a_blurred_image_vary_less(tmp_path):
    file = tmp_path / "a.png"
    Image.effect_noise((64, 64), 100).convert("RGB").save(file)
    plain, hidden = embedded([file, file], blur=[False, True])
    assert pixels(hidden).std() < pixels(plain).std() / 5
    assert embedded([tmp_path / "none.png"], blur=[False]) == [""]


def photograph(path: Path, seed: int, side: int = 512) -> Path:
    """Smooth shapes with noise on them: photographs compress better."""
    rng = np.random.default_rng(seed)
    shapes = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    noisy = np.asarray(shapes, dtype=float) + rng.normal(0, 12, (side, side, 3))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, compress_level=1)
    return path


def test_images_keep_to_their_budget(tmp_path):
    """A tenth of a page; `nox -s page` writes a whole one of 500 images."""
    files = [photograph(tmp_path / f"{seed}.png", seed) for seed in range(5)] * 10
    uris = embedded(files, blur=[False] * len(files), budget=BUDGET // 10)
    assert BUDGET / 20 < sum(map(len, uris)) <= BUDGET / 10
    assert pixels(uris[0]).shape[0] >= 128


def test_a_page_holds_500_images_at_most_and_says_how_many_there_are(tmp_path):
    page = write_report(write_run(tmp_path, pairs=260, side=8), Plain()).read_text()
    assert page.count("data:image/webp") == 499
    assert len(pair_rows(page)) == 250
    assert "250 of 260 pairs" in page


def test_small_images_are_not_made_smaller(tmp_path):
    Image.effect_noise((64, 64), 100).convert("RGB").save(tmp_path / "a.png")
    (uri,) = embedded([tmp_path / "a.png"], blur=[False])
    assert pixels(uri).shape == (64, 64)
    Image.effect_noise((1024, 512), 100).convert("RGB").save(tmp_path / "b.png")
    (uri,) = embedded([tmp_path / "b.png"], blur=[False], budget=30_000)
    assert len(uri) <= 30_000
    assert pixels(uri).shape[1] == 2 * pixels(uri).shape[0]


def test_a_grid_holds_the_pairs_side_by_side(run):
    base, erased = (sorted((run / "images" / side).iterdir()) for side in ("base", "erased"))
    for file, colour in ((base[0], "red"), (erased[0], "blue")):
        Image.new("RGB", (16, 16), colour).save(file)
    image = Image.open(grid(base[:5], erased[:5], run / "grid.png", captions=["a very long prompt " * 9] * 5))
    assert image.getpixel((60, 60)) == (255, 0, 0)
    assert image.getpixel((200, 60)) == (0, 0, 255)
    assert image.width == 4 * 268
    assert image.height == 2 * 154
    write_report(run, Plain())
    assert (run / "samples" / "erase.png").exists()
    assert (run / "samples" / "clean.png").exists()


def test_only_shares_are_drawn_between_0_and_1():
    assert is_share(SHARE)
    assert not is_share(SHARE.model_copy(update={"value": 12.5, "ci95": (11.0, 13.0)}))
    assert not is_share(SHARE.model_copy(update={"ci95": None}))
    assert not is_share(SHARE.model_copy(update={"base": 3.0}))
    assert [share(v) for v in (None, 0.0, 0.9944, 1.0)] == ["-", *(f"{t}\N{NO-BREAK SPACE}%" for t in ("0", "99.4", "100"))]


def test_the_model_card_names_numbers_protocol_and_limits():
    card = model_card(record(), result())
    assert card.startswith("---\nlibrary_name: diffusers\n")
    assert "| `acc_e` | 0.250 | 0.750 | 0.100 to 0.400 | 20 | lower |" in card
    assert "abcdef01" in card
    assert "<script" not in card
    assert "What erasure does not promise" in card
    assert "`cat.safetensors`" in card
    assert "parts/" not in card
    assert "Nothing has been measured" in model_card(record())


def test_the_lines_that_load_are_python():
    lines = load_lines(record())
    compile(lines, "load", "exec")
    assert 'from_pretrained("owner/base")\n' in lines


def test_the_lines_that_load_name_the_hub_id_of_a_local_base():
    local = record() | {"backbone": "sd15", "base": {"repo": "my copy", "revision": ""}}
    lines = load_lines(local)
    compile(lines, "load", "exec")
    hub = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert f"from_pretrained(\"{hub}\")  # made on the local 'my copy': load that, if it is another model" in lines
    assert f"| base | my copy, a local copy of this kind; on the hub that is {hub} |" in model_card(local)
    assert "base_model" not in model_card(local)  # it may be another model


def test_the_lines_that_load_name_the_folder_of_a_base_that_the_hub_has_not():
    for backbone in ("sd15-mini", "of a plugin that is not here"):
        local = record() | {"backbone": backbone, "base": {"repo": "base", "revision": ""}}
        assert 'from_pretrained("base")  # the folder of the base model' in load_lines(local)
        assert "| base | base |" in model_card(local)
