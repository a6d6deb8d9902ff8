"""An erasure on the hub: the folder that goes there, and its way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from erasekit.erasures.erasure import Erasure
from erasekit.erasures.manifest import CARD, MANIFEST, read_manifest
from erasekit.erasures.modelcard import HUB_ID, load_lines, model_card
from erasekit.errors import EnvironmentProblem, UsageError

UNMEASURED = "Nothing has been measured on this file."  # as the card says it


class Parcel(NamedTuple):
    """What would be uploaded.

    Attributes:
        folder: where it lies.
        files: the names and sizes of its files, in bytes.
        left_out: what else lies beside the erasure.
        remarks: what a reader of the card will see: that nothing was measured, and the erasure's own warnings.
    """

    folder: Path
    files: dict[str, int]
    left_out: tuple[str, ...]
    remarks: tuple[str, ...]


def pack(erasure: Path, repo: str, out: Path) -> Parcel:
    """Copy what belongs to an erasure, and nothing else, into a folder; its card loads it from the hub.

    Args:
        erasure: its folder; every file is checked against its hash.
        repo: where it is to go: user/name.
        out: the folder to write, which must not be there or be empty.

    Raises:
        UsageError: `repo` is no name on the hub, or `out` holds something.
        EnvironmentProblem: the erasure is not what was written.
    """
    if not HUB_ID.fullmatch(repo):
        raise UsageError(f"'{repo}' is no name of a model on the hub. Write user/name.")
    if out.exists() and any(out.iterdir()):
        raise UsageError(f"'{out}' is not empty. Choose another folder with --out.")
    Erasure.load(erasure)
    record = read_manifest(erasure)
    for name in (MANIFEST, *record["files"]):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(erasure / name, out / name)
    card = (erasure / CARD).read_text("utf-8") if (erasure / CARD).is_file() else model_card(record)
    (out / CARD).write_text(card.replace(load_lines(record, "."), load_lines(record, repo, on_hub=True)), "utf-8")
    there = {f.relative_to(out).as_posix(): f.stat().st_size for f in sorted(out.rglob("*")) if f.is_file()}
    others = {f.relative_to(erasure).as_posix() for f in erasure.rglob("*") if f.is_file()} - there.keys()
    remarks = (*((UNMEASURED,) if UNMEASURED in card else ()), *record.get("warnings", ()))
    return Parcel(out, there, tuple(sorted(others)), remarks)


def push(parcel: Parcel, repo: str, *, public: bool = False, endpoint: str | None = None) -> str:
    """Upload a folder to a model repository, which is made if it is not there, and return its address.

    Args:
        parcel: what to upload.
        repo: user/name.
        public: let everybody see it.
        endpoint: the hub's address, if it is another one.

    Raises:
        UsageError: `public` is not said and the repository is public already.
        EnvironmentProblem: nobody is logged in, the name is not theirs, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is that of the client below it
        HfHubHTTPError,
        HTTPError,
        LocalTokenNotFoundError,
        RepositoryNotFoundError,
    )

    hub = HfApi(endpoint=endpoint)
    try:
        hub.whoami()
        try:
            seen_by_all = not hub.repo_info(repo).private
        except RepositoryNotFoundError:
            seen_by_all = False
        if seen_by_all and not public:
            raise UsageError(f"'{repo}' is there and public. Add --public, or choose another name.")
        address = hub.create_repo(repo, private=not public, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=parcel.folder, commit_message="Upload an erasure made with erasekit")
    except LocalTokenNotFoundError as error:
        raise EnvironmentProblem("Nobody is logged in to the hub: run 'hf auth login'.") from error
    except HfHubHTTPError as error:
        reason = error.server_message or str(error).splitlines()[0]
        raise EnvironmentProblem(f"The hub did not take '{repo}': {reason}. See 'hf auth whoami'.") from error
    except (HTTPError, OSError) as error:
        raise EnvironmentProblem(f"The hub cannot be reached ({type(error).__name__}). Nothing is lost: try again.") from error
    return str(address)
