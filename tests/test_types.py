"""The types that the package brings: stubs of the extension that name what it has, and py.typed beside them."""

import ast
import re

import pytest
from support import ROOT

from fastclip._native import _C

ONLY_WITH_CUDA = {"force_cuda_blocks", "allow_cooperative_launches"}


def stubs():
    """{name: number of its arguments, None for a value}"""
    found = {}
    for node in ast.parse((ROOT / "fastclip" / "_C.pyi").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            arguments = node.args
            found[node.name] = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])
        elif isinstance(node, ast.ClassDef):
            found[node.name] = None
        elif isinstance(node, ast.AnnAssign):
            found[node.target.id] = None
    return found


@pytest.mark.skipif(_C is None, reason="built without the extension")
def test_stubs_are_those_of_the_extension():
    real = {}
    for name, value in vars(_C).items():
        if not name.startswith("__"):
            is_function = callable(value) and not isinstance(value, type)
            signature = re.match(rf"{name}\((.*?)\) -> ", value.__doc__) if is_function else None
            real[name] = signature and signature[1].count(": ")
    expected = {name: count for name, count in stubs().items() if _C.cuda or name not in ONLY_WITH_CUDA}
    assert real == expected


def test_stubs_and_marker_are_installed():
    text = (ROOT / "pyproject.toml").read_text()
    assert '"fastclip" = ["py.typed", "_C.pyi"' in text and (ROOT / "fastclip" / "py.typed").exists()
