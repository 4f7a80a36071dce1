"""Has every export of the compiled module its stub and its Python face?"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import charioteer as ch
from charioteer import _core

pytestmark = pytest.mark.surface

PACKAGE = Path(ch.__file__).parent
STUB = ast.parse((PACKAGE / "_core.pyi").read_text())


def public(names: Any) -> set[str]:
    return {name for name in names if not name.startswith("_")}


def stubbed(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    """The names that a stub's statements declare."""
    found: dict[str, ast.stmt] = {}
    for statement in body:
        match statement:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                found[name] = statement
            case ast.AsyncFunctionDef(name=name):
                found[name] = statement
            case ast.AnnAssign(target=ast.Name(id=name)):
                found[name] = statement
    return found


def exported() -> dict[str, Any]:
    return {
        name: value
        for name, value in vars(_core).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }


def words_of_the_package() -> set[str]:
    """Every name and attribute that the package's own Python sources mention."""
    words: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Name(id=word) | ast.Attribute(attr=word) | ast.alias(name=word):
                    words.add(word)
    return words


def given_by_the_module() -> set[str]:
    """The names in what functions and other classes of the stub return: their face is the giver."""
    words: set[str] = set()
    for statement in STUB.body:
        own = statement.name if isinstance(statement, ast.ClassDef) else ""
        for node in ast.walk(statement):
            if isinstance(node, ast.FunctionDef) and node.returns is not None:
                names = {word.id for word in ast.walk(node.returns) if isinstance(word, ast.Name)}
                words |= names - {own}
    return words


def test_every_export_has_a_stub_and_the_reverse() -> None:
    names = set(exported())
    assert len(names) >= 3
    assert names == public(stubbed(STUB.body))


def test_every_export_has_a_python_face() -> None:
    names = set(exported())
    faces = set(ch.__all__) | words_of_the_package() | given_by_the_module()
    assert names
    assert names - faces == set()


def test_every_member_of_an_exported_class_has_a_stub() -> None:
    inspected = 0
    stubs = stubbed(STUB.body)
    for name, value in exported().items():
        if not inspect.isclass(value):
            continue
        statement = stubs[name]
        assert isinstance(statement, ast.ClassDef)
        members = public(vars(value))
        assert members == public(stubbed(statement.body)), name
        inspected += len(members)
    assert inspected >= 10


PUBLIC = [
    "AccessError",
    "CancelledError",
    "CaptureError",
    "CaptureWarning",
    "CharioteerError",
    "CycleError",
    "DependencyError",
    "DeviceError",
    "DeviceLostError",
    "DuplicateTaskError",
    "In",
    "InOut",
    "Machine",
    "MachineError",
    "NativeError",
    "NoRuntimeError",
    "Out",
    "OutOfDeviceMemoryError",
    "PlacementError",
    "Requirement",
    "Runtime",
    "RuntimeActiveError",
    "Task",
    "TaskFunction",
    "TaskGroup",
    "TaskList",
    "TaskSpace",
    "TaskTimeoutError",
    "UnspawnedDependencyError",
    "WorkerLimitError",
    "as_completed",
    "cpu",
    "current",
    "gather",
    "gpu",
    "native",
    "spawn",
    "spawn_many",
    "task",
    "wait",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_public_names_are_there(name: str) -> None:
    assert hasattr(ch, name)
    assert name in ch.__all__


def test_all_is_true_and_documented() -> None:
    assert len(set(ch.__all__)) == len(ch.__all__) >= len(PUBLIC)
    undocumented = []
    for name in ch.__all__:
        value = getattr(ch, name)
        documentable = inspect.isclass(value) or inspect.isroutine(value)
        if documentable and not inspect.getdoc(value):
            undocumented.append(name)
    assert undocumented == []


def test_every_public_method_is_documented() -> None:
    inspected, undocumented = 0, []
    for name in ch.__all__:
        value = getattr(ch, name)
        if not inspect.isclass(value) or issubclass(value, BaseException):
            continue
        for member in public(vars(value)):
            inspected += 1
            if not inspect.getdoc(getattr(value, member)):
                undocumented.append(f"{name}.{member}")
    assert inspected >= 20
    assert undocumented == []


def test_the_version() -> None:
    assert ch.__version__.split(".")[0].isdigit()


def test_classes_name_their_public_module() -> None:
    inspected = 0
    for name in ch.__all__:
        value = getattr(ch, name)
        if inspect.isclass(value):
            assert value.__module__.split(".")[0] == "charioteer", name
            assert value.__name__ == name
            inspected += 1
    assert inspected >= 10
