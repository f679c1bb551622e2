"""The floors of the house: a file imports only from lower floors or its own wing."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import crossguard

SOURCE = Path(crossguard.__file__).parent

PICTURE = re.findall(
    r"^(\d)  (.+)$", (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(), re.MULTILINE
)

FLOORS = {name: int(floor) for floor, names in PICTURE for name in names.partition("#")[0].split()}

# These look names up in the vocabulary, which is not a module that they depend on.
VOCABULARY = {"words", "signatures", "report", "experiment", "cli"}


def place(module: str) -> tuple[str, int]:
    """The wing of a module (its folder, or itself) and the floor."""
    wing = module.split(".")[0]
    assert wing in FLOORS, f"{module} has no floor; give it one in docs/architecture.md"
    return wing, FLOORS[wing]


def imports(path: Path) -> set[str]:
    """The modules of this package that a file imports, wherever in it, without the package's name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            if node.module == "crossguard":
                named = {alias.name for alias in node.names} - {"__version__"}
                found |= {f"crossguard.{name}" if (SOURCE / f"{name}.py").exists() else "crossguard" for name in named}
            else:
                found.add(node.module or "")
    return {name.removeprefix("crossguard").removeprefix(".") for name in found if name.split(".")[0] == "crossguard"}


def modules() -> list[str]:
    paths = [path.relative_to(SOURCE) for path in SOURCE.rglob("*.py") if "assets" not in path.parts]
    return sorted(".".join(path.with_suffix("").parts) for path in paths if str(path) != "__init__.py")


def test_the_picture_shows_what_is_there():
    assert set(FLOORS) == {module.split(".")[0] for module in modules()}
    assert sorted(set(FLOORS.values())) == list(range(8))


def test_imports_point_down():
    wrong = []
    for module in modules():
        wing, floor = place(module)
        for name in imports(SOURCE / f"{module.replace('.', '/')}.py"):
            if not name:
                if wing not in VOCABULARY:
                    wrong.append(f"{module} (floor {floor}) imports the whole package")
                continue
            other, below = place(name)
            same_floor = below == floor and floor not in (2, 3)
            if not (below < floor or other == wing or same_floor):
                wrong.append(f"{module} (floor {floor}) imports {name} (floor {below})")
    assert not wrong, "\n".join(wrong)


def test_modules_of_a_floor_do_not_import_each_other_in_a_circle():
    edges = {module: imports(SOURCE / f"{module.replace('.', '/')}.py") - {""} for module in modules()}
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"a circle: {' -> '.join((*trail, module))}"
        if module not in done:
            for other in edges.get(module, ()):
                walk(other, (*trail, module))
            done.add(module)

    for module in edges:
        walk(module, ())
