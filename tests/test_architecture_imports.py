"""Imports point one way: each room of the package imports only rooms above it, and only its own libraries.

A room is a module or a sub-package of `refengine/`. The table below is the design; a new room, or a new
direction, is added here on purpose or not at all. Every import counts, also those inside functions and
under TYPE_CHECKING. Slow or optional libraries (cupy, llama_cpp) may be imported inside functions only.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "refengine"
FACADE = "__init__"
"""The room of refengine/__init__.py, which `import refengine` and `from refengine import load` reach."""

ARRAYS = {"numpy", "gguf"}


TOP = {path.stem for path in PACKAGE.iterdir()}


MODEL_FILES = sorted(f"models.{path.stem}" for path in (PACKAGE / "models").glob("*.py") if path.stem != "__init__")


@dataclass(frozen=True)
class Room:
    """What a room may import: rooms of refengine, and third-party libraries (anywhere, or inside functions only)."""

    rooms: set[str]
    libraries: set[str]
    lazy_libraries: frozenset[str] = frozenset()


# From the bottom up: a room may name only rooms that stand before it in this table. A module is in the room with the
# longest name that fits it: refengine/gguf/cursor.py is in `gguf.cursor`, refengine/gguf/file.py in `gguf`.
BELOW_ENGINE = {
    "errors": Room(set(), set()),
    "array": Room(set(), {"numpy"}),  # a type
    "device": Room({"errors"}, {"numpy"}, frozenset({"cupy"})),
    # The GGUF rooms: no arrays on a GPU, no architectures, no quant arithmetic. Others know gguf.file only.
    "gguf.cursor": Room({"errors"}, ARRAYS),
    "gguf.parse": Room({"errors", "gguf.cursor"}, ARRAYS),
    "gguf.split": Room({"errors", "gguf.cursor", "gguf.parse"}, ARRAYS),
    "gguf": Room({"errors", "gguf.cursor", "gguf.parse", "gguf.split"}, ARRAYS),
    "quants": Room({"errors", "array"}, ARRAYS),  # no files
    "config": Room({"errors", "gguf"}, ARRAYS),
    "weights": Room({"errors", "array", "gguf", "quants", "config"}, {*ARRAYS, "tqdm"}),
    # no arrays
    "tokenizer": Room({"errors", "gguf"}, {"gguf", "tokenizers", "sentencepiece", "jinja2"}),
    "cache": Room({"errors", "config"}, {"numpy"}),  # no attention arithmetic
    "trace": Room({"errors", "array"}, {"numpy", "safetensors"}),
    "ops": Room({"errors", "array", "quants"}, ARRAYS),  # no config, cache, trace, CUDA
    # no HTTP, no files
    "cuda.runtime": Room({"errors"}, {"numpy"}, frozenset({"cupy"})),
    "cuda": Room(
        {"errors", "array", "device", "quants", "config", "weights", "cache", "ops", "cuda.runtime"},
        ARRAYS,
        frozenset({"cupy"}),
    ),
    # no files, sampling, HTTP; no cuda either: ops are handed in
    **{name: Room({"errors", "config", "weights", "cache", "trace", "ops"}, {"numpy"}) for name in MODEL_FILES},
    "models": Room({"errors", "config", "gguf", *MODEL_FILES}, set()),  # which of them a file wants
}
BELOW = set(BELOW_ENGINE) - {"gguf.cursor", "gguf.parse", "gguf.split"}
ENGINE = {*BELOW, "model", "engine"}
HUB = {"hub.names", "hub"}
MODEL = {*ENGINE, *HUB, "api"}
ROOMS = {
    **BELOW_ENGINE,
    "model": Room(BELOW - {"cuda"}, {"numpy"}),  # no engine, no hub; kernels are handed in
    "engine": Room({*BELOW, "model"}, {"numpy"}),  # no HTTP
    "hub.names": Room({"errors"}, set()),  # no network
    # no models: paths
    "hub": Room({"errors", "hub.names"}, set(), frozenset({"huggingface_hub", "httpx", "filelock", "tqdm"})),
    "api": Room({*ENGINE, "hub"}, {"numpy"}),
    FACADE: Room(MODEL, set()),
    # no HTTP
    "validate": Room(
        {FACADE, *MODEL}, {*ARRAYS, "safetensors", "yaml", "rich", "jinja2"}, frozenset({"cupy", "llama_cpp"})
    ),
    # pytest loads this in every suite where refengine is installed: light until the fixture is called.
    "validate.pytest_plugin": Room({FACADE, *MODEL, "validate"}, {"pytest", "rich"}),
    "worker": Room(
        {FACADE, *MODEL},
        {
            "numpy",
            "tqdm",
            "fastapi",
            "h11",
            "starlette",
            "uvicorn",
            "pydantic",
            "pydantic_core",  # of the same project, for errors of our own
            "prometheus_client",
            "swagger_ui_bundle",
            "threadpoolctl",
        },
    ),
    "client.events": Room({"errors"}, {"httpx_sse"}),  # no connections
    "client": Room({"errors", "client.events"}, {"httpx", "httpx_sse"}),
    "bench": Room({FACADE, *MODEL, "worker", "client", "client.events"}, {"numpy", "rich"}),
    # no HTTP
    "bench.speed": Room({FACADE, *MODEL, "validate", "bench"}, {"numpy", "rich", "jinja2"}, frozenset({"matplotlib"})),
    "cli.console": Room({FACADE, *MODEL, "validate"}, {*ARRAYS, "tqdm"}),
    # One file a command.
    "cli.generate": Room({"errors", *ENGINE, "cli.console"}, set()),
    "cli.logits": Room({"cli.console"}, {"numpy"}),
    "cli.trace": Room({FACADE, "errors", "trace", "validate", "cli.console"}, {"numpy", "safetensors"}),
    "cli.tokenize": Room({"errors", "gguf", "tokenizer", "cli.console"}, set()),
    "cli.inspect": Room({"errors", "gguf", "models", "tokenizer", "weights", "cli.console"}, {"numpy"}),
    "cli.validate": Room({FACADE, *MODEL, "validate", "cli.console"}, {"tqdm", "rich"}),
    "cli.serve": Room({FACADE, *MODEL, "worker"}, set()),
    "cli.compile": Room(
        {"errors", "device", "cuda", "cuda.runtime", "gguf", "models", "weights", "cli.console"}, {"tqdm"}
    ),
    "cli.ask": Room({"errors", "client", "client.events", "cli.console"}, set()),
    "cli.bench": Room({"errors", "worker", "client", "bench", "cli.console"}, {"rich"}),
    "cli.bench_speed": Room({"errors", "ops", "bench.speed", "cli.console"}, {"rich"}),
    "cli.dump_header": Room(set(), set()),
    # arguments only
    "cli.arguments": Room(set(), set()),
    "cli.worker_arguments": Room({"cli.arguments"}, set()),
    "cli": Room(
        {
            FACADE,
            "errors",
            "worker",  # what is to be there before libraries
            "cli.arguments",
            "cli.worker_arguments",
            "cli.validate",
            "cli.serve",
            "cli.ask",
            "cli.bench",
            "cli.bench_speed",
            "cli.dump_header",
            "cli.compile",
        },
        set(),
    ),
    "__main__": Room({"cli"}, set()),
}

# Standard modules that only some rooms may know; every other one is free.
HTTP_ROOMS = {"worker", "bench"}
RESERVED_STDLIB = {
    # For the type of what the parser gives.
    "argparse": {name for name in ROOMS if name.partition(".")[0] == "cli"},
    "mmap": {name for name in ROOMS if name.partition(".")[0] == "gguf"},
    "http": HTTP_ROOMS,
    "urllib": HTTP_ROOMS,
    "socket": HTTP_ROOMS,
    "socketserver": HTTP_ROOMS,
    "wsgiref": HTTP_ROOMS,
}


@dataclass(frozen=True)
class Import:
    """One imported name, dotted and absolute, and whether importing the module runs the import."""

    name: str
    line: int
    at_import: bool


def room_of(path: Path) -> str:
    """The room of a file of refengine/."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return room_of_module(parts if parts == (FACADE,) or parts[-1] != "__init__" else parts[:-1])


