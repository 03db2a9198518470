"""The modules of a vLLM source tree, of which single names are executed.

A probe takes the few functions and classes that it asserts something of. What these name in their
own module comes along; what they import is real if the probe says so, and a stand-in else. So no
GPU, no compiled library and none of vLLM's dependencies is needed, and a probe takes milliseconds.
torch is the environment's, if it has one, and `standin`'s else.

A stand-in may be called, subscripted and passed around; where its value would decide something, it
says that it cannot tell. So no verdict rests on one.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

ANNOTATIONS = __future__.annotations.compiler_flag
#: Modules of others that are as they are where they are installed; else they are stand-ins.
OUTSIDE = ("numpy", "torch", "typing_extensions")
#: The standard library; Python 3.9 does not tell, and these are what vLLM takes of it.
STANDARD = getattr(sys, "stdlib_module_names", frozenset(
    ("__future__", "abc", "argparse", "ast", "asyncio", "builtins", "collections", "contextlib",
     "copy", "dataclasses", "datetime", "enum", "functools", "gc", "hashlib", "importlib",
     "inspect", "itertools", "json", "logging", "math", "os", "pathlib", "pickle", "platform",
     "random", "re", "sys", "tempfile", "threading", "time", "types", "typing", "uuid", "warnings",
     "weakref")
))  # fmt: skip
#: Names of other libraries that a module of the standard library has too.
SAME = {"regex": "re"}


class WrongError(Exception):
    """It does what the stock release does."""


class AbsentError(Exception):
    """There is nothing there that the topic could change."""


class UnknownError(Exception):
    """It cannot be told."""


Probe = Callable[["Tree"], None]


class Probes(dict[str, Probe]):
    """Probes by topic."""

    def add(self, probe: Probe) -> Probe:
        """Take a function as the probe of the topic that it is named after."""
        self[probe.__name__.replace("_", "-")] = probe
        return probe


def demand(is_right: object, otherwise: str) -> None:
    """Nothing, if it `is_right`.

    Raises:
        WrongError: it is not.
    """
    if not is_right:
        raise WrongError(otherwise)


class Base:
    """In place of a base class: it takes whatever its `__init__` is given."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass


class Loose:
    """An object of which some attributes matter; all the others are like this one, and false."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Loose()

    def __call__(self, *_: Any, **__: Any) -> Loose:
        """Itself, for whatever it is called with."""
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __getitem__(self, _: Any) -> Loose:
        return Loose()

    def _no(self, _: Any) -> bool:
        return False

    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = _no


class Soft:
    """A stand-in for what a tree or a library has under a dotted name."""

    def __init__(self, name: str, tree: Tree | None = None) -> None:
        vars(self)["_name"], vars(self)["_tree"] = name, tree

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        tree, own = vars(self)["_tree"], vars(self)["_name"]
        found = Soft(f"{own}.{name}") if tree is None else tree.attribute(own, name)
        vars(self)[name] = found
        return found

    def __call__(self, *given: Any, **named: Any) -> Any:
        """Another stand-in; as a decorator, what is decorated."""
        if len(given) == 1 and not named and callable(given[0]) and not isinstance(given[0], Soft):
            return given[0]
        return Soft(f"{vars(self)['_name']}()")

    def __repr__(self) -> str:
        return str(vars(self)["_name"])

    def __getitem__(self, _: Any) -> Soft:
        return Soft(f"{self!r}[]")

    def __mro_entries__(self, _: Any) -> tuple[type, ...]:
        return (type(repr(self), (Base,), {}),)

    def __or__(self, _: Any) -> Soft:
        return self

    __ror__ = __or__

    def __enter__(self) -> Soft:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def _undecided(self, *_: Any) -> NoReturn:
        raise UnknownError(f"it depends on {self!r}, which has a stand-in here")

    __bool__ = __len__ = __iter__ = __int__ = __index__ = __float__ = _undecided
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = _undecided
    __instancecheck__ = __subclasscheck__ = _undecided


class Unit:
    """A module of the tree, whose statements are executed as their names are asked for."""

    def __init__(self, tree: Tree, name: str, path: Path) -> None:
        self.name, self.tree = name, tree
        source = ast.parse(path.read_bytes(), str(path))
        self._flags = ANNOTATIONS if _postpones(source) else 0
        self._file = str(path)
        self.statements = source.body
        self._by_name: dict[str, list[ast.stmt]] = {}
        for statement in source.body:
            for bound in set(_bound(statement)):
                self._by_name.setdefault(bound, []).append(statement)
        self._module = ModuleType(name)
        self._done, self._under_way = set[int](), set[str]()
        self._instead: dict[str, Any] = {}
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        vars(self._module).update(
            {
                "__package__": package,
                "__file__": str(path),
                "__builtins__": {**vars(builtins), "__import__": tree.import_},
            }
        )

    def __contains__(self, name: str) -> bool:
        return name in self._by_name or name in vars(self._module)

    def set(self, **values: Any) -> None:
        """Put these in the place of what the module has."""
        self._instead.update(values)
        vars(self._module).update(values)

    def take(self, name: str) -> Any:
        """What the module has under a name.

        Raises:
            UnknownError: it has no such name.
        """
        self._define(name)
        try:
            return vars(self._module)[name]
        except KeyError:
            raise UnknownError(f"{self.name} has no {name}") from None

    def method(self, cls: str, name: str) -> Callable[..., Any]:
        """A method as a plain function, without its class being made.

        Raises:
            UnknownError: there is none.
        """
        for statement in self._by_name.get(cls, ()):
            for inner in getattr(statement, "body", ()):
                if isinstance(inner, ast.FunctionDef) and inner.name == name:
                    inner.decorator_list = []
                    self._run(inner)
                    found: Callable[..., Any] = vars(self._module).pop(name)
                    return found
        raise UnknownError(f"{self.name} has no {cls}.{name}")

    def run_calls(self, function: str) -> None:
        """Execute the calls of a function that stand alone at the module's top.

        Functions and classes of the module that they name are not made for it.
        """
        for statement in self.statements:
            if not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)):
                continue
            named = statement.value.func
            if isinstance(named, ast.Name) and named.id == function:
                for node in ast.walk(statement):
                    defined = self._by_name.get(getattr(node, "id", ""), ())
                    if any(isinstance(one, (ast.FunctionDef, ast.ClassDef)) for one in defined):
                        assert isinstance(node, ast.Name)
                        self.set(**{node.id: Soft(node.id)})
                self._run(statement)

    def reads(self, cls: str, method: str, chain: str) -> bool:
        """Whether a method has an expression of attributes in it, `self.model` say."""
        for statement in self._by_name.get(cls, ()):
            for inner in getattr(statement, "body", ()):
                if isinstance(inner, ast.FunctionDef) and inner.name == method:
                    return any(
                        isinstance(node, ast.Attribute) and ast.unparse(node) == chain
                        for node in ast.walk(inner)
                    )
        return False

    def _define(self, name: str) -> None:
        if name in self._instead or name in self._under_way:
            return
        self._under_way.add(name)
        for statement in self._by_name.get(name, ()):
            if id(statement) not in self._done:
                self._done.add(id(statement))
                self._run(statement)
        self._under_way.discard(name)

    def _run(self, statement: ast.stmt) -> None:
        """Execute a statement, after what it needs for that, and before what it calls later."""
        now = set(_needed(statement, not self._flags))
        for name in now:
            self._define(name)
        code = compile(
            ast.Module([statement], []), self._file, "exec", flags=self._flags, dont_inherit=True
        )
        before = sys.modules.get(self.name)
        sys.modules[self.name] = self._module  # dataclasses look there
        try:
            exec(code, vars(self._module))
            vars(self._module).update(self._instead)
        finally:
            if before is None:
                del sys.modules[self.name]
            else:
                sys.modules[self.name] = before
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node.id not in now:
                self._define(node.id)


class Tree:
    """The package below a folder."""

    def __init__(
        self,
        root: Path,
        torch: Any,
        real: Sequence[str] = (),
        given: Mapping[str, Any] | None = None,
    ) -> None:
        self.root, self.torch = root, torch
        self._real, self._given = frozenset(real), dict(given or {})
        self._units: dict[str, Unit] = {}
        self._softs: dict[str, Soft] = {}

    def with_(self, *real: str, **given: Any) -> Tree:
        """The same tree with modules that are `real`, and values `given` by dotted names, with
        double underscores for the dots."""
        values = {name.replace("__", "."): value for name, value in given.items()}
        return Tree(self.root, self.torch, real, values)

    def give(self, path: str, value: Any) -> None:
        """Have an import of this dotted name give the value."""
        self._given[path] = value

    def path(self, module: str) -> Path | None:
        """The file of a module, if there is one."""
        place = self.root.joinpath(*module.split("."))
        for file in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if file.is_file():
                return file
        return None

    def text(self, module: str) -> str:
        """The source of a module; empty if there is none."""
        file = self.path(module)
        return "" if file is None else file.read_text("utf-8")

    @property
    def torch_version(self) -> tuple[int, ...]:
        """Major and minor version of the torch that is there, or that the tree is pinned to; empty
        if nothing tells."""
        stated = str(getattr(self.torch, "__version__", ""))
        metadata = self.root / "PKG-INFO"
        if not stated and metadata.is_file():
            found = re.search(r"^Requires-Dist: torch==([\d.]+)", metadata.read_text("utf-8"), re.M)
            stated = found[1] if found else ""
        return tuple(int(part) for part in stated.split(".")[:2] if part.isdigit())

    def unit(self, module: str) -> Unit:
        """A module, to take names from.

        Raises:
            UnknownError: there is none, or it does not parse.
        """
        if module not in self._units:
            file = self.path(module)
            if file is None:
                raise UnknownError(f"there is no {module}")
            try:
                self._units[module] = Unit(self, module, file)
            except (SyntaxError, ValueError) as error:
                raise UnknownError(f"{module} does not compile: {error}") from error
        return self._units[module]

    def mentions(self, text: str, below: str = "vllm") -> Path | None:
        """The first Python file below a folder that has this text."""
        wanted = text.encode()
        files = (self.root / below).rglob("*.py")
        return next((file for file in sorted(files) if wanted in file.read_bytes()), None)

    def attribute(self, module: str, name: str) -> Any:
        """What an import gives of a module: given, real, or a stand-in."""
        path = f"{module}.{name}"
        if path in self._given:
            return self._given[path]
        if module in self._real and name in self.unit(module):
            return self.unit(module).take(name)
        return self._soft(path)

    def _soft(self, path: str) -> Soft:
        """The stand-in of a name, the same each time, so that members of enumerations compare."""
        return self._softs.setdefault(path, Soft(path, self))

    def import_(
        self,
        name: str,
        globals_: Mapping[str, Any] | None = None,
        _locals: Any = None,
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> Any:
        """`__import__`, for the code of the tree."""
        if level:
            parts = str((globals_ or {})["__package__"]).split(".")
            package = ".".join(parts[: len(parts) - level + 1])
            name = f"{package}.{name}" if name else package
        top = name.partition(".")[0]
        if top == "torch":
            return self._torch(name, fromlist)
        if top in SAME or top in STANDARD or self._is_outside(top):
            return builtins.__import__(SAME.get(name, name), None, None, fromlist)
        return self._soft(name if fromlist else top)

    def _torch(self, name: str, fromlist: Sequence[str]) -> Any:
        if not fromlist:
            return self.torch
        if isinstance(self.torch, ModuleType):
            # More than torch itself imports, its compiler say, would take ten seconds.
            return sys.modules.get(name) or self._soft(name)
        found = self.torch
        for part in name.split(".")[1:]:
            found = getattr(found, part)
        return found

    @staticmethod
    def _is_outside(top: str) -> bool:
        if top not in OUTSIDE:
            return False
        try:
            importlib.import_module(top)
        except ImportError:
            return False
        return True


def _needed(node: ast.AST, annotations: bool) -> Iterator[str]:
    """The names that are looked up when a statement is executed: none of what is in functions."""
    if isinstance(node, ast.Name):
        yield node.id
    for field, value in ast.iter_fields(node):
        is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if (is_function and field == "body") or (
            not annotations and field in ("annotation", "returns")
        ):
            continue
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, ast.AST):
                yield from _needed(inner, annotations)


def _postpones(source: ast.Module) -> bool:
    return any(
        isinstance(one, ast.ImportFrom)
        and one.module == "__future__"
        and any(alias.name == "annotations" for alias in one.names)
        for one in source.body
    )


def _changed(node: ast.expr) -> Iterator[str]:
    """The name of which an item or an attribute is set, or a method called."""
    inner = node
    while isinstance(inner, (ast.Attribute, ast.Subscript)):
        inner = inner.value
    if inner is not node and isinstance(inner, ast.Name):
        yield inner.id


def _bound(statement: ast.stmt) -> Iterator[str]:
    """The names that a statement at the top of its module binds, or changes the value of."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield statement.name
    elif isinstance(statement, ast.Import):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in statement.names)
    elif isinstance(statement, ast.ImportFrom):
        if statement.module != "__future__":
            yield from (alias.asname or alias.name for alias in statement.names)
    elif isinstance(statement, ast.Expr):
        if isinstance(statement.value, ast.Call):
            yield from _changed(statement.value.func)
    elif isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
        for target in getattr(statement, "targets", ()):
            yield from _changed(target)
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id
    else:
        for name in ("body", "orelse", "finalbody", "handlers"):
            for inner in getattr(statement, name, ()):
                if isinstance(inner, ast.ExceptHandler):
                    yield from (bound for one in inner.body for bound in _bound(one))
                else:
                    yield from _bound(inner)
