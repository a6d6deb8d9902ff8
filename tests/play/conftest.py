"""The browser of the pages, for the playground."""

from tests.page.conftest import QUIET, axe, chromium, playwright

__all__ = ["QUIET", "axe", "chromium", "playwright"]