def room_of_module(parts: Sequence[str]) -> str:
    """The longest name of a room that fits a module below refengine; else its first part, or the facade."""
    for n in range(len(parts), 0, -1):
        if ".".join(parts[:n]) in ROOMS:
            return ".".join(parts[:n])
    return parts[0] if parts else FACADE


def imports_of(source: str, path: Path) -> Iterator[Import]:
    """All imports of a module, `import_module("literal")` and `__import__("literal")` included."""
    package = ("refengine", *path.relative_to(PACKAGE).parts[:-1])

    def visit(node: ast.AST, at_import: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_import)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield Import(f"{module}.{alias.name}", node.lineno, at_import)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = getattr(node.func, "attr", getattr(node.func, "id", None))
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield Import(node.args[0].value, node.lineno, at_import)
        if isinstance(node, ast.If) and getattr(node.test, "attr", getattr(node.test, "id", "")) == "TYPE_CHECKING":
            for statement in node.body:
                yield from visit(statement, False)
            for statement in node.orelse:
                yield from visit(statement, at_import)
            return
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_import and not is_function)

    return visit(ast.parse(source), True)


def violations(source: str, path: Path) -> list[str]:
    """One line for each import of the module that its room may not have."""
    room_name = room_of(path)
    if room_name not in ROOMS:
        return [f"{path.name}: unknown room refengine/{room_name}: add it to ROOMS, with what it may import"]
    room = ROOMS[room_name]
    found = []
    for imported in imports_of(source, path):
        where = f"{path.relative_to(ROOT)}:{imported.line}: {room_name} may not import {imported.name}"
        top, *rest = imported.name.split(".")
        names = {imported.name, ".".join([top, *rest[:1]]), top}
        if top == "refengine":
            # `from refengine import load` reaches the facade, `from refengine import errors` a room.
            target = room_of_module(rest)
            if target not in ROOMS and target not in TOP:
                target = FACADE  # a name that the facade has
            if target != room_name and target not in room.rooms:
                found.append(f"{where} (rooms it may: {', '.join(sorted(room.rooms)) or 'none'})")
        elif top in sys.stdlib_module_names:
            if room_name not in RESERVED_STDLIB.get(top, {room_name}):
                found.append(f"{where} (only {', '.join(sorted(RESERVED_STDLIB[top]))} may)")
        elif names & room.lazy_libraries:
            if imported.at_import:
                found.append(f"{where} at import time (it may inside a function)")
        elif not names & room.libraries:
            found.append(f"{where} (libraries it may: {', '.join(sorted(room.libraries)) or 'none'})")
    return found


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_every_import_is_in_the_table() -> None:
    assert modules()
    found = [line for path in modules() for line in violations(path.read_text(encoding="utf-8"), path)]
    assert not found, "\n" + "\n".join(found)


