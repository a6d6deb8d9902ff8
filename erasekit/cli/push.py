"""`erasekit push`: an erasure on the hub."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from erasekit.cli import options
from erasekit.cli.ends import put, put_json, say
from erasekit.errors import UsageError


def command(
    erasure: Annotated[Path, typer.Argument(help="The folder of an erasure.", show_default=False)],
    repo: Annotated[str, typer.Argument(help="Where to: user/name on the hub.", show_default=False)],
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it; left out, it is private.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before it is uploaded.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be uploaded, and upload nothing.")] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FOLDER", help="Keep a copy of what is uploaded there.", show_default=False),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Upload an erasure with its card to the Hugging Face hub: private unless told otherwise, and after asking."""
    from erasekit.erasures.pushing import pack, push

    with tempfile.TemporaryDirectory(prefix="erasekit-") as temporary:
        parcel = pack(erasure, repo, out or Path(temporary) / "erasure")
        _show(parcel.files, parcel.left_out, parcel.remarks)
        address = ""
        if not dry_run and (yes or _agreed(repo, len(parcel.files), public=public)):
            address = push(parcel, repo, public=public)
        if as_json:
            put_json({"repo": repo, "public": public, "address": address, "files": parcel.files})
        else:
            put(address or "Nothing was uploaded.")


def _show(files: dict[str, int], left_out: tuple[str, ...], remarks: tuple[str, ...]) -> None:
    for name, size in files.items():
        say(f"{size / 2**20:10.2f} MiB  {name}")
    if left_out:
        say(f"Left out: {', '.join(left_out)}.")
    for line in remarks:
        say(line, "yellow")


def _agreed(repo: str, count: int, *, public: bool) -> bool:
    """Ask."""
    if not sys.stdin.isatty():
        raise UsageError("push asks before it uploads, and here is nobody to answer. Add --yes.")
    seen = "public: everybody can see it" if public else "private"
    return typer.confirm(f"Upload these {count} files to {repo} ({seen})?", err=True)
