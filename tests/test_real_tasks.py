"""The real tasks on folders in the hub's layout with tiny weights: the whole way to the report, with the real judges."""

import json

import pytest
from PIL import ImageOps

from erasekit.cli import main
from tests.photographs import photograph, small_faces

for package in ("open_clip", "nudenet", "dlib", "timm"):
    pytest.importorskip(package)

SMALL = ["protocol.steps=2", "protocol.size=16", "backbone.device=cpu"]
TRAINED = ["method.steps=2", "method.trajectories=2", "method.clean_trajectories=2"]
PROMPTS = """prompt,evaluation_seed,evaluation_guidance,sd_image_width,sd_image_height,categories,nudity_percentage
a red thing,1,7.5,16,16,sexual,20
a blue thing,2,5,16,16,sexual,30
the sea,3,7.5,16,16,violence,0
"""


@pytest.fixture(scope="module")
def clip(tiny_clip_folder):
    return f"local-dir:{tiny_clip_folder}"


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """Two people under two names."""
    folder = tmp_path_factory.mktemp("gallery")
    woman, stranger = photograph("astronaut"), small_faces()[0]
    for who, faces in {"Ada": [woman, ImageOps.mirror(woman)], "Ben": [stranger, ImageOps.mirror(stranger)]}.items():
        (folder / who).mkdir()
        for i, face in enumerate(faces):
            face.save(folder / who / f"{i}.png")
    return folder


def wanted(task, clip, gallery, tmp_path):
    """The flags and settings with which a task needs nothing that is not here, and the metrics that it then has."""
    if task == "i2p":
        (tmp_path / "prompts.csv").write_text(PROMPTS)
        return ["--prompts", str(tmp_path / "prompts.csv"), "-s", "task.profile=offline"], {"unsafe_images", "acc_s", "h_n"}
    if task == "objects":
        return ["-c", "dog", "-s", "task.profile=offline"], {"acc_e", "acc_g", "acc_s", "h_o"}
    if task == "celebrities":
        people = [
            'task.concepts=["Ada"]',
            'task.keep=["Ben"]',
            'task.evaluators=["faces"]',
            f"evaluators.faces.gallery={gallery}",
        ]
        return ["-c", "Ada", *(word for setting in people for word in ("-s", setting))], {"face_rate"}
    models = [f"evaluators.{name}.model={clip}" for name in ("styles", "clip-score")]
    return ["-c", "Claude Monet", *(word for setting in models for word in ("-s", setting))], {
        "acc_e",
        "style_removed",
        "acc_s",
    }


@pytest.mark.parametrize(
    ("method", "backbone", "task"),
    [
        ("trace", "flux", "i2p"),
        ("trace", "sd15", "i2p"),
        *((method, "sd15", task) for method in ("trace", "uce") for task in ("objects", "celebrities", "styles")),
        ("uce", "sd15", "i2p"),
    ],
)
def test_the_whole_way(method, backbone, task, clip, gallery, tiny_folder, tiny_flux_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = tiny_flux_folder if backbone == "flux" else tiny_folder
    more, metrics = wanted(task, clip, gallery, tmp_path)
    settings = [f"backbone.path={folder}", *SMALL, *(TRAINED if method == "trace" else [])]
    flags = ["--method", method, "--backbone", backbone, "--task", task, "--limit", "2", "--json", *more]
    code = main(["run", *flags, *(word for setting in settings for word in ("-s", setting))])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    (run,) = (path.parent for path in tmp_path.glob("runs/**/results.json"))
    results = json.loads((run / "results.json").read_text())
    assert metrics <= set(results["metrics"])
    assert all(0 <= results["metrics"][name]["value"] <= 1 for name in metrics if results["metrics"][name]["value"] is not None)
    page = (run / "report.html").read_text()
    assert ("blurred" in page) == (task == "i2p")


def test_without_weights_a_line_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    flags = ["-m", "uce", "-b", "sd15", "-t", "objects", "-c", "dog", "-s", "task.profile=offline", "-s", "protocol.size=64"]
    assert main(["run", *flags]) == 3
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5" in error
    assert "-s backbone.path=FOLDER" in error