def test_the_table_points_one_way() -> None:
    seen: set[str] = set()
    for name, room in ROOMS.items():
        assert room.rooms <= seen, f"{name} may import {room.rooms - seen}, which stand after it in the table"
        assert not room.libraries & room.lazy_libraries
        seen.add(name)
    assert {name for rooms in RESERVED_STDLIB.values() for name in rooms} <= seen


def import_graph(sources: dict[str, tuple[str, Path]]) -> dict[str, set[str]]:
    """For each module, the modules of the package that it imports anywhere, in functions and for types too."""
    graph: dict[str, set[str]] = {}
    for name, (source, path) in sources.items():
        targets = set()
        for imported in imports_of(source, path):
            target = imported.name
            while target and target not in sources:  # `from a.b import name`: the longest prefix that is a module
                target = target.rpartition(".")[0]
            if target not in ("", "refengine", name):
                targets.add(target)
        graph[name] = targets
    return graph


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, the first one also at the end; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for target in sorted(graph.get(name, ())):
            if circle := visit(target, [*path, name]):
                return circle
        done.add(name)
        return []

    for name in sorted(graph):
        if circle := visit(name, []):
            return circle
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    sources = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): (
            path.read_text(encoding="utf-8"),
            path,
        )
        for path in modules()
    }
    graph = import_graph(sources)
    assert sum(map(len, graph.values())) > len(graph)
    assert circle_in(graph) == []


def test_a_planted_circle_is_found() -> None:
    lazy = "def f():\n    from refengine.engine.stop import StopMatcher"
    for_types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from refengine.engine.hooks import Hook"
    sources = {
        "refengine.engine.hooks": (lazy, PACKAGE / "engine" / "hooks.py"),
        "refengine.engine.stop": (for_types, PACKAGE / "engine" / "stop.py"),
    }
    names = sorted(sources)
    assert circle_in(import_graph(sources)) == [names[0], names[1], names[0]]


