"""Gives an installed pywebsock its types. A single module cannot say that it has them; a stub package beside it can."""

from __future__ import annotations

import pathlib
import shutil
import tempfile
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Stubs(BuildHookInterface[Any]):
    """Adds the text of the module to the wheel as its own stub."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel is built; `version` is its kind. In an editable one, the stub would soon be old."""
        if version == "standard":
            self.folder = tempfile.mkdtemp()
            stub = shutil.copy(pathlib.Path(self.root, "pywebsock.py"), self.folder)  # one path cannot go to two places
            build_data["force_include"][stub] = "pywebsock-stubs/__init__.pyi"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called afterwards."""
        if version == "standard":
            shutil.rmtree(self.folder)
