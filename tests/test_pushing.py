"""What `erasekit push` uploads, how it asks, and what it says when a hub (here a small server) says no."""

from __future__ import annotations

import base64
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from erasekit.cli import main
from erasekit.erasures import pushing
from erasekit.erasures.erasure import Erasure
from erasekit.errors import EnvironmentProblem, UsageError

REPO = "me/no-cat"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload asks for."""

    def do_GET(self):
        repos = self.server.repos
        if self.path.startswith("/api/whoami"):
            return self.answer({"name": "me", "type": "user"} if self.headers.get("authorization") else None, 401)
        return self.answer(repos.get(self.path.removeprefix("/api/models/").partition("/revision")[0]), 404)

    def do_POST(self):
        content = self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.append((self.path, content))
        if self.path.endswith("/repos/create"):
            wanted = json.loads(content)
            if wanted.get("organization") != "me":
                return self.answer(None, 403)
            made = {"id": REPO, "private": wanted.get("private", wanted.get("visibility") == "private")}
            self.server.repos.setdefault(REPO, made)
            return self.answer({"url": f"{self.server.address}/{REPO}"})
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(content)["files"]]
            return self.answer({"files": files})
        if self.path.endswith("/validate-yaml"):
            return self.answer({"errors": [], "warnings": []})
        for line in filter(None, content.splitlines()):
            entry = json.loads(line)
            if entry["key"] == "file":
                self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return self.answer({"commitUrl": f"{self.server.address}/{REPO}/commit/1", "commitOid": "1", "success": True})

    def answer(self, content, otherwise=200):
        self.send_response(200 if content is not None else otherwise)
        if content is None:
            self.send_header("X-Error-Code", "RepoNotFound" if otherwise == 404 else "")
            self.send_header("X-Error-Message", "Not yours" if otherwise == 403 else "")
        body = json.dumps(content or {}).encode()
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.files, server.asked = {}, {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.address = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def made(world, tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "erasure"
    what = [
        "-m",
        "pull",
        "-b",
        "tiny",
        "-t",
        "words",
        "-c",
        "cat",
        "-s",
        f"backbone.path={tiny_folder}",
        "-s",
        "method.steps=1",
    ]
    assert main(["erase", "--plugin", str(world), *what, "--out", str(out)]) == 0
    return out


@pytest.fixture
def erasure(made, tmp_path):
    folder = shutil.copytree(made, tmp_path / "erasure")
    (folder / "photo.png").write_bytes(b"private")
    return folder


def test_what_is_packed_is_an_erasure_whose_card_loads_it_from_the_hub(erasure, tmp_path):
    parcel = pushing.pack(erasure, REPO, tmp_path / "out")
    assert sorted(parcel.files) == ["README.md", "all.safetensors", "cat.safetensors", "erasure.json"]
    assert parcel.left_out == ("photo.png",)
    assert pushing.UNMEASURED in parcel.remarks
    assert [c.name for c in Erasure.load(parcel.folder).concepts] == ["cat"]
    card = (parcel.folder / "README.md").read_text()
    assert f'pipe.load_lora_weights("{REPO}", weight_name="all.safetensors"' in card
    assert 'load_lora_weights("."' not in card
    assert str(tmp_path) not in card + (parcel.folder / "erasure.json").read_text()


def test_a_card_that_somebody_has_edited_is_kept(erasure, tmp_path):
    card = erasure / "README.md"
    card.write_text(card.read_text().replace("## Measured", "## Said by me\n\nMine.\n\n## Measured"))
    parcel = pushing.pack(erasure, REPO, tmp_path / "out")
    assert "Said by me" in (parcel.folder / "README.md").read_text()


def test_an_erasure_that_steers_is_loaded_from_the_hub_too():
    record = {"backbone": "sd15", "base": {"repo": "a/b"}, "kind": "guidance"}
    lines = pushing.load_lines(record, REPO, on_hub=True)
    assert f'load(pipe, snapshot_download("{REPO}"))' in lines
    compile(lines, "shown", "exec")


def test_what_cannot_be_packed(erasure, tmp_path):
    with pytest.raises(UsageError, match="Write user/name"):
        pushing.pack(erasure, "no-cat", tmp_path / "out")
    (erasure / "cat.safetensors").write_bytes(b"something else")
    with pytest.raises(EnvironmentProblem, match="damaged"):
        pushing.pack(erasure, REPO, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="is not empty"):
        pushing.pack(erasure, REPO, erasure)


def test_it_is_uploaded_whole_and_private(erasure, hub, tmp_path):
    parcel = pushing.pack(erasure, REPO, tmp_path / "out")
    address = pushing.push(parcel, REPO, endpoint=hub.address)
    assert address.endswith(REPO)
    assert hub.repos[REPO]["private"] is True
    assert hub.files == {name: (parcel.folder / name).read_bytes() for name in parcel.files}


def test_public_has_to_be_said(erasure, hub, tmp_path):
    parcel = pushing.pack(erasure, REPO, tmp_path / "out")
    hub.repos[REPO] = {"id": REPO, "private": False}
    with pytest.raises(UsageError, match=r"is there and public\. Add --public"):
        pushing.push(parcel, REPO, endpoint=hub.address)
    assert hub.asked == []
    pushing.push(parcel, REPO, public=True, endpoint=hub.address)
    assert set(hub.files) == set(parcel.files)


def test_what_the_hub_refuses_is_one_line(erasure, hub, tmp_path, monkeypatch):
    parcel = pushing.pack(erasure, REPO, tmp_path / "out")
    with pytest.raises(EnvironmentProblem, match=r"The hub did not take 'other/no-cat': Not yours"):
        pushing.push(parcel, "other/no-cat", endpoint=hub.address)
    with pytest.raises(EnvironmentProblem, match="The hub cannot be reached"):
        pushing.push(parcel, REPO, endpoint="http://127.0.0.1:9")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(EnvironmentProblem, match="run 'hf auth login'"):
        pushing.push(parcel, REPO, endpoint=hub.address)
    assert hub.files == {}


def test_dry_run_shows_all_and_uploads_nothing(erasure, hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pushing, "push", None)
    assert main(["push", str(erasure), REPO, "--dry-run", "--out", str(tmp_path / "kept")]) == 0
    shown = capsys.readouterr()
    assert shown.out == "Nothing was uploaded.\n"
    assert re.search(r"\d\.\d\d MiB  cat\.safetensors", shown.err)
    assert "Left out: photo.png." in shown.err
    assert pushing.UNMEASURED in shown.err
    assert sorted(f.name for f in (tmp_path / "kept").iterdir()) == [
        *("README.md", "all.safetensors", "cat.safetensors", "erasure.json")
    ]


def test_it_asks_first(erasure, hub, monkeypatch, capsys):
    asked = []
    push = pushing.push
    monkeypatch.setattr(pushing, "push", lambda *a, **k: push(*a, endpoint=hub.address, **k))
    assert main(["push", str(erasure), REPO]) == 2
    assert "Add --yes" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.confirm", lambda text, **more: asked.append(text) or False)
    assert main(["push", str(erasure), REPO]) == 0
    assert asked == [f"Upload these 4 files to {REPO} (private)?"]
    assert hub.files == {}
    assert main(["push", str(erasure), REPO, "--yes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.partition("\n")[2])["address"].endswith(REPO)
    assert len(hub.files) == 4
