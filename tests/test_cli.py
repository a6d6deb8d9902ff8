"""The command line as a user meets it, in processes of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from datetime import UTC, datetime, timedelta

import pytest

from erasekit.cli import main
from erasekit.evaluation.results import RunResult, write_result
from tests.conftest import THIRD_PARTY

IMPORTED = """
import sys
sys.argv = ["erasekit", *sys.argv[1:]]
from erasekit.cli import main
code = main()
heavy = sorted({"torch", "diffusers", "transformers", "peft", "numpy"} & set(sys.modules))
print("HEAVY", *heavy)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def names(world, tiny_folder):
    """Flags that choose the tiny world."""
    return ["--plugin", world, "-m", "pull", "-b", "tiny", "-t", "words", "-s", f"backbone.path={tiny_folder}"]


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """Run the command line in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def called(*arguments):
        code = main([*map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return called


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["ls"], ["plugins"], ["run", "--help"]])
def test_looking_around_imports_no_model_library(arguments):
    done = subprocess.run([sys.executable, "-c", IMPORTED, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "HEAVY"


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "-m", "trace", "-b", "flux", "-t", "objects", "-s", "method.lr=-1"],
        ["erase", "-m", "uce", "-b", "sd15", "-c", "a cat", "-s", "method.nosuch=1"],
        ["run", "-m", "trace", "-b", "sdxl", "--vram", "24", "-t", "styles", "-s", "task.profile=nosuch"],
        ["evaluate", "nosuch", "-t", "objects"],
        ["attack", "nosuch", "-a", "seeds"],
        ["generate", "a cat", "-b", "sd15", "-s", "protocol.steps=-1"],
    ],
)
def test_a_wrong_setting_is_told_before_diffusers_is_imported(arguments):
    done = subprocess.run([sys.executable, "-c", IMPORTED, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert done.stdout.splitlines()[-1] == "HEAVY numpy torch"


def test_importing_erasekit_imports_no_model_library():
    code = "import erasekit, sys; erasekit.RunConfig; erasekit.hookimpl; print('torch' in sys.modules, erasekit.run.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "run"]


def test_every_public_name_can_be_imported():
    import erasekit

    for name in erasekit.__all__:
        assert getattr(erasekit, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        erasekit.nothing  # noqa: B018


def test_the_module_is_the_command(erasekit):
    done = erasekit("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("erasekit ")


def test_ls_names_the_plugin_and_filters(call):
    code, out, _ = call("ls", "--json")
    listed = json.loads(out)
    assert code == 0
    assert {m["name"] for m in listed["methods"]} >= {"trace"}
    assert {t["name"] for t in listed["tasks"]} >= {"mini/objects"}
    code, out, _ = call("ls", "methods")
    assert "trace" in out
    assert "sd15-mini" not in out
    code, _, err = call("ls", "metods")
    assert code == 2
    assert "Did you mean 'methods'?" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "trcae"], "Unknown method 'trcae'. Did you mean 'trace'? See 'erasekit ls methods'."),
        (["--backbone", "sd15-min"], "Unknown backbone 'sd15-min'. Did you mean 'sd15-mini'?"),
        (["--task", "objcts"], "Unknown mini task 'objcts'. Did you mean 'objects'?"),
        (["--concept", "cta"], "Unknown concept 'cta'. Did you mean 'cat'?"),
        (["--concept", ":kitty"], "A concept needs a name"),
        (["--concept", "cat", "--neutral", "a cat"], "The neutral words of 'cat' are 'a cat', which is what is erased"),
        (["--concept", "cat", "--preserve", "Cat"], "'Cat' is to be erased, as 'cat', and to stay"),
        (["-s", "protocol.stps=1"], "Unknown setting 'protocol.stps'. Did you mean 'protocol.steps'?"),
        (["-s", "protocol.steps=many"], "Setting 'protocol.steps': input should be a valid integer"),
        (["-s", "protocol.steps=-1"], "Setting 'protocol.steps': input should be greater than or equal to 1, given -1."),
        (["-s", "steps"], "Cannot read the setting 'steps'."),
        (["--seed", "-1"], "Setting 'seed': input should be greater than or equal to 0, given -1."),
        (["--limit", "0"], "Setting 'limit': input should be greater than or equal to 1, given 0."),
        (["--config", "nowhere.toml"], "No config file 'nowhere.toml'."),
        (["--plugin", "nowhere.py"], "No plugin file 'nowhere.py'."),
        (["--preset", "papr"], "Unknown preset of 'trace' 'papr'. Did you mean 'paper'?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(call, arguments, says):
    code, out, err = call("run", "--dry-run", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(says)
    assert err.count("\n") == 1


def test_malformed_toml_names_the_line(call, tmp_path):
    (tmp_path / "run.toml").write_text("seed = 1\n\nmethod =\n")
    code, _, err = call("run", "--config", "run.toml")
    assert code == 2
    assert "is not TOML" in err
    assert "line 3" in err


def test_a_mistyped_flag_is_exit_2(erasekit):
    done = erasekit("run", "--methd", "trace")
    assert done.returncode == 2
    assert "--methd" in done.stderr
    assert "Traceback" not in done.stderr


def test_dry_run_shows_settings_and_directories_and_loads_nothing(call, names, tmp_path):
    code, out, _ = call("run", "--dry-run", "--json", *names)
    plan = json.loads(out)
    assert code == 0
    assert plan["options"]["method"]["steps"] == 12
    assert sorted(plan["runs"].values()) == [["cat"], ["dog"]]
    code, out, _ = call("run", "--dry-run", *names)
    assert "steps between checkpoints" in out
    assert list(tmp_path.iterdir()) == []


def log_of(settings, drawn, seconds):
    """The log of a run that found 20 images but for `drawn`, and took so many seconds for each of these."""
    begun = datetime(2030, 1, 1, tzinfo=UTC)
    events = [{"event": "RunStarted", "settings": settings}, {"event": "StageStarted", "stage": "sample"}]
    counts = [20 - drawn, *([20] if drawn else [])]
    events += [{"event": "Sampled", "which": "erased", "done": done, "total": 20} for done in counts]
    later = [0.0, 0.0, 5.0, 5.0 + drawn * seconds]  # the first seconds of the stage draw nothing
    return [{"time": (begun + timedelta(seconds=t)).isoformat(), **e} for t, e in zip(later, events, strict=False)]


def test_dry_run_takes_times_from_earlier_runs(call, names, tmp_path):
    """Seconds per image from runs on the backbone that drew some, of the erasing from the method's at the same settings."""
    code, out, _ = call("run", "--dry-run", "--json", *names, "-c", "cat")
    plan = json.loads(out)
    stages, backbone = plan["stages"], plan["backbone"]
    assert code == 0
    assert all("time unknown" in stages[stage] for stage in ("base_images", "erase", "sample"))
    images, own = int(stages["sample"].split()[0]), {f"method.{k}": v for k, v in plan["options"]["method"].items()}
    runs = [
        ("pull", own, 20, 1.0, 7.0),
        ("pull", own, 20, 2.0, 9.0),
        ("uce", {}, 20, 3.0, 1.0),
        ("pull", own | {"method.steps": 999}, 10, 2.0, 500.0),
        ("pull", own, 0, 0.0, 8.0),  # another run had drawn its images
        ("pull", own, 1, 90.0, 8.0),  # one image says little
    ]
    for i, (method, settings, drawn, each, erase) in enumerate(runs):
        result = RunResult(
            method=method,
            backbone=backbone,
            task="words",
            domain="mini",
            concepts=("cat",),
            seed=i,
            config_hash="0",
            protocol={**plan["options"]["protocol"], "hash": "0"},
            counts={"images": 40, "scored": 40, "failed": 0, "no_face": 0},
            metrics={},
            timings_s={"sample": 5.0 + drawn * each, "erase": erase},
            peak_memory_mb=1.0,
            erasure_sha256="0",
        )
        folder = tmp_path / "runs" / backbone / "words" / method / str(i)
        write_result(result, folder / "results.json")
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log_of(settings, drawn, each)))
    damaged = tmp_path / "runs" / backbone / "words" / "pull" / "9" / "results.json"
    damaged.parent.mkdir()
    damaged.write_text("{")
    stages = json.loads(call("run", "--dry-run", "--json", *names, "-c", "cat")[1])["stages"]
    assert f"about {images * 2} s (as 4 earlier runs here)" in stages["sample"]
    assert "about 8 s (as 4 earlier runs here)" in stages["erase"]


