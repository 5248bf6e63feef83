"""How is the house kept? Numbers of a source tree, read without importing it.

    python -m lib.house                            this tree; needs PYTHONPATH=benchmarks
    python -m lib.house --root ../other --tests    another one, and how many tests pytest finds there
    python -m lib.house --record after             all of it, start-up and walks (lib/walk.py) too, to a file

Files a folder, lines a room, import cycles, imports that go up a layer (the layers are import-linter's
contracts in pyproject.toml), length of functions, settings of a run, bytes of the README.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("pipeline", "model", "kernels", "train")
Edges = dict[str, set[str]]
"""Imported modules by importing module, dotted and below the package."""


def source_files(root: Path) -> list[Path]:
    """Python files of the rooms."""
    return sorted(path for room in ROOMS for path in (root / room).rglob("*.py"))


def files_by_folder(root: Path) -> dict[str, int]:
    """Source files that lie side by side, without `__init__` and `__main__`."""
    counts: dict[str, int] = {}
    for path in source_files(root):
        if not path.stem.startswith("__"):
            folder = str(path.parent.relative_to(root))
            counts[folder] = counts.get(folder, 0) + 1
    return counts


def lines_by_room(root: Path) -> dict[str, int]:
    """Lines of Python."""
    counts = dict.fromkeys(ROOMS, 0)
    for path in source_files(root):
        counts[path.relative_to(root).parts[0]] += len(path.read_text("utf-8").splitlines())
    return counts


def module_name(path: Path, root: Path) -> str:
    """Dotted name below the package: 'pipeline.loader'."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(root: Path) -> Edges:
    """Imports between the rooms' modules, those inside functions too, those for type checkers not."""
    names = {module_name(path, root) for path in source_files(root)}
    edges: Edges = {}
    for path in source_files(root):
        found = edges.setdefault(module_name(path, root), set())
        for dotted in _imported(ast.parse(path.read_text("utf-8"))):
            # `from package import name` names a module or a thing in one.
            module = dotted if dotted in names else dotted.rpartition(".")[0]
            if module in names and module != module_name(path, root):
                found.add(module)
    return edges


def _imported(node: ast.AST) -> Iterator[str]:
    """What a tree imports from our package, dotted below the package."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and not node.level:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    yield from (name.removeprefix("cmae.") for name in names if name.startswith("cmae."))
    for child in ast.iter_child_nodes(node):
        yield from _imported(child)


def cycles(edges: Edges) -> list[list[str]]:
    """Import cycles, one after another: each found one is broken at its last edge, and the search goes on."""
    left = {module: set(targets) for module, targets in edges.items()}
    found = []
    while True:
        try:
            TopologicalSorter(left).prepare()
        except CycleError as error:
            # graphlib lists a cycle against the arrows: each name is imported by the one after it.
            cycle = error.args[1]
            found.append(cycle)
            left[cycle[1]].discard(cycle[0])
        else:
            return found


def read_layers(root: Path) -> dict[str, list[list[str]]]:
    """Layers by container, the highest first, from the contracts of import-linter."""
    linter = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    layers: dict[str, list[list[str]]] = {}
    for contract in linter["contracts"]:
        if contract["type"] != "layers":
            continue
        rows = [re.split(r"\s*[|:]\s*", row) for row in contract["layers"]]
        for container in contract.get("containers", ["cmae"]):
            name = container.removeprefix("cmae").lstrip(".")
            layers[name] = [[item.removeprefix("cmae.") for item in row] for row in rows]
    return layers


def upward(
    edges: Edges, layers: Mapping[str, list[list[str]]], homes: Mapping[str, str] = {}
) -> list[tuple[str, str]]:
    """Imports of a module in a higher layer of the same container.

    Args:
        edges: Imports between modules.
        layers: Layers by container.
        homes: Today's name of a module, for a tree that is older than the layers.
    """
    found = []
    for module, targets in edges.items():
        for target in sorted(targets):
            ends = (homes.get(module, module), homes.get(target, target))
            if any(_goes_up(ends, container, rows) for container, rows in layers.items()):
                found.append((module, target))
    return found


def _goes_up(ends: tuple[str, str], container: str, rows: list[list[str]]) -> bool:
    heights = [_height(end, container, rows) for end in ends]
    return None not in heights and heights[1] < heights[0]


def _height(module: str, container: str, rows: list[list[str]]) -> int | None:
    """Number of the layer that a module lies in, 0 the highest."""
    prefix = f"{container}." if container else ""
    if not module.startswith(prefix):
        return None
    child = module.removeprefix(prefix).split(".")[0]
    return next((number for number, row in enumerate(rows) if child in row), None)


def count_settings(root: Path) -> int:
    """Settings of a run: fields of `Config` and of every dataclass below it."""
    classes = {
        node.name: node
        for path in source_files(root)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
    }
    return _count_fields("Config", classes)


def _count_fields(name: str, classes: Mapping[str, ast.ClassDef]) -> int:
    total = 0
    for base in classes[name].bases:
        if ast.unparse(base) in classes:
            total += _count_fields(ast.unparse(base), classes)
    for line in classes[name].body:
        if isinstance(line, ast.AnnAssign):
            words = re.findall(r"\w+", ast.unparse(line.annotation))
            inner = next((word for word in words if word in classes), None)
            total += _count_fields(inner, classes) if inner else 1
    return total


def function_lines(root: Path) -> list[int]:
    """Lines of every function."""
    return [
        node.end_lineno - node.lineno + 1
        for path in source_files(root)
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]


def count_tests(root: Path) -> int:
    """Tests that pytest finds; torch is imported for it."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    # pytest's configuration asks for a quiet listing, and this is a second -q: one line a file.
    return sum(int(count) for count in re.findall(r"^tests/\S+: (\d+)$", done.stdout, re.MULTILINE))


