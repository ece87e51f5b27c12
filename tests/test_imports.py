"""Imports point one way: every module may use what stands left of it, and nothing goes round in a circle.

    errors registry config_files files stop_words < selection architecture < policies < relevance < cache
    < eviction remembered masked plan observers attention probe < models generation factory < metrics benchmarks
    < config < training < evaluation < reporting < cli

Imports inside functions count too: they hide a wrong direction only from the interpreter.
"""

from __future__ import annotations

import ast
from pathlib import Path

import sparsekv

ROOT = Path(sparsekv.__file__).parent

ORDER: tuple[tuple[str, ...], ...] = (
    ("errors", "registry", "config_files", "files", "stop_words"),
    ("selection", "architecture"),
    ("policies",),
    ("relevance",),
    ("cache",),
    ("eviction", "remembered", "masked", "plan", "observers", "attention", "probe"),
    ("models", "generation", "factory"),
    ("metrics", "benchmarks"),
    ("config",),
    ("training",),
    ("evaluation",),
    ("reporting",),
    ("cli",),
)
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}

ALLOWED: dict[tuple[str, str], str] = {
    (
        "benchmarks.spec",
        "benchmarks",
    ): "a config asks its benchmark to check it; the package fills the registry",
    (
        "policies.presses",
        "policies.as_press",
    ): "to kvpress and back: a press made of our policy unwraps to it",
}
"""(importing module, imported module) -> why it may point the other way. Kept short."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def type_checking_blocks(tree: ast.Module) -> set[ast.AST]:
    """Everything under `if TYPE_CHECKING:`, which never runs."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            found.update(inner for statement in node.body for inner in ast.walk(statement))
    return found


def imports_of(name: str) -> set[str]:
    """Modules of the package that a module imports, at its top or inside functions."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    skipped = type_checking_blocks(tree)
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import of {node.module}"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    inside = {full.removeprefix("sparsekv.") for full in found if full.startswith("sparsekv.")}
    return {known for full in inside if (known := longest_module(full)) is not None and known != name}


def longest_module(full: str) -> str | None:
    """The module behind "package.module.name"; None for a name of the package itself (its version)."""
    while full:
        if full in MODULES:
            return full
        full = full.rpartition(".")[0]
    return None


GRAPH = {name: imports_of(name) for name in MODULES}


def top(name: str) -> str:
    return name.partition(".")[0]


def test_every_module_has_a_place_in_the_order() -> None:
    unplaced = {top(name) for name in MODULES} - set(RANK) - {""}
    assert not unplaced, f"give them a place in ORDER: {sorted(unplaced)}"


def test_imports_point_one_way() -> None:
    wrong = [
        f"{importer} imports {imported}"
        for importer, targets in GRAPH.items()
        for imported in targets
        if importer
        and top(importer) != top(imported)
        and RANK[top(imported)] > RANK[top(importer)]
        and (importer, imported) not in ALLOWED
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_is_reached_from_itself() -> None:
    def circle_from(start: str) -> list[str] | None:
        stack, seen = [(start, [start])], set()
        while stack:
            name, path = stack.pop()
            for imported in sorted(GRAPH[name]):
                if (name, imported) in ALLOWED:
                    continue
                if imported == start:
                    return [*path, start]
                if imported not in seen:
                    seen.add(imported)
                    stack.append((imported, [*path, imported]))
        return None

    circles = {tuple(sorted(set(circle))): circle for name in GRAPH if (circle := circle_from(name))}
    assert not circles, "\n".join(" -> ".join(circle) for circle in circles.values())


def test_every_allowed_exception_is_still_needed() -> None:
    unused = [pair for pair in ALLOWED if pair[1] not in GRAPH.get(pair[0], set())]
    assert not unused


def test_the_leaves_import_no_torch_and_nothing_of_the_project() -> None:
    for name in ("errors", "registry", "config_files", "stop_words"):
        text = MODULES[name].read_text(encoding="utf-8")
        assert "import torch" not in text
        assert GRAPH[name] <= {"errors"}