def test_an_out_folder_that_cannot_be_written_to(call, names, tmp_path):
    (tmp_path / "out").write_text("a file")
    code, _, err = call("run", *names, "-c", "cat", "--out", "out")
    assert code == 2
    assert "Choose another folder with --out" in err


def test_a_base_folder_without_an_index_is_exit_3(call, names, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = call("run", *names, "-c", "cat", "-s", "backbone.path=./empty")
    assert code == 3
    assert "model_index.json" in err.splitlines()[-1]


def test_a_broken_plugin_breaks_nothing_else(call, names):
    broken = THIRD_PARTY / "raises_on_import.py"
    code, out, err = call("ls", "methods", "--plugin", broken)
    assert code == 0
    assert "trace" in out
    assert "Plugin 'raises_on_import' is broken: RuntimeError: this plugin is broken on purpose." in err
    code, out, _ = call("plugins", "--plugin", broken)
    assert code == 0
    assert any("broken on purpose" in line for line in out.splitlines())
    assert "Traceback" not in out
    code, out, _ = call("plugins", "raises_on_import", "--plugin", broken)
    assert "Traceback" in out
    code, _, err = call("run", "--dry-run", "--method", "raises_on_import", "--plugin", broken)
    assert code == 3
    assert "Traceback" in err
    assert "Plugin 'raises_on_import'" in err.splitlines()[-1]


def test_an_installed_plugin_is_found_with_its_distribution(erasekit, tmp_path):
    """What pip leaves behind of tests/third_party/erasekit_example: the package and its metadata."""
    site = tmp_path / "site"
    shutil.copytree(THIRD_PARTY / "erasekit_example" / "src", site)
    metadata = site / "erasekit_example-0.3.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: erasekit-example\nVersion: 0.3.0\n")
    (metadata / "entry_points.txt").write_text("[erasekit]\nexample = erasekit_example\n")
    code = f"import sys; sys.path.insert(0, {str(site)!r}); from erasekit.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "ls", "methods", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    plugins = {m["name"]: m["plugin"] for m in json.loads(done.stdout)["methods"]}
    assert plugins["rename"] == "example (erasekit-example 0.3.0)"


