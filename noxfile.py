"""`nox -s lint types tests` before a commit; the other sessions before a release."""

from __future__ import annotations

import os
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests"]
nox.options.reuse_existing_virtualenvs = True


@nox.session
def lint(session: nox.Session) -> None:
    """Style."""
    session.install("ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types, strict on erasekit and its plugins."""
    session.install("-e", ".[dev]")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """All tests that need no GPU and no foreign package."""
    session.install("-e", ".[dev]")
    session.run("pytest", *session.posargs)


@nox.session
def matrix(session: nox.Session) -> None:
    """Every method, in closed form and after 20 steps, on every model at hand; `-- --full` measures them (hours)."""
    session.install("-e", ".[dev]")
    arguments = list(session.posargs)
    if "--full" in arguments:
        arguments.remove("--full")
        session.run("erasekit", "sweep", "benchmarks/suites/objects-mini.toml", *arguments)
        return
    session.run("pytest", "tests/contracts", "--matrix", *arguments)


@nox.session
def third_party(session: nox.Session) -> None:
    """A foreign package, installed beside erasekit, and single-file plugins."""
    session.install(".[dev]", "tests/third_party/erasekit_example")
    session.run("pytest", "tests/third_party", *session.posargs)


@nox.session
def cluster(session: nox.Session) -> None:
    """Sweeps on a Ray cluster of two nodes, both on this machine, and in a queue of Slurm (its packages are Debian's)."""
    session.install("-e", ".[dev,ray,slurm]")
    session.run("pytest", "tests/cluster", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The pages as a site, in site/: every link leads to a page and a heading. And that they name all there is."""
    session.install("furo", "myst-parser", "sphinx", "sphinx-copybutton", "sphinx-external-toc", "sphinxcontrib-mermaid")
    session.run("sphinx-build", "-W", "--keep-going", "-n", "-q", "-E", "-c", "docs", ".", "site")
    session.install("-e", ".[dev]")
    session.run("pytest", "tests/test_docs.py", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """The wheel, in an environment of its own, and with it what README and tutorial show."""
    session.install("build")
    target = session.create_tmp()
    session.run("python", "-m", "build", "--outdir", target, ".")
    wheel = max(Path(target).glob("*.whl"), key=os.path.getmtime)
    session.install(str(wheel), "pytest")
    session.install("--force-reinstall", "--no-deps", str(wheel))  # an environment that is used again has another one
    with session.chdir(target):
        session.run("erasekit", "ls")
        session.run("erasekit", "doctor")
    alone = ("--noconftest", "-o", "addopts=--import-mode=importlib")  # pytest without what the other tests need
    session.run("pytest", *alone, "tests/documents", *session.posargs)


@nox.session
def page(session: nox.Session) -> None:
    """The pages and the playground in a real browser: needs chromium (or CHROMIUM, its path) and npm, which gets axe-core."""
    session.install("-e", ".[dev,play]", "playwright")
    target = session.create_tmp()
    session.run("npm", "install", "--silent", "--prefix", target, "axe-core", external=True)
    axe = os.path.join(target, "node_modules", "axe-core", "axe.min.js")
    for folder in ("tests/page", "tests/play"):  # in one process there would be two of Playwright, which it refuses
        session.run("pytest", "-n0", folder, *session.posargs, env={"AXE": axe})


@nox.session
def gpu(session: nox.Session) -> None:
    """Tests that need a GPU; they fail without one."""
    session.install("-e", ".[dev]")
    session.run("pytest", "tests/gpu", *session.posargs)
