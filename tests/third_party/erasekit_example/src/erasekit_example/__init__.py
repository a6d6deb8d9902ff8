"""Registers the method; importing this imports no torch."""

from erasekit import hookimpl


@hookimpl
def register_methods(register):
    register("rename", "erasekit_example.method:Rename", summary="reads the concept's last token as the neutral word's")
