"""Kill commands at random moments, go on with them, and compare what comes out with what nobody disturbed.

    python benchmarks/kills.py --kills 100 --full-disks 40 --workers 2 --work kills --out benchmarks/results/kills.json

A tiny model with random weights; every command is a forked process, so that a start costs nothing. Signals are SIGKILL,
SIGTERM and SIGINT by chance. Every second sequence has two processes at work in one folder: the same command twice, or a
run and an evaluation that want the same images.

With --full-disks (root on Linux) the same commands work on a small file system in memory that is full from a random moment
on. These come first. Each sequence that ends is a line of `--work`, and the same command goes on after it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import erasekit
from erasekit.cli import main as cli
from erasekit.testing import tiny, world

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
USAGE, ENVIRONMENT = 2, 3
PER_SEQUENCE = 4  # attempts to kill a command before it is left alone
MOVING = {"timings_s", "peak_memory_mb", "created", "environment", "manifest_sha256"}
MOVING |= {"log.jsonl", "status.json", "env.json", "computed.json"}
PAGES = {".html", ".md", ".webp"}  # they say how long it took, and how often it was begun
UNFINISHED = (".tmp", ".old", ".unfinished")
FULL, KILLED = "full disk", "killed"


def commands(base: Path) -> dict[str, list[list[str]]]:
    """What is disturbed, each with its output in the folder that it is started in; several are at work at one time."""
    tiny_world = ["--plugin", str(Path(world.__file__)), "-s", f"backbone.path={base}"]
    task, short = ["-t", "words", "--limit", "2"], ["-s", "protocol.steps=3"]
    trained = ["-m", "esd", "-b", "tiny", "-c", "cat", "-s", "method.steps=12"]
    run = ["run", *trained, *task, *short, *tiny_world, "--out", "runs"]
    erase = ["erase", *trained, "-t", "words", *tiny_world, "--out", "erasure"]
    generate = ["generate", "a cat", "a dog", "-b", "tiny", "--n", "6", "-s", "protocol.batch=2", *short, *tiny_world]
    evaluate = ["evaluate", "../given", *task, *short, *tiny_world, "--out", "runs"]
    alone = {"run": run, "erase": erase, "generate": generate, "evaluate": evaluate}
    together = {f"{name} twice": [words, words] for name, words in alone.items()}
    return {name: [words] for name, words in alone.items()} | together | {"run and evaluate": [run, evaluate]}


def start(arguments: list[str], folder: Path) -> int:
    """The command line in a process of its own; its id."""
    child = os.fork()
    if child:
        return child
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open(f"../{folder.name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os._exit(cli(arguments))


def code_of(child: int) -> int:
    """Wait for a process; its exit code, below 0 for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def content(folder: Path) -> dict[str, Any]:
    """What came out: every file by its hash, JSON without what differs from one run to the next."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.name in MOVING or path.suffix in PAGES or path.suffix == ".lock":
            continue
        data = path.read_bytes()
        if path.suffix == ".json":
            value = json.loads(data)
            whole = {k: v for k, v in value.items() if k not in MOVING} if isinstance(value, dict) else value
            data = json.dumps(whole, sort_keys=True).encode()
        elif path.suffix == ".jsonl":  # lines that two commands write come in any order
            data = b"".join(sorted(data.splitlines(keepends=True)))
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def ended(together: list[list[str]], folder: Path) -> list[str]:
    """Let commands end, one after the other: those that failed. An erasure that is whole is refused, as it should be."""
    wrong = []
    for arguments in together:
        there = (folder / "erasure").exists()
        if (code := code_of(start(arguments, folder))) and not (there and code == USAGE):
            wrong.append(f"{arguments[0]} ended with {code}")
    return wrong


def killed(together: list[list[str]], folder: Path, longest: float, chance: random.Random) -> dict[str, Any]:
    """Kill commands a few times, then let them end: the signals that met a process."""
    folder.mkdir()
    met: Counter[str] = Counter()
    for _ in range(PER_SEQUENCE):
        children = [start(arguments, folder) for arguments in together]
        time.sleep(chance.uniform(0, longest))
        number = SIGNALS[chance.randrange(len(SIGNALS))]
        for child in children:
            os.kill(child, number)
            if code_of(child) in (-number, 130):
                met[number.name] += 1
    return {"met": dict(met), "failed": ended(together, folder)}


def full_disk(together: list[list[str]], folder: Path, longest: float, chance: random.Random) -> dict[str, Any]:
    """Let the disk be full from a random moment on, then free it and go on: the exit codes of the first attempt."""
    children = [start(arguments, folder) for arguments in together]
    time.sleep(chance.uniform(0, longest))
    used = shutil.disk_usage(folder).used
    subprocess.run(["mount", "-o", f"remount,size={used + 4096 * chance.randrange(1, 16)}", folder], check=True)
    codes = [code_of(child) for child in children]
    subprocess.run(["mount", "-o", "remount,size=8g", folder], check=True)
    return {"codes": codes, "failed": ended(together, folder)}


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system in memory, in a folder, for as long as the block lasts."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8g", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def sequence(place: Path, calm: dict[str, Any], what: str, number: int, seed: int) -> dict[str, Any]:
    """Disturb a command, let it end, and compare: one row."""
    made = commands(place / "base")
    name, chance = list(made)[number % len(made)], random.Random(f"{what} {seed} {number}")
    folder = place / f"{what.replace(' ', '-')}-{number}"
    if folder.exists():  # of an attempt that was stopped itself
        subprocess.run(["umount", "--quiet", folder], check=False)
        shutil.rmtree(folder)
    row = {"what": what, "number": number, "commands": name}

    def judged(found: dict[str, Any]) -> dict[str, Any]:
        left = [path.name for path in folder.rglob("*") if path.name.endswith(UNFINISHED)]
        return row | found | {"different": content(folder) != calm[name]["content"], "left_behind": left}

    longest = 1.1 * calm[name]["took"]
    if what == FULL:
        with small_disk(folder):
            row = judged(full_disk(made[name], folder, longest, chance))
    else:
        row = judged(killed(made[name], folder, longest, chance))
    if not row["different"] and not row["left_behind"] and not row["failed"]:
        shutil.rmtree(folder)
    return row


def calm_ones(place: Path) -> dict[str, Any]:
    """What every command makes, and how long it takes, when nobody disturbs it."""
    if not (place / "base").exists():
        tiny.save_pipeline(place / "base")
    kept, code = place / "calm.json", code_digest()
    if kept.exists():
        calm = json.loads(kept.read_text())
        if calm.pop("code", "") != code:
            raise SystemExit(f"{place} is of other code, whose results differ. Give another folder to --work.")
        return calm
    found, made = {}, commands(place / "base")
    shutil.rmtree(place / "given", ignore_errors=True)
    alone = made["erase"][0]
    if code_of(start([*alone[:-1], "given"], place)):
        raise SystemExit(f"erase: see {place.parent / place.name}.txt")
    for name, together in made.items():
        folder = place / f"calm-{name.replace(' ', '-')}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        began = time.monotonic()
        if wrong := ended(together, folder):
            raise SystemExit(f"{wrong[0]}: see {folder}.txt")
        found[name] = {"took": (time.monotonic() - began) / len(together), "content": content(folder)}
    kept.write_text(json.dumps(found | {"code": code}))
    return found


def code_digest() -> str:
    """A hash of erasekit's own code, on which the results depend."""
    digest = hashlib.sha256()
    for file in sorted(Path(erasekit.__file__).parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def record_of(rows: list[dict[str, Any]], command: str) -> dict[str, Any]:
    """What came of it, in numbers, and each row that is not as it should be."""
    killed_rows, full = [r for r in rows if r["what"] == KILLED], [r for r in rows if r["what"] == FULL]
    counts = {}
    for name in sorted({r["commands"] for r in killed_rows}):
        of = [r for r in killed_rows if r["commands"] == name]
        wrong = {key: sum(bool(r[key]) for r in of) for key in ("failed", "different", "left_behind")}
        counts[name] = {"sequences": len(of), "kills": sum(sum(r["met"].values()) for r in of), **wrong}
    codes = [code for r in full for code in r["codes"]]
    disks = {
        "sequences": len(full),
        "commands": len(codes),
        "done_before": codes.count(0),
        "said_so": codes.count(ENVIRONMENT),
        "other_codes": [r for r in full if {*r["codes"]} - {0, ENVIRONMENT}],
        **{key: [r for r in full if r[key]] for key in ("failed", "different", "left_behind")},
    }
    signals = sum((Counter(r["met"]) for r in killed_rows), Counter())
    return {
        "command": command,
        "kills": sum(signals.values()),
        "signals": dict(sorted(signals.items())),
        "commands": counts,
        "full_disks": disks,
        "wrong": [r for r in killed_rows if r["failed"] or r["different"] or r["left_behind"]],
    }


def _sequence(given: tuple[Any, ...]) -> dict[str, Any]:
    return sequence(*given)


def main() -> None:
    """Disturb, compare, say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--full-disks", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60, help="begin no sequence after these")
    parser.add_argument("--work", type=Path, help="a folder to go on in later; else a temporary one")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    until = time.monotonic() + 60 * given.minutes
    place = (given.work or Path(tempfile.mkdtemp(prefix="kills-"))).resolve()
    place.mkdir(parents=True, exist_ok=True)
    calm, kept = calm_ones(place), place / "rows.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []

    def wanted() -> Iterator[tuple[Any, ...]]:
        """Full disks first, then kills until there are enough of them; none that is done already, none after the time."""
        done = {(r["what"], r["number"]) for r in rows}
        for number in range(given.full_disks):
            if (FULL, number) not in done and time.monotonic() < until:
                yield place, calm, FULL, number, given.seed
        number = 0
        while time.monotonic() < until and sum(sum(r.get("met", {}).values()) for r in rows) < given.kills:
            if (KILLED, number) not in done:
                yield place, calm, KILLED, number, given.seed
            number += 1

    for row in at_once(wanted(), given.workers):
        rows.append(row)
        with kept.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), file=sys.stderr, flush=True)
    flags = f"--kills {given.kills} --full-disks {given.full_disks} --seed {given.seed}"
    record = record_of(rows, f"python benchmarks/kills.py {flags}")
    print(json.dumps(record, indent=1))
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    disks = record["full_disks"]
    sys.exit(bool(record["wrong"] or any(disks[key] for key in ("other_codes", "failed", "different", "left_behind"))))


def at_once(wanted: Iterator[tuple[Any, ...]], workers: int) -> Iterator[dict[str, Any]]:
    """The rows as they end, with so many sequences under way; each is asked for only when a worker is free."""
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        waiting = []
        while True:
            while len(waiting) < workers and (one := next(wanted, None)):
                waiting.append(pool.apply_async(_sequence, (one,)))
            if not waiting:
                return
            done = [result for result in waiting if result.ready()]
            waiting = [result for result in waiting if result not in done]
            yield from (result.get() for result in done)
            time.sleep(0.05)


if __name__ == "__main__":
    main()
