"""Packages that a plan needs and that are not installed: all of them in one line, before anything is read or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from erasekit.errors import EnvironmentProblem
from erasekit.registration.plugins import Registries
from erasekit.runs.plan import Plan

OURS = "erasekit["  # a requirement that is one of our extras


def check_packages(plan: Plan, registries: Registries) -> None:
    """See that everything is installed that the plan's prompts, evaluators and way of holding the model import.

    Raises:
        EnvironmentProblem: something is not; names all of it, what it is for, and the command that installs it.
    """
    wanted: dict[str, tuple[str, str]] = {}
    for what, packages in _owners(plan, registries):
        for module, requirement in packages.items():
            if module not in wanted and not _installed(module):
                wanted[module] = (what, requirement)
    if not wanted:
        return
    named = ", ".join(f"{module} (for {what})" for module, (what, _) in wanted.items())
    raise EnvironmentProblem(f"Not installed: {named}. Run: pip install {_requirements([r for _, r in wanted.values()])}.")


def _owners(plan: Plan, registries: Registries) -> list[tuple[str, Mapping[str, str]]]:
    """What needs packages, and {module: what pip installs for it}."""
    found = [(f"the prompts of '{plan.task_name}'", plan.task.packages())]
    found += [(f"the evaluator '{name}'", registries.evaluators.get(name).packages) for name in plan.evaluators]
    if not plan.erasure_sha256:  # else nothing is trained
        four_bits = plan.backbone.needs(plan.backbone_config, plan.protocol.size).held.weights == "nf4"
        packages = {"bitsandbytes": "erasekit[nf4]"} if four_bits else {}
        found.append((f"four bits, --vram {plan.backbone_config.vram}", packages))
    return found


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # its parent is not there; a plugin has put something else in its place
        return False


def _requirements(requirements: list[str]) -> str:
    """Arguments of pip: the extras in one, then whatever else."""
    ours = sorted({r.removeprefix(OURS).rstrip("]") for r in requirements if r.startswith(OURS)})
    others = sorted({r for r in requirements if not r.startswith(OURS)})
    return " ".join(f"'{r}'" for r in [*([f"{OURS}{','.join(ours)}]"] if ours else []), *others])
