"""The report of a run: one HTML file that needs nothing else, and PNG grids of the images."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup, escape
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from erasekit.atomic import replacing
from erasekit.erasures.modelcard import NOT_PROMISED, REMOVABLE, load_lines, remains_line, templates
from erasekit.evaluation.results import Metric, number, read_result, read_scores
from erasekit.evaluation.sampling import PIL_ERRORS
from erasekit.evaluation.tasks import DRAWN, PROMPT_SETS, Task
from erasekit.safety import is_sexual

PAIRS_PER_SET = 12
LARGEST = 256  # pixels of an embedded image's side


class Pair(NamedTuple):
    """One prompt and its two images, as rows of the scores."""

    base: Mapping[str, Any]
    erased: Mapping[str, Any]


def write_report(directory: Path, task: Task, *, reveal: bool = False) -> Path:
    """Write `report.html`, and a grid per prompt set under `samples/`, from the files of a finished run.

    Reads results.json, scores.parquet, the images under images/base and images/erased, and where they exist log.jsonl,
    config.toml, env.json, certificate.json and erasure/erasure.json.

    Args:
        directory: the run directory.
        task: its title, and whether its images are blurred; those of a run with sexual prompts are, whatever the task.
        reveal: show them all the same.

    Raises:
        UsageError: the directory holds no results.
    """
    rows = read_scores(directory / "scores.parquet")
    blur = not reveal and (task.blurred or is_sexual(row["prompt"] for row in rows))
    sets = _pairs(rows)
    for name, pairs in sets.items():
        paths = [[_path(directory, row) for row in side] for side in zip(*pairs, strict=True)]
        captions = [pair.base["prompt"] for pair in pairs]
        grid(paths[0], paths[1], directory / "samples" / f"{name}.png", captions=captions, blur=blur)
    figures = [(_title(s), [_figure(directory, p, blur=blur) for p in pairs]) for s, pairs in sets.items()]
    content = _content(directory) | {"title": task.title or task.name, "sets": figures, "blur": blur}
    page = templates().get_template("report.html.j2").render(content, number=number, scale=scale)
    path = directory / "report.html"
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _content(directory: Path) -> dict[str, Any]:
    """What the page says besides its images."""
    record = _json(directory / "erasure" / "erasure.json")
    return {
        "result": read_result(directory / "results.json"),
        "curves": curves(_log(directory / "log.jsonl")),
        "certificate": _json(directory / "certificate.json"),
        "config": _text(directory / "config.toml"),
        "environment": _json(directory / "env.json"),
        "load": load_lines(record) if record else "",
        "removable": REMOVABLE if record.get("kind") == "guidance" else "",
        "limits": NOT_PROMISED,
        "remains": remains_line(record) if record else "",
    }


def _pairs(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Pair]]:
    """The first pairs of every prompt set."""
    sides: dict[str, dict[int, Mapping[str, Any]]] = {"base": {}, "erased": {}}
    for row in rows:
        sides[row["side"]][row["index"]] = row
    sets: dict[str, list[Pair]] = {name: [] for name in DRAWN}
    for index, row in sides["base"].items():
        pairs = sets.setdefault(row["set"], [])
        if len(pairs) < PAIRS_PER_SET and index in sides["erased"]:
            pairs.append(Pair(row, sides["erased"][index]))
    return {name: pairs for name, pairs in sets.items() if pairs}


def _title(which: str) -> str:
    """The heading of a prompt set's images."""
    meaning = PROMPT_SETS[which].meaning if which in PROMPT_SETS else which
    return f"Prompts of {meaning}"


def _figure(directory: Path, pair: Pair, *, blur: bool) -> dict[str, Any]:
    sides = [(row["side"], data_uri(_path(directory, row), blur=blur), _verdict(row)) for row in pair]
    return {"prompt": pair.base["prompt"], "seed": pair.base["seed"], "sides": sides}


def _verdict(row: Mapping[str, Any]) -> str:
    """What the evaluators say of one image."""
    if row["failed"]:
        return "not scored"
    if row.get("shown") is None:
        return ""
    return f"{'shows' if row['shown'] else 'no'} {row['label']} ({row['score']:.2f})"


def _path(directory: Path, row: Mapping[str, Any]) -> Path:
    return directory / "images" / str(row["side"]) / str(row["file"])


