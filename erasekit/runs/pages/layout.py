"""What all pages share: one file that asks for nothing, and a policy that lets a browser run and load nothing else."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from erasekit.atomic import replacing
from erasekit.erasures.modelcard import templates
from erasekit.evaluation.results import Metric, number
from erasekit.runs.pages import plots
from erasekit.runs.pages.gallery import OUTCOMES, set_title


def write_page(path: Path, template: str, **content: Any) -> Path:
    """Write a page, whole or not at all."""
    page = (
        templates()
        .get_template(template)
        .render(
            content,
            style=_part("page.css"),
            script=_part("page.js"),
            policy=_policy(),
            number=number,
            share=share,
            is_share=is_share,
            level=plots.level,
            outcomes=OUTCOMES,
            set_title=set_title,
        )
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


@cache
def _part(name: str) -> Markup:
    """The page's own style or script, as it stands in its file."""
    environment = templates()
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])  # no word of a user's is in it


@cache
def _policy() -> str:
    """The content security policy: the page's own style and script, by their hashes, and images that lie in it."""
    style, script = (
        base64.b64encode(hashlib.sha256(_part(name).encode()).digest()).decode() for name in ("page.css", "page.js")
    )
    return f"default-src 'none'; img-src data:; style-src 'sha256-{style}'; script-src 'sha256-{script}'; form-action 'none'"


def share(value: float | None) -> str:
    """A share as a percentage, with a decimal where it has one."""
    return "-" if value is None else f"{100 * value:.1f}".removesuffix(".0") + "\N{NO-BREAK SPACE}%"


def is_share(metric: Metric) -> bool:
    """Whether a metric with its interval lies on [0, 1], so that it can be drawn there."""
    if metric.value is None or metric.ci95 is None:
        return False
    values = (metric.value, *metric.ci95, metric.base or 0.0)
    return min(values) >= 0 and max(values) <= 1