def test_a_plugin_can_add_a_command(call, tmp_path, monkeypatch):
    from erasekit.registration import plugins as plugin_module

    (tmp_path / "greeting.py").write_text(
        textwrap.dedent("""
            from erasekit import hookimpl

            @hookimpl
            def register_commands(app):
                @app.command()
                def greet():
                    print("hello")
        """)
    )
    monkeypatch.setattr(plugin_module, "default", lambda: plugin_module.load([tmp_path / "greeting.py"]))
    assert call("greet") == (0, "hello\n", "")
    del sys.modules["greeting"]


def test_the_unexpected_is_one_line_with_the_traceback_in_a_file(call, names, tmp_path):
    (tmp_path / "bad.py").write_text(
        textwrap.dedent("""
            from erasekit import Method, hookimpl

            class Bad(Method):
                name = "bad"

                def erase(self, ctx):
                    raise ZeroDivisionError("of all things")

            @hookimpl
            def register_methods(register):
                register("bad", Bad)
        """)
    )
    code, _, err = call("run", *names, "-m", "bad", "-c", "cat", "--plugin", "bad.py")
    assert code == 4
    line = err.splitlines()[-1]
    assert line.startswith("This should not have happened: ZeroDivisionError: of all things (bad.py, line 8).")
    path = line.removesuffix(".").rpartition(" ")[2]
    with open(path, encoding="utf-8") as file:
        assert "of all things" in file.read()
    os.unlink(path)