def _open(path: Path, *, blur: bool) -> Image.Image | None:
    """An image, blurred in its pixels if asked for; None if it cannot be read."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except PIL_ERRORS:
        return None
    return image.filter(ImageFilter.GaussianBlur(image.width / 8)) if blur else image


def data_uri(path: Path, *, blur: bool = False) -> str:
    """An image as a data URI, at most 256 pixels wide; "" if it cannot be read."""
    image = _open(path, blur=blur)
    if image is None:
        return ""
    image.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG" if image.width < LARGEST else "WEBP", quality=85)
    kind = "png" if image.width < LARGEST else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def grid(
    base_paths: Sequence[Path],
    erased_paths: Sequence[Path],
    path: Path,
    *,
    captions: Sequence[str] = (),
    columns: int = 4,
    blur: bool = False,
) -> Path:
    """Write a PNG of pairs, the unedited model's image left and the erased one's right of each, with captions below.

    An image that cannot be read is an empty field.
    """
    side, gap, line = 128, 4, 18
    width, height = 2 * side + 3 * gap, side + line + 2 * gap
    n = len(base_paths)
    sheet = Image.new("RGB", (width * min(n, columns), height * -(-n // columns)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for i, both in enumerate(zip(base_paths, erased_paths, strict=True)):
        x, y = width * (i % columns) + gap, height * (i // columns) + gap
        for k, file in enumerate(both):
            image = _open(file, blur=blur)
            if image:
                sheet.paste(image.resize((side, side), Image.Resampling.BICUBIC), (x + k * (side + gap), y))
        caption = captions[i] if captions else ""
        while draw.textlength(caption, font) > width - 2 * gap:
            caption = caption[:-2] + "…"
        draw.text((x, y + side + 2), caption, "black", font)
    with replacing(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def curves(steps: Sequence[Mapping[str, float]], most: int = 300) -> list[tuple[str, Markup]]:
    """A drawing (SVG) of each logged value over the training steps, smoothed; [] if nothing was trained.

    Args:
        steps: the values of each step, in order.
        most: how many points a line has at most.
    """
    drawings = []
    for name in dict.fromkeys(k for values in steps for k in values):
        values = _smooth([s[name] for s in steps if name in s])
        values = values[:: -(-len(values) // most)]
        top = max(values, default=0.0)
        if len(values) > 1 and top > 0:
            points = " ".join(f"{4 + 292 * i / (len(values) - 1):.1f},{96 - 88 * v / top:.1f}" for i, v in enumerate(values))
            labels = f'<text x="6" y="12">{top:.3g}</text><text x="294" y="92" text-anchor="end">{values[-1]:.3g}</text>'
            line = f'<polyline points="{points}"/><path d="M4 4V96H296"/>'
            # Nothing but numbers is put into the markup; the name is escaped.
            drawing = Markup(f'<svg viewBox="0 0 300 100" role="img" aria-label="{escape(name)}">{line}{labels}</svg>')
            drawings.append((name, drawing))
    return drawings


def _smooth(values: Sequence[float]) -> list[float]:
    """A running mean that forgets over about ten steps."""
    smoothed: list[float] = []
    for value in values:
        smoothed.append(value if not smoothed else smoothed[-1] + 0.15 * (value - smoothed[-1]))
    return smoothed


def scale(metric: Metric) -> Markup:
    """A drawing of a share on [0, 1]: its interval, its value, and the base's; nothing for other numbers."""
    if metric.value is None or not metric.ci95 or max(metric.value, metric.base or 0, metric.ci95[1]) > 1:
        return Markup("")
    low, high = (2 + 96 * end for end in metric.ci95)
    base = "" if metric.base is None else f'<path class="base" d="M{2 + 96 * metric.base:.1f} 2v12"/>'
    value = f'<circle cx="{2 + 96 * metric.value:.1f}" cy="8" r="3"/>'
    return Markup(
        f'<svg class="scale" viewBox="0 0 100 16" aria-hidden="true"><path d="M2 8H98" class="axis"/>'
        f'<path class="interval" d="M{low:.1f} 8H{high:.1f}"/>{base}{value}</svg>'
    )


def _log(path: Path) -> list[dict[str, float]]:
    """The values of every training step in log.jsonl; lines cut short by a killed run are left out."""
    steps = []
    for line in _text(path).splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event.get("event") == "StepEnd":
            steps.append(event["values"])
    return steps


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _json(path: Path) -> Any:
    return json.loads(_text(path)) if path.is_file() else {}
