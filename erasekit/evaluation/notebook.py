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
    files = sorted((run / "samples").glob("*.png"), key=_place) if run else []
    return "".join(_figure(file) for file in files if file.stat().st_size <= LARGEST)


def _place(file: Path) -> tuple[bool, bool, str]:
    """What was erased comes first, by its name and then in other words."""
    return file.stem != "erase", file.stem != "synonyms", file.stem


def _figure(file: Path) -> str:
    title, data = escape(file.stem), base64.b64encode(file.read_bytes()).decode()
    caption = f"<figcaption>{title}: base left, erased right of each pair</figcaption>"
    image = f'<img style="max-width: 100%" alt="base and erased images: {title}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}{caption}</figure>"
