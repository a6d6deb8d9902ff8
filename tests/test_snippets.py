"""What is shown for loading runs as it stands: what the terminal prints, the report's lines, the card's lines."""

from __future__ import annotations

import contextlib
import html
import io
import re
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from erasekit.backbones.where import where
from erasekit.cli import main
from erasekit.erasures.modelcard import load_lines
from erasekit.errors import UsageError
from erasekit_mini.backbone import MODELS

MINIS = ["sd15-mini", "flux-mini"]


@pytest.fixture(scope="module", params=MINIS)
def finished(request, tmp_path_factory):
    """(model, folder that the command ran in, run directory, what it printed) of a short run."""
    place = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as shown:
        patch.chdir(place)
        arguments = ["run", "-m", "uce", "-b", request.param, "-t", "objects", "-c", "cat"]
        assert main([*arguments, "--limit", "1", "-s", "protocol.steps=2"]) == 0
    (directory,) = place.glob("runs/*/*/*/*/report.html")
    return request.param, place, directory.parent, shown.getvalue()


def draws(lines: str, folder: Path, monkeypatch) -> Image.Image:
    """Run lines as they are in a folder, and open the image that they save."""
    monkeypatch.chdir(folder)
    exec(compile(lines, "shown", "exec"), {})
    image = Image.open(folder / "dog.png")
    assert image.size == (64, 64)
    assert np.asarray(image).std() > 10
    return image


def test_the_lines_on_the_terminal(finished, monkeypatch):
    model, place, _, shown = finished
    lines = shown.partition("report.html\n\n")[2]
    assert f'from_pretrained("{MODELS / model}")' in lines
    assert "erasekit" not in lines.replace(str(MODELS), "")
    draws(lines, place, monkeypatch)


def test_the_lines_of_the_report(finished, monkeypatch):
    model, _, directory, _ = finished
    page = (directory / "report.html").read_text()
    blocks = [html.unescape(text) for text in re.findall(r"<pre[^>]*>(.*?)</pre>", page, re.DOTALL)]
    (lines,) = (text for text in blocks if "load_lora_weights" in text)
    assert f'where("{model}")' in lines
    draws(lines, directory, monkeypatch)


def test_the_lines_of_the_card(finished, monkeypatch):
    folder = finished[2] / "erasure"
    (lines,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    draws(lines, folder, monkeypatch)


def test_no_file_of_a_run_names_a_folder_of_this_machine(finished):
    _, place, directory, _ = finished
    for file in directory.rglob("*"):
        if file.suffix in (".md", ".html", ".json", ".toml", ".jsonl"):
            text = file.read_text()
            assert str(MODELS) not in text, file
            assert str(place) not in text, file


@pytest.mark.parametrize("name", MINIS)
def test_a_plain_from_pretrained_loads_everything_in_one_type(name):
    pipe = DiffusionPipeline.from_pretrained(MODELS / name)
    types = {p.dtype for part in pipe.components.values() if hasattr(part, "parameters") for p in part.parameters()}
    assert {str(t) for t in types} == {"torch.float32"}


@pytest.mark.parametrize("name", MINIS)
def test_the_readme_of_a_shipped_model_runs(name, monkeypatch, tmp_path):
    (lines,) = re.findall(r"```python\n(.*?)```", (MODELS / name / "README.md").read_text(), re.DOTALL)
    draws(f'{lines}image.save("dog.png")\n', tmp_path, monkeypatch)


def test_where_names_folders_and_ids(capsys):
    assert main(["where", "sd15-mini"]) == 0
    assert Path(capsys.readouterr().out.strip(), "model_index.json").is_file()
    assert where("sd1.5") == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert main(["where", "sd15-min"]) == 2
    assert "Did you mean 'sd15-mini'?" in capsys.readouterr().err


def test_where_of_a_backbone_without_a_model_of_its_own(world):
    assert main(["where", "tiny", "--plugin", str(world)]) == 0  # one that derives from Stable Diffusion has its model

    from erasekit.backbones.protocol import Backbone
    from erasekit.registration.plugins import load

    class Bare(Backbone):
        name = "bare"

    registries = load()
    registries.backbones.add(type(registries.backbones.entry("sd15"))("bare", Bare, "test", "test"))
    with pytest.raises(UsageError, match=r"-s backbone\.path=FOLDER"):
        where("bare", registries)


def test_the_lines_name_the_file_or_the_folder_that_a_user_gave():
    record = {"backbone": "sd15", "base": {"repo": "mine.safetensors"}, "kind": "weights"}
    single = load_lines(record, base="./mine.safetensors")
    assert 'StableDiffusionPipeline.from_single_file("./mine.safetensors")' in single
    assert 'DiffusionPipeline.from_pretrained("/a \\"b\\"")' in load_lines(record, base='/a "b"')
    compile(single, "shown", "exec")


def test_a_run_from_python(tmp_path, monkeypatch, capsys):
    """The lines of docs/how-to.md, as they are."""
    page = (Path(__file__).parents[1] / "docs" / "how-to.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"^## Run from Python\n\n```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(compile(lines, "shown", "exec"), found)
    printed = capsys.readouterr().out
    result = found["result"]
    assert printed == f"{result.metrics['acc_e'].value} before: {result.metrics['acc_e'].base}\n"
    assert result.metrics["acc_e"].n == 2
    assert result.protocol["steps"] == 8
    assert len(list(tmp_path.glob("runs/sd15-mini/objects/uce/*/results.json"))) == 1
