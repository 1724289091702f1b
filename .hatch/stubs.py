"""Adds types to the wheel. A single module has no marker for its types; a stub package beside it does."""

from __future__ import annotations

import ast
import pathlib
import tempfile
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Stubs(BuildHookInterface[Any]):
    """Adds the module to the wheel as its own stub."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the stub before a wheel is built, except an editable one (see `version`), where it would get old."""
        if version == "standard":
            text = name_settings(pathlib.Path(self.root, "pywebsock.py").read_text(encoding="utf-8"))
            self.folder = tempfile.TemporaryDirectory()
            stub = pathlib.Path(self.folder.name, "pywebsock.pyi")
            stub.write_text(text, encoding="utf-8")
            build_data["force_include"][str(stub)] = "pywebsock-stubs/__init__.pyi"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the files after the build."""
        if version == "standard":
            self.folder.cleanup()


def name_settings(text: str) -> str:
    """Return the module with all settings in place of **settings, so that a type checker finds wrong ones."""
    (settings,) = (each for each in ast.parse(text).body if isinstance(each, ast.ClassDef) and each.name == "Settings")
    named = []
    for each in settings.body:
        if isinstance(each, ast.AnnAssign):
            named.append(f"{ast.unparse(each.target)}: {ast.unparse(each.annotation)} = ...")
        elif isinstance(each, ast.Assign):
            named.append(f"{ast.unparse(each.targets[0])}: {type(ast.literal_eval(fold(each.value))).__name__} = ...")
    before, wanted, after = text.partition("**settings: Any,")
    if not (named and wanted):
        raise ValueError("the settings are not where they were")
    return f"{before}*, {', '.join(named)}, **settings: Any,{after}"


def fold(value: ast.expr) -> ast.expr:
    """Replace a product by its first factor, which has the same type."""
    while isinstance(value, ast.BinOp):
        value = value.left
    return value
