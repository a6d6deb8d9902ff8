"""Hooks, plugins, and the names that they register."""
