"""The rooms of the design hold: a module imports only from its own room and from those below it."""

from __future__ import annotations

import ast
from itertools import chain

import rooms
from families import FAMILIES
from rooms import MODULES, imports, layer, own_imports, tree

NO_TORCH = ["base.errors", "base.forks", "base.geometry", "base.options"]
PRIVATE = [
    "base.private_diffusers",
    "base.private_torch",
    "comm.backends",
    "datasets.private_ray",
    "kernels.gpu.gluon_patches",
]
WITHOUT_MODELS = ("base", "comm", "exact")
WITHOUT_DEVICES = ("exact", "api", "calls.target", "calls.verify")


def teardown_module() -> None:
    tree.cache_clear()  # The collector would walk over a million of nodes in all tests that follow.


def room(module: str) -> str:
    return module.split(".")[0]


def nodes(*prefixes: str) -> chain[tuple[str, ast.AST]]:
    """Every node of the modules of these rooms, with the module's name."""
    chosen = {name: path for name, path in MODULES.items() if not prefixes or name.startswith(prefixes)}
    return chain.from_iterable(((name, n) for n in ast.walk(tree(p))) for name, p in chosen.items())


def test_no_arrow_points_upward() -> None:
    upward = {
        (name, other) for name, path in MODULES.items() for other in own_imports(path) if layer(other) > layer(name)
    }
    assert not {pair for pair in upward if pair[0] != "__init__"}


def test_no_circle_of_imports() -> None:
    arrows = {name: {other for other in own_imports(path) if other in MODULES} for name, path in MODULES.items()}
    while ends := {name for name, others in arrows.items() if not others & arrows.keys() - {name}}:
        arrows = {name: others for name, others in arrows.items() if name not in ends}
    assert not arrows, f"these import each other: {sorted(arrows)}"


def test_at_most_seventeen_things_at_the_top() -> None:
    assert len({room(name) for name in MODULES}) <= 17
    assert all(ast.get_docstring(tree(path)) for path in MODULES.values() if path.name != "__main__.py")


def test_a_name_stands_for_one_thing() -> None:
    """A command may have the name of what it commands."""
    files = [name.split(".")[-1] for name in MODULES if "." in name and room(name) != "cli"]
    assert not {name for name in files if files.count(name) > 1}
    classes = [node.name for name, node in nodes() if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    assert not {name for name in classes if classes.count(name) > 1}


def test_asserts_only_narrow_types() -> None:
    """`python -O` leaves them out: what keeps a wrong picture from coming out is raised."""
    for name, node in nodes():
        if isinstance(node, ast.Assert):
            text = ast.unparse(node.test)
            assert "isinstance(" in text or text.endswith("is not None"), f"{name}: assert {text}"


def test_doors() -> None:
    """Only comm knows torch.distributed; the lowest modules need no torch; exact and tiles don't know each other."""
    users = {name for name, path in MODULES.items() if any(m.startswith("torch.distributed") for m in imports(path))}
    assert {room(user) for user in users} == {"comm"}
    for low in NO_TORCH:
        assert not {m for m in imports(MODULES[low]) if m.split(".")[0] in ("torch", "diffusers")}
    for name, path in MODULES.items():
        for one, other in (("exact", "tiles"), ("tiles", "exact")):
            assert room(name) != one or not {m for m in own_imports(path) if room(m) == other}, name


def test_private_names_of_libraries_have_doors() -> None:
    """As far as it can be seen: operators (`torch.ops`) have schemas, and Python has two."""
    own = {"_at_fork_reinit", "_exit"}
    for _, node in nodes():
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Store):
            own.add(node.attr if isinstance(node, ast.Attribute) else node.id)
    for name, path in MODULES.items():
        if name in PRIVATE:
            continue
        assert "reportPrivateUsage" not in path.read_text(), name
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                text = ast.unparse(node)
                assert node.attr in own or text.startswith("torch.ops."), f"{name}: {text}"
        for module in imports(path):
            assert module.startswith("halovae") or "._" not in module or "__" in module, f"{name}: {module}"


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
    for name, node in nodes(*WITHOUT_MODELS):
        label = next((getattr(node, field) for field in ("id", "attr", "name", "arg") if hasattr(node, field)), None)
        if isinstance(label, str):
            assert label.lower() not in models, f"{name} names {label}"
            assert not words & set(label.lower().split("_")), f"{name} names {label}"


def test_the_package_has_no_accelerator_name_outside_comm() -> None:
    """Devices come from torch.accelerator; "cuda" may stand in a docstring's example only."""
    for name, node in nodes(*WITHOUT_DEVICES):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not node.value.startswith("cuda") or name == "exact.rules.elementwise", name


def test_the_docs_show_the_rooms() -> None:
    assert rooms.is_current(rooms.shown_table(), rooms.table()), "run: python tools/rooms.py --write"
    assert rooms.is_current(rooms.PICTURE.read_text(), rooms.picture()), "run: python tools/rooms.py --write"


def test_a_wheel_has_every_file_that_is_no_code() -> None:
    lines = (rooms.ROOT / "pyproject.toml").read_text().splitlines()
    line = next(line for line in lines if line.startswith("halovae = ["))
    patterns = ast.literal_eval(line.partition("=")[2].strip())
    listed = {path for pattern in patterns for path in rooms.SOURCE.glob(pattern)}
    files = {path for path in rooms.SOURCE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert not files - listed