PLANTED = {
    "a later room": ("gguf/file.py", "from refengine.quants import SUPPORTED"),
    "a later room, as a module": ("cache/paged.py", "import refengine.ops.attention"),
    "a later room, from the package": ("models/llama.py", "from refengine.gguf.file import GGUFFile"),
    "a later room, relative": ("ops/norm.py", "from ..trace import Trace"),
    "a later room, relative to the package": ("ops/norm.py", "from .. import config"),
    "a later room, in a function": ("engine/scheduler.py", "def step():\n    from refengine.worker.http import app"),
    "a later room, for types only": (
        "trace.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from refengine.models import llama",
    ),
    "a later room, by name": ("quants.py", "import importlib\nimportlib.import_module('refengine.gguf.file')"),
    "the engine in a model": ("model.py", "def generate():\n    from refengine.engine.engine import Engine"),
    "the facade": ("models/llama.py", "from refengine import load"),
    "the other wing": ("validate/report.py", "from refengine.worker.jobs.job import Job"),
    "the other wing, back": ("worker/jobs.py", "from refengine.validate import compare"),
    "arguments": ("bench/latency.py", "import argparse"),
    "files in a model": ("models/llama.py", "import mmap"),
    "HTTP in the engine": ("engine/scheduler.py", "from http.server import HTTPServer"),
    "arrays in a tokenizer": ("tokenizer/bpe.py", "import numpy as np"),
    "work in the arguments": ("cli.py", "from refengine.gguf.file import GGUFFile"),
    "a library of another room": ("ops/norm.py", "import safetensors.numpy"),
    "a namespace's other package": ("tokenizer/spm.py", "from google.cloud import storage"),
    "cupy at import": ("cuda/runtime/nvrtc.py", "import cupy as cp"),
    "cupy at import, guarded": ("device.py", "try:\n    import cupy\nexcept ImportError:\n    cupy = None"),
    "cupy in a class body": ("cuda/ops.py", "class Ops:\n    import cupy"),
    "cupy in ops": ("ops/norm.py", "def f():\n    import cupy"),
    "llama.cpp at import": ("validate/peer.py", "from llama_cpp import Llama"),
    "llama.cpp in the engine": ("engine/step.py", "def f():\n    import llama_cpp"),
}
ALLOWED = {
    "rooms above": ("weights.py", "from refengine import quants\nfrom refengine.gguf.file import GGUFFile"),
    "its own room": ("ops/__init__.py", "from . import norm\nfrom .rope import rope\nimport refengine.ops.moe"),
    "cupy in a function": (
        "cuda/runtime/nvrtc.py",
        "def compile():\n    import cupy.cuda\n    from cupy import RawModule",
    ),
    "cupy for types only": ("cuda/ops.py", "import typing\nif typing.TYPE_CHECKING:\n    import cupy"),
    "the facade in the command line": ("cli/main.py", "import argparse\nimport refengine\nfrom refengine import load"),
    "the standard library": ("errors.py", "import os.path\nfrom collections.abc import Sequence"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_a_planted_violation_is_caught(case: str) -> None:
    file, source = PLANTED[case]
    assert len(violations(source, PACKAGE / file)) == 1


@pytest.mark.parametrize("case", ALLOWED)
def test_an_allowed_import_passes(case: str) -> None:
    file, source = ALLOWED[case]
    assert violations(source, PACKAGE / file) == []


def test_an_unknown_room_says_what_to_do() -> None:
    assert "unknown room refengine/gadgets: add it to ROOMS" in violations("", PACKAGE / "gadgets" / "new.py")[0]
    assert "unknown room refengine/gadget: add it to ROOMS" in violations("", PACKAGE / "gadget.py")[0]


IMPORT_ALL = """
import importlib, sys
for optional in ("cupy", "cupyx", "llama_cpp"):
    sys.modules[optional] = None  # importing it raises ImportError
for module in sys.argv[1:]:
    importlib.import_module(module)
print(len(sys.argv) - 1)
"""


def test_every_module_imports_without_cupy_and_llama_cpp() -> None:
    dotted = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in modules()]
    names = [name for name in dotted if not name.endswith("__main__")]
    command = [sys.executable, "-c", IMPORT_ALL, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == str(len(names))
