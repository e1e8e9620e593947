"""The report of an error that nobody expected: everything a bug report needs, in one file."""

from __future__ import annotations

import json
import platform
import shlex
import tempfile
import traceback
from importlib.metadata import PackageNotFoundError, version

from titan_cli.context import State
from titan_core.runtime.version import titan_version


def write_report(error: BaseException, state: State) -> str:
    """Write the traceback, versions, command line and config to a file and return its path."""
    lines = [f"titan {titan_version()}, python {platform.python_version()}, {platform.platform()}"]
    for package in ("torch", "triton", "typer", "datasets", "tokenizers", "transformers"):
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package} not installed")
    lines.append("command: titan " + shlex.join(state.words))
    lines += ["", *traceback.format_exception(error)]
    if state.resolved is not None:
        from titan_core.config.load import to_dict

        lines += ["config: " + json.dumps(to_dict(state.resolved.config))]
    with tempfile.NamedTemporaryFile(
        "w", prefix="titan-report-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write("\n".join(lines) + "\n")
    return file.name
