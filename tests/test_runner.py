"""Whole runs in a tiny world: real diffusers classes, random weights."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
import tomllib

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from erasekit.errors import EnvironmentProblem, ErasekitError, UsageError
from erasekit.evaluation.results import read_scores
from erasekit.registration import plugins
from erasekit.runs.config import RunConfig, build
from erasekit.runs.resolve import resolve
from erasekit.runs.rundir import path_of
from erasekit.runs.runner import run
from tests.conftest import THIRD_PARTY


@pytest.fixture(scope="module")
def registries(world):
    return plugins.load([world, THIRD_PARTY / "single_file_method.py"])


@pytest.fixture(scope="module")
def configured(tiny_folder):
    def config(*overrides, **flags) -> RunConfig:
        names = {"method": "pull", "backbone": "tiny", "task": "words", "concepts": ("cat",)}
        return build({**names, **flags}, overrides=[f"backbone.path={tiny_folder}", "backbone.device=cpu", *overrides])

    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory, registries, configured):
    """A finished run: (result, directory, out)."""
    out, heard = tmp_path_factory.mktemp("finished"), []
    result = run(configured(), out=out, registries=registries, listener=heard.append)
    return result, path_of(out, resolve(configured(), registries)), out, heard


def test_a_run_goes_through_its_stages_in_order(finished):
    result, path, _, heard = finished
    stages = [e.stage for e in heard if type(e).__name__ == "StageStarted"]
    assert stages == ["load", "encode", "base_images", "erase", "certify", "sample", "evaluate", "report"]
    assert [type(e).__name__ for e in heard if type(e).__name__.startswith("Run")] == ["RunStarted", "RunFinished"]
    assert sum(type(e).__name__ == "StepEnd" for e in heard) == 12
    content = json.loads((path / "results.json").read_text())
    assert content["config_hash"] == path.name
    assert content["protocol"]["hash"]
    assert set(content["timings_s"]) == {"load", "encode", "base_images", "erase", "sample", "evaluate"}
    assert all(seconds > 0 for seconds in content["timings_s"].values())
    assert content["counts"] == {"images": 10, "scored": 10, "failed": 0, "no_face": 0}
    assert result.erasure_sha256 == json.loads((path / "erasure" / "erasure.json").read_text())["erasure_sha256"]


def test_everything_that_was_promised_is_there(finished):
    _, path, out, _ = finished
    files = {str(f.relative_to(path)) for f in path.rglob("*") if f.is_file()}
    promised = {"config.toml", "status.json", "env.json", "log.jsonl", "scores.parquet", "results.json", "report.html"}
    assert files >= {*promised, "certificate.json", "erasure/erasure.json", "erasure/cat.safetensors", "erasure/README.md"}
    assert len([path for path in (out / "cache" / "base").iterdir() if path.is_dir()]) == 1
    rows = read_scores(path / "scores.parquet")
    assert {(path / "images" / r["side"] / r["file"]).is_file() for r in rows} == {True}


def test_nothing_written_names_a_folder_of_this_machine(finished):
    _, path, _, _ = finished
    for file in ("erasure/erasure.json", "erasure/README.md", "results.json", "log.jsonl", "env.json", "status.json"):
        assert str(path.parent) not in (path / file).read_text()


def test_a_finished_run_is_shown_not_done_again(finished, registries, configured):
    result, path, out, _ = finished
    before = {f: f.stat().st_mtime_ns for f in path.rglob("*") if f.is_file()}
    heard = []
    assert run(configured(), out=out, registries=registries, listener=heard.append) == result
    assert heard == []
    assert {f: f.stat().st_mtime_ns for f in path.rglob("*") if f.is_file()} == before


def test_the_written_configuration_is_the_run(finished, registries):
    _, path, _, _ = finished
    config = RunConfig.model_validate(tomllib.loads((path / "config.toml").read_text()))
    assert resolve(config, registries).hash == path.name


def test_the_same_again_gives_the_same_bytes(finished, registries, configured, tmp_path):
    result, path, _, _ = finished
    again = run(configured(), out=tmp_path, registries=registries)
    other = path_of(tmp_path, resolve(configured(), registries))
    assert again.metrics == result.metrics
    assert again.erasure_sha256 == result.erasure_sha256
    for file in (path / "images").rglob("*.png"):
        assert (other / file.relative_to(path)).read_bytes() == file.read_bytes()


def test_images_are_those_of_plain_diffusers(finished, tiny_folder, registries, configured):
    _, path, _, _ = finished
    protocol = resolve(configured(), registries).protocol
    pipe = StableDiffusionPipeline.from_pretrained(tiny_folder, safety_checker=None)
    pipe.load_lora_weights(path / "erasure", weight_name="cat.safetensors", adapter_name="cat")
    pipe.set_progress_bar_config(disable=True)
    rows = [r for r in read_scores(path / "scores.parquet") if r["side"] == "erased"][: protocol.batch]
    images = pipe(
        [r["prompt"] for r in rows],
        num_inference_steps=protocol.steps,
        guidance_scale=protocol.guidance,
        height=protocol.size,
        width=protocol.size,
        generator=[torch.Generator().manual_seed(r["seed"]) for r in rows],
    ).images
    for row, image in zip(rows, images, strict=True):
        with Image.open(path / "images" / "erased" / row["file"]) as saved:
            assert np.array_equal(np.array(saved), np.array(image))


def test_a_run_without_concepts_is_a_run_for_each_and_their_mean(finished, registries, configured):
    _, _, out, _ = finished
    config = configured(concepts=())
    mean = run(config, out=out, registries=registries)
    plan = resolve(config, registries)
    singles = [json.loads((path_of(out, p) / "results.json").read_text()) for p in plan.singles()]
    assert mean.concepts == ("cat", "dog")
    assert mean.config_hash == plan.hash
    assert mean.metrics["acc_e"].value == pytest.approx(sum(s["metrics"]["acc_e"]["value"] for s in singles) / 2)
    assert json.loads((path_of(out, plan) / "results.json").read_text()) == json.loads(mean.model_dump_json())
    assert run(config, out=out, registries=registries) == mean


def test_another_method_shares_the_base_images(finished, registries, configured):
    _, _, out, _ = finished
    before = {f: f.stat().st_mtime_ns for f in (out / "cache" / "base").rglob("*.png")}
    run(configured(method="direction"), out=out, registries=registries)
    assert {f: f.stat().st_mtime_ns for f in (out / "cache" / "base").rglob("*.png")} == before


def test_images_that_are_deleted_in_the_middle_are_drawn_again(finished, registries, configured, tmp_path):
    result, *_ = finished
    path, deleted = path_of(tmp_path, resolve(configured(), registries)), []

    def delete(event):
        if getattr(event, "stage", "") == "evaluate":
            for folder in (path / "images" / "base", path / "images" / "erased", tmp_path / "cache" / "base"):
                deleted.extend(folder.rglob("*.png"))
                shutil.rmtree(folder)

    again = run(configured(), out=tmp_path, registries=registries, listener=delete)
    assert len(deleted) == 15
    assert again.metrics == result.metrics
    assert sum(file.is_file() for file in (path / "images").rglob("*.png")) == 10


def test_an_erasure_can_be_measured_by_itself(finished, registries, configured):
    result, path, out, _ = finished
    again = run(configured(), out=out, registries=registries, erasure=path / "erasure")
    assert again.metrics == result.metrics
    assert again.erasure_sha256 == result.erasure_sha256
    assert again.config_hash != result.config_hash


def test_an_erasure_of_another_base_is_refused(finished, registries, configured, tmp_path):
    from erasekit.testing import tiny

    _, path, out, _ = finished
    other = tiny.save_pipeline(tmp_path / "other", seed=1)
    with pytest.raises(UsageError, match="another base"):
        run(configured(f"backbone.path={other}"), out=out, registries=registries, erasure=path / "erasure")


def test_a_flipped_bit_is_found_when_the_run_goes_on(registries, configured, tmp_path):
    run(configured(limit=1), out=tmp_path, registries=registries)
    path = path_of(tmp_path, resolve(configured(limit=1), registries))
    file = path / "erasure" / "all.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    (path / "results.json").unlink()
    with pytest.raises(EnvironmentProblem, match="is damaged"):
        run(configured(limit=1), out=tmp_path, registries=registries)
    assert json.loads((path / "status.json").read_text())["state"] == "failed"


def test_a_loss_that_is_no_number_keeps_what_was_finished(registries, configured, tmp_path):
    config, heard = configured("method.nan_at=8"), []
    with pytest.raises(ErasekitError, match="stopped at step 8"):
        run(config, out=tmp_path, registries=registries, listener=heard.append)
    path = path_of(tmp_path, resolve(config, registries))
    status = json.loads((path / "status.json").read_text())
    assert status["state"] == "failed"
    assert "base_images" in status["finished"]
    assert (path / "checkpoints" / "pull.safetensors").is_file()
    assert type(heard[-1]).__name__ == "RunFailed"


def test_a_killed_run_ends_with_the_same_numbers(finished, configured, world, tiny_folder, tmp_path):
    """SIGKILL in the middle of stages; ten random moments of a longer run are tried by hand (docs/how-to.md)."""
    result, path, _, _ = finished
    arguments = ["run", "--plugin", world, "--config", path / "config.toml", "--out", tmp_path, "--json"]
    command = [sys.executable, "-m", "erasekit", *map(str, arguments)]
    directory = tmp_path / path.relative_to(path.parents[3])
    for place, moment in ((directory, "checkpoints/pull.safetensors"), (tmp_path, "cache/erased/*/*.png")):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while not list(place.glob(moment)) and process.poll() is None and time.monotonic() < until:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (directory / "results.json").exists()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    ended = json.loads(again.stdout)
    assert ended["metrics"] == json.loads(result.model_dump_json())["metrics"]
    assert ended["erasure_sha256"] == result.erasure_sha256
    erased = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in (directory / "images" / "erased").glob("*.png")}
    assert erased == {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in (path / "images" / "erased").glob("*.png")}
    assert "Going on with" in again.stderr
