"""The layers of the design hold: a module imports only what lies below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from families import FAMILIES

SOURCE = Path(__file__).parents[1] / "src" / "halovae"
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}

ROOMS = ["base", "comm", "kernels", "exact", "calls", "tiles", "predict", "api"]
ROOMS += ["media", "evaluation", "pipelines", "app", "serve", "__init__", "cli", "__main__"]
"""From the lowest to the highest: a module imports from its own room and from those before it."""


def layer(module: str) -> int:
    return ROOMS.index(module.split(".")[0])


def imports(path: Path) -> set[str]:
    """Full names of imported modules, wherever the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return found


def own_imports(path: Path) -> set[str]:
    names = {name.removeprefix("halovae.") for name in imports(path) if name.startswith("halovae.")}
    return {name for name in names if name in MODULES or name.split(".")[0] in MODULES}


PATHS = [pytest.param(name, path, id=name) for name, path in MODULES.items() if name != "__init__"]


@pytest.mark.parametrize(("name", "path"), PATHS)
def test_a_module_imports_nothing_from_above(name: str, path: Path) -> None:
    above = {other for other in own_imports(path) if layer(other) > layer(name)}
    assert not above, f"{name} (layer {layer(name)}) imports {above}"


def test_asserts_only_narrow_types() -> None:
    """`python -O` leaves them out: what keeps a wrong picture from coming out is raised."""
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assert):
                text = ast.unparse(node.test)
                assert "isinstance(" in text or text.endswith("is not None"), f"{name}: assert {text}"


def test_exact_and_tile_do_not_import_each_other() -> None:
    for name, path in MODULES.items():
        for one, other in (("exact", "tiles"), ("tiles", "exact")):
            if name.split(".")[0] == one:
                assert not {m for m in own_imports(path) if m.split(".")[0] == other}, name


def test_only_comm_imports_torch_distributed() -> None:
    users = {name for name, path in MODULES.items() if any(m.startswith("torch.distributed") for m in imports(path))}
    assert {user.split(".")[0] for user in users} == {"comm"}


@pytest.mark.parametrize("low", ["base.errors", "base.forks", "base.geometry", "base.options"])
def test_the_lowest_layer_needs_no_torch(low: str) -> None:
    assert not {m for m in imports(MODULES[low]) if m.split(".")[0] in ("torch", "diffusers")}


def test_exact_mode_knows_no_model() -> None:
    """Not in code; a comment or docstring may say which model made a rule necessary."""
    models = {family.model.lower() for family in FAMILIES.values()}
    words = {
        "wan",
        "hunyuan",
        "cogvideo",
        "mochi",
        "ltx",
        "cosmos",
        "qwen",
        "flux",
        "magvit",
        "vidtok",
        "kvae",
        "allegro",
    }
    for name, path in MODULES.items():
        if name.split(".")[0] not in ("base", "exact", "comm"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            label = next(
                (getattr(node, field) for field in ("id", "attr", "name", "arg") if hasattr(node, field)), None
            )
            if isinstance(label, str):
                lowered = label.lower()
                assert lowered not in models, f"{name} names {label}"
                assert not any(word in lowered.split("_") for word in words), f"{name} names {label}"


def test_the_package_has_no_accelerator_name_outside_comm() -> None:
    """Devices come from torch.accelerator; "cuda" may stand in a docstring's example only."""
    for name, path in MODULES.items():
        if name.split(".")[0] not in ("exact", "api") and name not in ("calls.target", "calls.verify"):
            continue
        tree = ast.parse(path.read_text())
        texts = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        assert not [text for text in texts if text.startswith("cuda") and name != "exact.rules.elementwise"], name