def measure(root: Path, homes: Mapping[str, str] = {}, layers: Any = None) -> dict[str, Any]:
    """All numbers of a tree, but for its tests."""
    folders, edges, lengths = files_by_folder(root), imports(root), function_lines(root)
    widest = max(folders, key=lambda folder: folders[folder])
    return {
        "source files": sum(folders.values()),
        "folders": len(folders),
        "files a folder, median": statistics.median(folders.values()),
        "files in the widest folder": f"{folders[widest]} ({widest})",
        "folders above ten files": sum(count > 10 for count in folders.values()),
        "import cycles": len(cycles(edges)),
        "imports that go up": len(upward(edges, layers or read_layers(root), homes)),
        **{f"lines of {room}": lines for room, lines in lines_by_room(root).items()},
        "lines, all rooms": sum(lines_by_room(root).values()),
        "lines a function, median": statistics.median(lengths),
        "functions above 50 lines": f"{sum(n > 50 for n in lengths) / len(lengths):.1%}",
        "settings of a run": count_settings(root),
        "bytes of the README": (root / "README.md").stat().st_size,
    }


def measure_start(packages: Path, reader: str) -> dict[str, Any]:
    """What a process loads that only wants to read a tar, and what the help texts cost.

    Args:
        packages: Folder in which the package `cmae` lies.
        reader: Module that walks through tars.
    """
    environment = {**os.environ, "PYTHONPATH": str(packages), "PYTHONSAFEPATH": "1"}
    # The kernel's own peak: that of getrusage begins with the parent's.
    code = (
        f"import json, re, sys, {reader}; status = open('/proc/self/status').read()\n"
        "ours = [name for name in sys.modules if name.startswith('cmae.')]\n"
        "print(json.dumps([len(ours), int(re.search(r'VmHWM:\\s+(\\d+)', status)[1]) // 1024]))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    modules, mib = json.loads(done.stdout)
    found = {"modules loaded to read a tar": modules, "MiB to read a tar": mib}
    for words in ([], ["shards", "index"], ["pretrain"]):
        command = [sys.executable, "-m", "cmae.train", *words, "--help"]
        before = os.times().children_user
        subprocess.run(command, env=environment, capture_output=True, check=True)
        name = " ".join(["CPU-s of cmae", *words, "--help"])
        found[name] = round(os.times().children_user - before, 1)
    return found


def walk_sizes(walks: Mapping[str, Mapping[str, list[str]]]) -> dict[str, int]:
    """Files and functions of the walks, as rows of the result."""
    return {
        f"{what} that a {name} enters": count
        for name, walk in walks.items()
        for what, count in (("files", len(walk)), ("functions", sum(map(len, walk.values()))))
    }


def record(label: str, numbers: Mapping[str, Any], revision: str) -> Path:
    """Write a result file; docs/design/0018-walls.md shows those labelled 'before' and 'after'."""
    from lib.results import write_result

    rows = [{"measure": name, "value": value} for name, value in numbers.items()]
    return write_result("house", label=label, config={"revision": revision}, rows=rows)


def record_this_tree(label: str) -> Path:
    """All numbers of this tree, as a result file."""
    from lib.walk import trace_this_tree

    from cmae.train.bench.harness import describe_machine

    numbers = measure(ROOT) | {"tests collected": count_tests(ROOT)}
    numbers |= measure_start(ROOT / ".package", "cmae.pipeline.formats.tar")
    return record(label, numbers | walk_sizes(trace_this_tree()), describe_machine()["git"])


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--tests", action="store_true", help="count the tests too")
    parser.add_argument("--record", metavar="LABEL", help="write a result file of this tree")
    arguments = parser.parse_args()
    if arguments.record:
        record_this_tree(arguments.record)
        return 0
    numbers = measure(arguments.root.resolve())
    if arguments.tests:
        numbers["tests collected"] = count_tests(arguments.root)
    for name, value in numbers.items():
        print(f"{name:<28} {value}")
    edges = imports(arguments.root)
    for cycle in cycles(edges):
        print("cycle:", " <- ".join(cycle))
    for module, target in upward(edges, read_layers(arguments.root)):
        print(f"up: {module} imports {target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
