"""Third-party libraries, imported when first needed; a missing one is named, with how to get it."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from .errors import Ds01Error


def require(module: str, package: str) -> Any:
    """The imported module. Raises Ds01Error `library_missing` naming the PyPI package."""
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise Ds01Error(
            "library_missing",
            f"The Python library {package} is missing for {sys.executable} ({exc}).",
            "playbooks/site.yml installs it into /opt/ds01/venv: set ansible_python_interpreter to "
            f"/opt/ds01/venv/bin/python. By hand: {sys.executable} -m pip install {package}.",
        ) from None
