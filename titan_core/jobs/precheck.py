"""Everything that can be known to be wrong with a run before a rank is started or torch is loaded."""

from __future__ import annotations

from titan_core.config.checks import check, placed
from titan_core.config.layout import Layout
from titan_core.config.load import Resolved
from titan_core.models import problems as model_problems
from titan_core.models import resolve
from titan_core.parallel import legal
from titan_core.runtime.errors import Problem


def run(resolved: Resolved, world_size: int) -> list[Problem]:
    """Return the problems of a config on so many ranks: its rules, the model, and the model on that layout."""
    config = resolved.config
    found = check(resolved, world_size)
    if found or config.experimental.custom_import:  # which may bring the model
        return found
    found = model_problems(config.model)
    if not found:
        found = legal.problems(config, Layout.of(config.parallelism, world_size), *resolve(config.model))
    return [placed(problem, resolved) for problem in found]
