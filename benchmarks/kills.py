"""Kill commands at random moments, go on with them, and compare what comes out with what nobody disturbed.

    python benchmarks/kills.py --kills 100 --full-disks 40 --out benchmarks/results/kills.json

With --full-disks (root on Linux) the same commands work on a small file system in memory that is full from a random moment on.

A tiny model with random weights; every command is a forked process, so that a start costs nothing. Half of the sequences
have two processes at work on the same thing. Signals are SIGKILL, SIGTERM and SIGINT by chance.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from erasekit.cli import main as cli
from erasekit.testing import world
from erasekit.testing.worlds import tiny_folder

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
USAGE = 2
PER_SEQUENCE = 4  # kills before a command is left alone
MOVING = {"timings_s", "peak_memory_mb", "created", "environment", "manifest_sha256", "log.jsonl", "status.json", "env.json"}
PAGES = {".html", ".md", ".webp"}  # they say how long it took, and how often it was begun


def commands(base: Path) -> dict[str, list[str]]:
    """What is killed, each with its output in the folder that it is started in."""
    tiny = ["--plugin", str(Path(world.__file__)), "-s", f"backbone.path={base}"]
    task, short = ["-t", "words", "--limit", "2"], ["-s", "protocol.steps=3"]
    trained = ["-m", "esd", "-b", "tiny", "-c", "cat", "-s", "method.steps=12"]
    return {
        "run": ["run", *trained, *task, *short, *tiny, "--out", "runs"],
        "erase": ["erase", *trained, "-t", "words", *tiny, "--out", "erasure"],
        "generate": ["generate", "a cat", "a dog", "-b", "tiny", "--n", "6", "-s", "protocol.batch=2", *short, *tiny],
        "evaluate": ["evaluate", "../given", *task, *short, *tiny, "--out", "runs"],
    }


def start(arguments: list[str], folder: Path) -> int:
    """The command line in a process of its own; its id."""
    child = os.fork()
    if child:
        return child
    os.chdir(folder)
    for stream in (1, 2):
        os.dup2(os.open("../said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
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
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def sequence(arguments: list[str], folder: Path, longest: float, chance: random.Random, *, at_once: int) -> list[str]:
    """Kill a command a few times, then let it end; the signals that met a process."""
    folder.mkdir()
    met = []
    for _ in range(PER_SEQUENCE):
        children = [start(arguments, folder) for _ in range(at_once)]
        time.sleep(chance.uniform(0, longest))
        number = SIGNALS[chance.randrange(len(SIGNALS))]
        for child in children:
            os.kill(child, number)
            if code_of(child) in (-number, 130):
                met.append(number.name)
    ended(arguments, folder)
    return met


def ended(arguments: list[str], folder: Path) -> None:
    """Let a command end. An erasure that was whole before the signal came is refused, as it should be."""
    there = (folder / "erasure").exists()
    if (code := code_of(start(arguments, folder))) and not (there and code == USAGE):
        raise SystemExit(f"{arguments[0]} ended with {code}: see {folder.parent / 'said.txt'}")


def full_disk(arguments: list[str], folder: Path, longest: float, chance: random.Random) -> int:
    """Let the disk be full from a random moment on, then free it and go on; the exit code of the first attempt."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8g", "tmpfs", folder], check=True)
    child = start(arguments, folder)
    time.sleep(chance.uniform(0, longest))
    used = shutil.disk_usage(folder).used
    subprocess.run(["mount", "-o", f"remount,size={used + 4096 * chance.randrange(1, 16)}", folder], check=True)
    code = code_of(child)
    subprocess.run(["mount", "-o", "remount,size=8g", folder], check=True)
    ended(arguments, folder)
    return code


def full_disks(
    made: dict[str, list[str]], honest: dict[str, Any], took: dict[str, float], place: Path, chance: random.Random, times: int
) -> dict[str, int]:
    """How often the disk was full, how often a command was done before, and what went wrong."""
    found = dict.fromkeys(("times", "met", "not_said", "different"), 0)
    for number in range(times):
        name, folder = list(made)[number % len(made)], place / f"disk-{number}"
        try:
            code = full_disk(made[name], folder, took[name], chance)
            found["times"] += 1
            found["met"] += code != 0
            found["not_said"] += code not in (0, 3)
            found["different"] += content(folder) != honest[name]
            print("disk", number, name, code, found, file=sys.stderr, flush=True)
        finally:
            subprocess.run(["umount", folder], check=True)
    return found


def main() -> None:
    """Kill, compare, say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--full-disks", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    chance, until = random.Random(given.seed), time.monotonic() + 60 * given.minutes
    place = Path(tempfile.mkdtemp(prefix="kills-"))
    made, honest, took = commands(tiny_folder()), {}, {}
    (place / "calm").mkdir()
    if code_of(start([*made["erase"][:-1], "../given"], place / "calm")):
        raise SystemExit(f"see {place / 'said.txt'}")
    for name, arguments in made.items():
        (place / name).mkdir()
        began = time.monotonic()
        if code_of(start(arguments, place / name)):
            raise SystemExit(f"{name}: see {place / 'said.txt'}")
        took[name], honest[name] = time.monotonic() - began, content(place / name)
    counts: dict[str, Any] = {name: dict.fromkeys(("sequences", "kills", "different", "left_behind"), 0) for name in made}
    number = 0
    while sum(row["kills"] for row in counts.values()) < given.kills and time.monotonic() < until:
        name, at_once, folder = list(made)[number % len(made)], 1 + number // len(made) % 2, place / f"sequence-{number}"
        row = counts[name]
        row["kills"] += len(sequence(made[name], folder, 1.1 * took[name], chance, at_once=at_once))
        row["sequences"] += 1
        row["different"] += content(folder) != honest[name]
        names = [path.name for path in folder.rglob("*")]
        row["left_behind"] += sum(n.endswith((".tmp", ".old", ".unfinished")) for n in names)
        if content(folder) == honest[name]:
            shutil.rmtree(folder)
        number += 1
        print(number, name, row, file=sys.stderr, flush=True)
    disks = full_disks(made, honest, took, place, chance, given.full_disks)
    kills = sum(row["kills"] for row in counts.values())
    record = {
        "command": f"python benchmarks/kills.py --kills {given.kills} --full-disks {given.full_disks} --seed {given.seed}",
        "kills": kills,
        "commands": counts,
    }
    print(json.dumps(record, indent=1))
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    wrong = [row for row in counts.values() if row["different"] or row["left_behind"]]
    sys.exit(bool(wrong or disks["different"] or disks["not_said"]))


if __name__ == "__main__":
    main()
