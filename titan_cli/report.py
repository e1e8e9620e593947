"""The report of an error that nobody expected: everything a bug report needs, in one file."""

from __future__ import annotations

import platform
import sys
import tempfile
import traceback
from importlib.metadata import PackageNotFoundError, version


def write_report(error: BaseException) -> str:
    """Write the traceback, versions and command line to a file and return its path."""
    lines = [f"titan {version('titan-pretrain')}, python {platform.python_version()}, {platform.platform()}"]
    for package in ("torch", "triton", "typer", "datasets", "tokenizers", "transformers"):
        try:
            lines.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lines.append(f"{package} not installed")
    lines.append("command: " + " ".join(sys.argv))
    lines += ["", *traceback.format_exception(error)]
    with tempfile.NamedTemporaryFile(
        "w", prefix="titan-report-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write("\n".join(lines))
    return file.name
