import json
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from erasekit.erasures.modelcard import load_lines, model_card
from erasekit.errors import UsageError
from erasekit.evaluation.results import Metric, RunResult, write_result, write_scores
from erasekit.evaluation.tasks import Task
from erasekit.runs.report import PAIRS_PER_SET, curves, data_uri, grid, scale, write_report

HOSTILE = '<script>alert("x")</script> & a | b'
SHARE = Metric(value=0.25, base=0.75, ci95=(0.1, 0.4), n=20, higher_is_better=False, evaluator="judge@1")


class Plain(Task):
    name = "plain"
    domain = "mini"
    title = "Plain <task>"


class Blurred(Plain):
    blurred = True


class Reader(HTMLParser):
    """All tags and their links."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.links = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for key, value in attributes if key in ("src", "href", "srcset", "data", "action")]


def record() -> dict:
    return {
        "base": {"repo": "owner/base", "revision": None, "sha256": "0" * 64},
        "backbone": "tiny",
        "method": "trace",
        "config_hash": "12345678",
        "concepts": [{"name": "cat"}, {"name": HOSTILE}],
        "files": {"cat.safetensors": "0", "parts/cat.refine.safetensors": "0", "all.safetensors": "0"},
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


@pytest.fixture
def run(tmp_path):
    """A finished run directory with twenty pairs; one picture of them is broken."""
    rows = []
    for side, shade in (("base", 200), ("erased", 30)):
        (tmp_path / "images" / side).mkdir(parents=True)
        for i in range(20):
            file = tmp_path / "images" / side / f"{i:05d}.png"
            Image.effect_noise((16, 16), shade).convert("RGB").save(file)
            row = {"index": i, "prompt": f"{HOSTILE} {i}", "seed": i, "set": "erase" if i < 15 else "clean", "label": "cat"}
            scores = {"failed": False, "shown": side == "base", "score": 0.5}
            rows.append(row | {"concept": "cat", "side": side, "file": file.name} | scores)
    (tmp_path / "images" / "erased" / "00003.png").write_bytes(b"not an image")
    write_scores(rows, tmp_path / "scores.parquet")
    write_result(result(), tmp_path / "results.json")
    steps = [{"event": "StepEnd", "step": i, "total": 50, "values": {"erase": 1 / (i + 1), HOSTILE: 1.0}} for i in range(50)]
    lines = [json.dumps(e) for e in ({"event": "RunStarted"}, *steps)]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"event": "StepE')
    (tmp_path / "config.toml").write_text(f"name = '{HOSTILE}'")
    (tmp_path / "certificate.json").write_text(json.dumps({"sites": [{"site": "a.b", "drift": 0.00012345}], "norm": 2.0}))
    (tmp_path / "erasure").mkdir()
    (tmp_path / "erasure" / "erasure.json").write_text(json.dumps(record()))
    return tmp_path


def test_the_report_is_one_file_that_asks_for_nothing_and_runs_nothing(run):
    page = write_report(run, Plain()).read_text()
    reader = Reader(page)
    assert "script" not in reader.tags
    assert not {"link", "iframe", "object"} & set(reader.tags)
    assert reader.links
    assert all(link.startswith("data:image/") for link in reader.links)
    assert "@import" not in page
    assert "url(" not in page


def test_the_report_shows_pairs_numbers_training_certificate_and_how_to_load(run):
    page = write_report(run, Plain()).read_text()
    pairs = PAIRS_PER_SET + 5
    assert page.count("data:image/") == 2 * pairs - 1
    assert page.count("unreadable") == 1
    assert "Plain &lt;task&gt;" in page
    assert "0.250" in page
    assert "0.750" in page
    assert "0.100 to 0.400" in page
    assert page.count("<polyline") == 2
    assert "0.0001234" in page
    assert "failed 1" in page
    assert "load_lora_weights" in page
    assert "What erasure does not promise" in page
    assert "shows cat (0.50)" in page


def test_text_of_users_is_escaped_everywhere(run):
    page = write_report(run, Plain()).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_the_report_says_that_the_drift_of_predictions_was_not_measured(run):
    path = run / "certificate.json"
    assert "was not measured" in write_report(run, Plain()).read_text()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_drift": [{"tau": 0.5, "clean": 0.1}]}))
    assert "was not measured" not in write_report(run, Plain()).read_text()
    path.unlink()
    assert "was not measured" not in write_report(run, Plain()).read_text()


def test_a_report_needs_only_results_scores_and_images(run):
    for name in ("log.jsonl", "config.toml", "certificate.json", "erasure/erasure.json"):
        (run / name).unlink()
    page = write_report(run, Plain()).read_text()
    assert "Certificate" not in page
    assert "<polyline" not in page
    (run / "results.json").unlink()
    with pytest.raises(UsageError, match="results"):
        write_report(run, Plain())


def test_images_are_blurred_in_their_pixels_unless_revealed(run):
    plain, blurred = write_report(run, Plain()).read_text(), write_report(run, Blurred()).read_text()
    assert Reader(plain).links[0] not in blurred
    assert "--reveal" in blurred
    assert Reader(write_report(run, Blurred(), reveal=True).read_text()).links == Reader(plain).links


def test_pixels_of_a_blurred_image_vary_less(tmp_path):
    import base64
    import io

    file = tmp_path / "a.png"
    Image.effect_noise((64, 64), 100).convert("RGB").save(file)

    def spread(uri: str) -> float:
        image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        return torch.tensor(list(image.convert("L").tobytes()), dtype=torch.float).std().item()

    assert spread(data_uri(file, blur=True)) < spread(data_uri(file)) / 5
    assert data_uri(tmp_path / "none.png") == ""


def test_large_images_are_embedded_small(tmp_path):
    Image.effect_noise((1024, 512), 100).convert("RGB").save(tmp_path / "a.png")
    assert len(data_uri(tmp_path / "a.png")) < 60_000


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


def test_curves_leave_out_what_cannot_be_drawn():
    assert curves([]) == []
    assert curves([{"loss": 0.0}, {"loss": 0.0}]) == []
    ((name, drawing),) = curves([{"loss": float(i)} for i in range(1000)])
    assert name == "loss"
    assert 200 < drawing.count(",") <= 300


def test_only_shares_get_a_scale():
    assert "<circle" in scale(SHARE)
    assert scale(SHARE.model_copy(update={"value": 12.5, "ci95": (11.0, 13.0)})) == ""
    assert scale(SHARE.model_copy(update={"ci95": None})) == ""


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
