"""How results and erasures show themselves in a notebook: a table, and the images that the run's folder holds."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

LARGEST = 2**21  # bytes of a picture; a notebook keeps what it shows


def shown(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], run: Path | None, notes: Sequence[str] = ()
) -> str:
    """HTML of a title, a table, lines below it, and the sample grids of a run directory, if there is one."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    lines = "".join(f"<p>{escape(note)}</p>" for note in notes)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div><p><b>{escape(title)}</b></p>{table}{lines}{_images(run)}</div>"


def _images(run: Path | None) -> str:
    """The pairs of base and erased images, as the run drew them: blurred, where they are to be."""
    from erasekit.evaluation.tasks import PROMPT_SETS  # it needs results, which show themselves here

    files = {file.stem: file for file in sorted((run / "samples").glob("*.png"))} if run else {}
    ordered = [name for name in PROMPT_SETS if name in files]  # what was erased first
    titles = {name: f"{name}, {PROMPT_SETS[name].meaning}" for name in ordered} | {n: n for n in files if n not in ordered}
    return "".join(_figure(files[n], escape(title)) for n, title in titles.items() if files[n].stat().st_size <= LARGEST)


def _figure(file: Path, title: str) -> str:
    data = base64.b64encode(file.read_bytes()).decode()
    caption = f"<figcaption>{title}: base left, erased right of each pair</figcaption>"
    image = f'<img style="max-width: 100%" alt="base and erased images: {title}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}{caption}</figure>"
