"""The tests, a package of its own name: some distributions install a `tests` too."""
