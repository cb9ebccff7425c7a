"""The stub of the extension module says what the module has: names, parameters, results."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import hdispatch
import pytest
from hdispatch import _C, _build_info

PACKAGE = Path(hdispatch.__file__).parent
Parameters = list[str]
#: What pybind11 calls a type -> what the stub may call it.
RESULTS = {
    "object": ("object", "Op", "FunctionalOp", "Sequence", "Callable", "AdoptedKernel", "HostKernel"),
    "list": ("list",),
    "dict": ("dict",),
    "int": ("int",),
    "float": ("float",),
    "str": ("str",),
    "hdispatch._C.Override": ("Override | None",),  # a pointer, which may be null
    "hdispatch._C.Table": ("Table",),
}


def stub(module: ModuleType) -> ast.Module:
    return ast.parse((PACKAGE / f"{module.__name__.rpartition('.')[2]}.pyi").read_text())


def stub_names(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert node.name not in found
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign):
            assert isinstance(node.target, ast.Name)
            found[node.target.id] = node
    return found


def stub_class(name: str) -> dict[str, ast.stmt]:
    node = stub_names(stub(_C).body)[name]
    assert isinstance(node, ast.ClassDef)
    return stub_names(node.body)


def stub_parameters(node: ast.stmt) -> tuple[Parameters, str]:
    """Names of the parameters, `*` in front where it has one, and the result."""
    assert isinstance(node, ast.FunctionDef)
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    names += [f"*{a.arg}" for a in [node.args.vararg] if a] + [f"**{a.arg}" for a in [node.args.kwarg] if a]
    assert node.returns is not None
    return names, ast.unparse(node.returns)


def real_parameters(function: Any) -> tuple[Parameters, str]:
    """The same from the first line of pybind11's documentation: `name(a: int, b: str = 'x', *args) -> None`."""
    line = function.__doc__.splitlines()[0]
    parameters, result = re.fullmatch(r"\w+\((.*)\) -> (.+)", line).groups()
    node = ast.parse(f"def f({parameters}): ...").body[0]
    return stub_parameters(ast.FunctionDef(**{**vars(node), "returns": ast.parse(result).body[0].value}))  # type: ignore[attr-defined]


def check_function(real: Any, node: ast.stmt) -> None:
    names, result = stub_parameters(node)
    real_names, real_result = real_parameters(real)
    # Without names of their own pybind11 numbers them; the stub must then make them positional.
    if real_names[:1] == ["arg0"]:
        assert isinstance(node, ast.FunctionDef)
        assert node.args.posonlyargs
        names, real_names = names[1:], real_names[1:]
    assert names == real_names, real.__name__
    assert result.split("[")[0] in RESULTS.get(real_result, (real_result,)), real.__name__


def public(of: object) -> set[str]:
    return {name for name in vars(of) if not name.startswith("_")}


def test_the_stub_names_what_there_is_and_nothing_else():
    assert set(stub_names(stub(_C).body)) == public(_C)
    assert set(stub_class("TableBuilder")) - {"__init__"} == public(_C.TableBuilder)
    assert {n for n in stub_class("Op") if not n.startswith("__")} == public(_C.Op)
    assert {"__call__", "__name__"} <= set(vars(_C.Op))


@pytest.mark.parametrize("name", sorted(n for n in public(_C) if inspect.isbuiltin(getattr(_C, n))))
def test_functions(name):
    check_function(getattr(_C, name), stub_names(stub(_C).body)[name])


@pytest.mark.parametrize("name", ["__init__", *sorted(public(_C.TableBuilder))])
def test_methods(name):
    check_function(getattr(_C.TableBuilder, name), stub_class("TableBuilder")[name])


def test_the_op():
    names = stub_class("Op")
    pick = inspect.signature(_C.Op.pick)
    assert [p for p in pick.parameters if p != "self"] == stub_parameters(names["pick"])[0][1:]
    assert all(p.kind is inspect.Parameter.POSITIONAL_ONLY for p in pick.parameters.values())
    for name in public(_C.Op) - {"pick"} | {"__name__"}:
        node = names[name]
        assert isinstance(node, ast.FunctionDef)
        assert [ast.unparse(d) for d in node.decorator_list] == ["property"]
        assert inspect.isgetsetdescriptor(vars(_C.Op)[name])


def test_the_build_info():
    assert set(stub_names(stub(_build_info).body)) == public(_build_info)
    assert all(full.startswith(f"{minor}.") for minor, full in _build_info.TORCH_VERSIONS.items())


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()
