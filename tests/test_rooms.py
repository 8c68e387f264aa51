"""Rooms and words: no import leads back to where it came from, no folder is crowded, a public name has one meaning.

import-linter holds the floors (pyproject.toml), but takes no notice of a circle inside a floor. Reference: a search along
all imports, those under TYPE_CHECKING and inside functions included.
"""

import ast
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from visionloom.tests.sources import Source, parsed, sources

MOST_MODULES = 20
"""Modules in one folder that a newcomer can still choose among."""


def imports_of(source: Source, modules: set[str]) -> set[str]:
    """The modules that a file imports, wherever in it that stands."""
    imported: set[str] = set()
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from package import module` leads to the module, and not to all of its package
            below = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            imported |= below or {node.module}
    return (imported & modules) - {source.module}


def circles(imports: Mapping[str, set[str]]) -> list[str]:
    """The modules that can be reached from themselves."""
    return sorted(start for start in imports if start in _reached_from(start, imports))


def _reached_from(start: str, imports: Mapping[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    waiting = list(imports[start])
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += imports[module]
    return reached


def graph(files: Iterable[Source]) -> dict[str, set[str]]:
    """Who imports whom."""
    files = list(files)
    modules = {source.module for source in files}
    return {source.module: imports_of(source, modules) for source in files}


def test_no_import_leads_back() -> None:
    assert circles(graph(sources())) == []


def test_a_circle_is_noticed_where_it_hides() -> None:
    hidden = [
        parsed("train/a.py", "if TYPE_CHECKING:\n    from visionloom.train.b import B\n"),
        parsed("train/b.py", "def late() -> None:\n    from visionloom.train import c\n"),
        parsed("train/c.py", "import visionloom.train.a\n"),
        parsed("train/d.py", "from visionloom.train.a import A\n"),
    ]
    modules = ["visionloom.train.a", "visionloom.train.b", "visionloom.train.c"]
    assert circles(graph(hidden)) == modules


def test_no_folder_is_crowded() -> None:
    modules = Counter(
        source.path.rpartition("/")[0]
        for source in sources()
        if not source.path.endswith("__init__.py")
    )
    assert {folder: count for folder, count in modules.items() if count > MOST_MODULES} == {}


def public_types(source: Source) -> set[str]:
    """Classes and type aliases of a file's top level, and type variables that are not private."""
    names = set()
    for node in source.tree.body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.TypeAlias):
            names.add(node.name.id)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name[:1].isupper() and not name.isupper():
                names.add(name)
    return {name for name in names if not name.startswith("_")}


def test_a_public_type_has_one_meaning() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for source in sources():
        for name in public_types(source):
            places[name].append(source.path)
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_no_variable_is_a_participle() -> None:
    """`found` and `told` say how a value came about and not what it is; they were the commonest names of the code."""
    places = [
        f"{source.path}:{node.lineno}"
        for source in sources()
        for node in ast.walk(source.tree)
        if (
            (isinstance(node, ast.Name) and node.id in ("found", "told"))
            or (isinstance(node, ast.arg) and node.arg in ("found", "told"))
        )
    ]
    assert places == []
