"""Which module imports which, and the drawing of it in docs/architecture.md.

``python docs/package_graph.py`` writes the drawing anew. An import counts wherever it stands, in a
function too, and so does a string that names a module, as in the table of commands; what only a
type checker sees does not count.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
ORDER = (
    "teacher_cache.errors",
    "teacher_cache.extras",
    "teacher_cache.own_code",
    "teacher_cache.rng",
    "teacher_cache.locations",
    "teacher_cache.format",
    "teacher_cache.media",
    "teacher_cache.storage",
    "teacher_cache.sources",
    "teacher_cache.targets",
    "teacher_cache.views",
    "teacher_cache.label_sets",
    "teacher_cache.labeling",
    "teacher_cache.tools",
    "teacher_cache.api",
    "trainer.recipes",
    "trainer.config",
    "trainer.loss_inputs",
    "trainer.losses",
    "trainer.metrics",
    "trainer.optim",
    "trainer.distributed",
    "trainer.models",
    "trainer.data",
    "trainer.methods",
    "trainer.results",
    "trainer.loop",
    "trainer.api",
    "trainer.paper",
    "server.settings",
    "server.run_folder",
    "server.http",
    "server.metrics",
    "server.compute",
    "server.rows",
    "server.state",
    "server.pages",
    "server.routes",
    "server.app",
    "server.run",
    "benchmarks",
    "cli.help",
    "cli.completion",
    "cli.output",
    "cli.locations",
    "cli.known",
    "cli.labels",
    "cli.training",
    "cli.serving",
    "cli.main",
)
"""Folders and modules beside them; each may import from those before it."""

Graph = dict[str, set[str]]
"""Each module, without ``sskt.``, and the modules that it imports."""

_MODULE = re.compile(r"(sskt(?:\.[a-z_0-9]+)+)(?::\w+)?")
_MARKS = "<!-- package graph -->\n", "<!-- end of package graph -->\n"


def module_name(path: Path, root: Path = ROOT) -> str:
    """``teacher_cache.format.spec`` of its file."""
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def module_graph(root: Path = ROOT) -> Graph:
    """All modules of the five packages, and what they import of each other.

    Raises:
        ValueError: If a module has a relative import.
    """
    packages = ("teacher_cache", "trainer", "server", "cli", "benchmarks")
    files = {module_name(p, root): p for f in packages for p in sorted((root / f).rglob("*.py"))}
    return {name: imports(path, files) - {name} for name, path in files.items()}


def imports(path: Path, known: Iterable[str]) -> set[str]:
    """The modules of ``known`` that a file imports or names. Raises ``ValueError``."""
    modules = set(known)
    packages = {name.rpartition(".")[0] for name in modules}
    names: set[str] = set()
    for node in _seen_at_run_time(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}: relative import in line {node.lineno}")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = _MODULE.fullmatch(node.value)
            names |= {named[1]} if named and named[1][5:] in modules - packages else set()
    found = set()
    for name in (n.removeprefix("sskt.") for n in names if n.startswith("sskt.")):
        found |= {name} & modules or {name.rpartition(".")[0]} & modules
    return found


def _seen_at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        for other in node.orelse:
            yield from _seen_at_run_time(other)
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _seen_at_run_time(child)


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Modules that import each other, directly or not: each circle sorted, smallest first."""
    reached: dict[str, set[str]] = {}
    for name in graph:
        todo, seen = [name], set[str]()
        while todo:
            for target in graph[todo.pop()] - seen:
                seen.add(target)
                todo.append(target)
        reached[name] = seen
    found = {
        tuple(sorted(n for n in reached[name] if name in reached[n]))
        for name in graph
        if name in reached[name]
    }
    return sorted(map(list, found), key=lambda c: (len(c), c))


def place_of(module: str) -> str:
    """The entry of ``ORDER`` that a module belongs to; empty if there is none."""
    return next((e for e in ORDER if module == e or module.startswith(f"{e}.")), "")


def upward(graph: Mapping[str, set[str]]) -> list[str]:
    """Imports against ``ORDER``, and of a module that is in no folder of it."""
    wrong = []
    for module, targets in graph.items():
        here = place_of(module)
        if not here and targets:
            wrong.append(f"{module} is in no folder of ORDER")
        for target in sorted(targets):
            there = place_of(target)
            downward = bool(there) and bool(here) and ORDER.index(there) <= ORDER.index(here)
            top, other = module.partition(".")[0], target.partition(".")[0]
            if not downward or {top, other} == {"trainer", "server"}:
                wrong.append(f"{module} imports {target}")
    return wrong


def package_graph(graph: Mapping[str, set[str]]) -> Graph:
    """The folders and which others they import, without what follows from the rest.

    An arrow that a longer way replaces is left out: if ``a`` imports ``b`` and ``c``, and ``b``
    imports ``c``, only the first of the two is drawn.
    """
    direct: Graph = {entry: set() for entry in ORDER}
    for module, targets in graph.items():
        here = place_of(module)
        if here:
            direct[here] |= {place_of(t) for t in targets} - {here, ""}
    below: Graph = {}
    for entry in ORDER:
        below[entry] = direct[entry].union(*(below[t] for t in direct[entry]))
    return {
        entry: {t for t in targets if not any(t in below[o] for o in targets - {t})}
        for entry, targets in direct.items()
    }


def drawing(graph: Mapping[str, set[str]]) -> str:
    """The packages as a Mermaid flowchart; a box has the number of its modules."""
    sizes = {e: sum(place_of(m) == e and not _is_package(m, graph) for m in graph) for e in ORDER}
    lines = ["```mermaid", "flowchart TD"]
    for top in dict.fromkeys(entry.partition(".")[0] for entry in reversed(ORDER)):
        lines.append(f"  subgraph {top}")
        for entry in reversed(ORDER):
            if entry.partition(".")[0] == top:
                label = entry.partition(".")[2] or entry
                count = f" ({sizes[entry]})" if sizes[entry] > 1 else ""
                lines.append(f'    {_id(entry)}["{label}{count}"]')
        lines.append("  end")
    packages = package_graph(graph)
    for entry in reversed(ORDER):
        for target in sorted(packages[entry], key=ORDER.index, reverse=True):
            lines.append(f"  {_id(entry)} --> {_id(target)}")
    return "\n".join([*lines, "```"]) + "\n"


def _id(entry: str) -> str:
    return entry.replace(".", "_") + ("_" if "." not in entry else "")


def _is_package(module: str, graph: Mapping[str, set[str]]) -> bool:
    return any(name.startswith(f"{module}.") for name in graph)


def drawn(page: str, graph: Mapping[str, set[str]]) -> str:
    """The page with the drawing between its two marks. Raises ``ValueError`` if one is missing."""
    begin, end = (page.index(mark) for mark in _MARKS)
    return page[: begin + len(_MARKS[0])] + drawing(graph) + page[end:]


def main() -> int:
    """Writes the drawing into the page."""
    PAGE.write_text(drawn(PAGE.read_text(), module_graph()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