def test_from_a_run_to_every_other_command(call, names, tmp_path):
    code, out, err = call("run", *names, "-c", "cat", "--json")
    assert code == 0
    result = json.loads(out)
    assert "Starting" in err
    assert "erase: steps 12/12" in err

    code, out, err = call("run", *names, "-c", "cat")
    assert code == 0
    assert "Finished before" in err
    assert "acc_e" in out
    assert "load_lora_weights" in out

    folder = tmp_path / "runs" / "tiny" / "words" / "pull" / result["config_hash"]
    shared = ["--plugin", THIRD_PARTY / "no_methods.py", *names[6:]]  # the method that made it is not needed any more
    base = [flag for flag in shared if flag not in ("-t", "words")]

    code, out, _ = call("report", folder, *shared[:2], "--json")
    assert code == 0
    assert json.loads(out) == [result]

    code, out, _ = call("evaluate", folder / "erasure", *shared, "--json")
    assert code == 0
    assert json.loads(out)["metrics"] == result["metrics"]

    code, out, _ = call("verify", folder / "erasure", *shared)
    assert code == 0
    assert "neutral_drift" in out
    assert "--drift does it" in out
    code, out, _ = call("verify", folder / "erasure", *shared, "--vram", "8", "--json")
    assert json.loads(out).keys() == {"schema_version", "max", "mean", "sites"}
    assert json.loads(out) == json.loads((folder / "certificate.json").read_text())
    steps = ("-s", "protocol.steps=3", "--vram", "8")
    code, out, _ = call("verify", folder / "erasure", *shared, "--drift", *steps, "--json")
    assert len(json.loads(out)["prediction_drift"]) == 3
    assert "early_drift" in json.loads(out)
    code, out, _ = call("verify", folder / "erasure", *shared, "--drift")
    assert "Thm 3.3" in out
    code, _, err = call("verify", folder / "erasure", *shared, "-s", "method.steps=1")
    assert code == 2
    assert "'method' has no settings here" in err

    code, out, err = call("generate", "a cat", "a dog", "--n", "2", "-e", folder / "erasure", *base, "--vram", "8")
    assert code == 0
    assert err.startswith("generate")
    assert out.split() == [f"images/{p:03d}-{s}.png" for p in range(2) for s in range(2)]
    assert all((tmp_path / line).is_file() for line in out.split())

    code, out, _ = call("erase", *names, "-c", "cat", "--json")
    assert code == 0
    assert json.loads(out)["sha256"] == result["erasure_sha256"]
    code, _, err = call("erase", *names, "-c", "cat")
    assert code == 2
    assert "'erasure' exists" in err

    (tmp_path / "erasure" / "all.safetensors").write_bytes(b"cut")
    code, _, err = call("verify", "erasure", *shared)
    assert code == 3
    assert "is damaged" in err
    code, _, err = call("verify", "nowhere", *shared)
    assert code == 2
    assert "holds no erasure" in err


def test_erase_wants_to_be_told_what(call, names):
    code, _, err = call("erase", *names)
    assert code == 2
    assert "Say what to erase, e.g. --concept 'cat'" in err


def test_force_never_deletes_what_is_not_ours(call, names, tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "letter.txt").write_text("mine")
    code, _, err = call("erase", *names, "-c", "cat", "--out", "docs", "--force")
    assert code == 2
    assert err == "'docs' holds no erasure, but 'letter.txt'. It is not touched: choose another folder with --out.\n"
    assert (tmp_path / "docs" / "letter.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["docs"]
    plan = json.loads(call("run", "--dry-run", "--json", *names, "-c", "cat")[1])
    [run] = plan["runs"]
    (tmp_path / run).mkdir(parents=True)
    (tmp_path / run / "letter.txt").write_text("mine")
    code, _, err = call("run", *names, "-c", "cat", "--force")
    assert code == 2
    assert "holds no run, so --force does not touch it" in err
    assert (tmp_path / run / "letter.txt").read_text() == "mine"


def test_generate_refuses_settings_that_it_has_not(call, names):
    code, _, err = call("generate", "a cat", "-s", "method.steps=1")
    assert code == 2
    assert "'method' has no settings here" in err
    code, _, err = call("generate", "a cat", "-c", "cat")
    assert code == 2
    assert "--erasure" in err


def test_doctor_says_what_it_found(call):
    code, out, _ = call("doctor", "--json")
    checks = {c["name"]: c for c in json.loads(out)}
    assert code == 0
    assert {"python", "torch", "device", "disk", "plugin trace", "methods"} <= set(checks)
    assert all(c["status"] != "problem" for c in checks.values())


def test_doctor_ends_with_3_if_nothing_could_run(call):
    code, out, err = call("doctor", "--plugin", THIRD_PARTY / "raises_on_import.py")
    assert code == 3
    assert "Not ready: plugin raises_on_import" in err
    assert "broken on purpose" in out


def test_an_interrupt_is_no_traceback(names, tmp_path):
    command = [sys.executable, "-m", "erasekit", "run", *map(str, names), "-c", "cat", "-s", "method.steps=100000"]
    listening = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # a job in the background ignores it
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, **listening) as process:
        until = time.monotonic() + 120
        while not list(tmp_path.glob("runs/*/*/*/*/checkpoints/*")) and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
