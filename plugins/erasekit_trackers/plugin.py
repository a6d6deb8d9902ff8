"""Hands the events of runs that asked for a tracker on to it."""

from __future__ import annotations

from erasekit import hookimpl
from erasekit.events import Event, Run


@hookimpl
def on_event(event: Event, run: Run) -> None:
    """Tell the run's tracker; runs without one cost no import."""
    from erasekit_trackers.tracking import hear

    hear(event, run.path)
