"""The house: floors, rooms, and what stands in one place alone. What each is for: CONTRIBUTING.md."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

from medssl.datasets import registry

ROOT = Path(__file__).resolve().parent.parent
# From the ground up; rooms that stand beside each other share a floor. Modules beside setup.py have their own rooms.
FLOORS = (
    ("errors", "files", "locks", "markup", "processes"), ("views",), ("reading",), ("datasets",), ("engine",),
    ("models", "losses"), ("tasks",), ("preprocess",), ("scripts",), ("study",), ("compare", "demo"),
    ("benchmarks", "docs"),
)  # fmt: skip
LEVEL = {room: level for level, floor in enumerate(FLOORS) for room in floor}
LONGEST, LONGEST_LOOP = 80, 100
LONG = {  # functions that may be longer than others, and why
    ("datasets/phantoms/radiograph.py", "_expose"): "a drawing, one structure of the chest after the other",
    ("datasets/phantoms/ct.py", "render"): "a drawing, one structure of the chest after the other",
    ("engine/loop.py", "fit"): "the loop, whose phases are to be read in one place; has a bound of its own",
}
# What modules that are asked for by name can be: patterns of names, by the module that asks.
BY_NAME = {
    "medssl.datasets.registry": "|".join(re.escape(f"medssl.datasets.{row.module}") for row in registry.ROWS),
    "medssl.study.jobs": r"medssl\.(train_\w+|finetune_\w+|evaluate_features)",
    "medssl.study.plan": r"medssl\.train_\w+",
    "medssl.benchmarks.gpu": r"medssl\.benchmarks\.gpu_parts",
    "medssl.benchmarks.gpu_parts": r"medssl\.train_\w+",
    "medssl.benchmarks.methods": r"medssl\.train_\w+",
    "medssl.benchmarks.lab": r"medssl\.train_\w+",
    "medssl.docs.hooks": r"medssl\.train_\w+",
    "medssl.benchmarks.endure_kills": r"medssl\.(train_\w+|finetune_\w+|evaluate_features|compare|preprocess\.luna)",
}


def sources():
    """Every module of the project: dotted name → its tree, and its path."""
    out = {}
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT)
        if place.parts[0] in ("tests", "runs", "build") or place.parts[0].startswith(".") or place.name == "setup.py":
            continue
        parts = place.with_suffix("").parts
        name = ".".join(("medssl", *(parts[:-1] if parts[-1] == "__init__" else parts)))
        out[name] = ast.parse(path.read_text(encoding="utf-8")), place
    return out


MODULES = sources()


def room_of(module):
    """The room of a module: its folder; of those beside setup.py, their own, or the scripts'."""
    top = module.split(".")[1] if "." in module else "errors"  # the package itself lies on the ground
    return top if top in LEVEL else "scripts"


def imports_of(name, tree):
    """Every module of the project that a module imports: at its top, in functions, for types alone, and by name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "medssl"}
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == "medssl"):
            assert node.level == 0, f"{name}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {module if module in MODULES else node.module for module in inner}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rsplit(".")[-1] in ("import_module", "__import__"):
            assert name in BY_NAME, f"{name}: {ast.unparse(node)}: say in BY_NAME which modules that can be"
            found |= {module for module in MODULES if re.fullmatch(BY_NAME[name], module)}
    return found - {name}


GRAPH = {name: imports_of(name, tree) for name, (tree, _) in MODULES.items()}


def upward(graph):
    """Imports of a room on a higher floor."""
    return [
        f"{name} imports {module}"
        for name, modules in graph.items()
        for module in sorted(modules)
        if LEVEL[room_of(module)] > LEVEL[room_of(name)]
    ]


def circle_in(graph):
    """Names of a circle of imports, or []."""
    done = set()

    def visit(name, path):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for module in sorted(graph.get(name, ())):
            circle = visit(module, [*path, name])
            if circle:
                return circle
        done.add(name)
        return []

    return next((circle for name in graph if (circle := visit(name, []))), [])


def test_no_import_goes_up():
    assert upward(GRAPH) == []


def test_imports_have_no_circle():
    assert circle_in(GRAPH) == []
    rooms = {}
    for name, modules in GRAPH.items():
        own = rooms.setdefault(room_of(name), set())
        own |= {room_of(module) for module in modules} - {room_of(name), "scripts" if room_of(name) == "demo" else ""}
    assert circle_in(rooms) == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from medssl.engine.loop import fit", "medssl.engine.loop"),
        ("import medssl.engine.loop", "medssl.engine.loop"),
        ("def f():\n    from medssl.engine import loop", "medssl.engine.loop"),
        ("if TYPE_CHECKING:\n    from medssl.engine.loop import fit", "medssl.engine.loop"),
    ],
)
def test_imports_are_found_wherever_they_stand(code, found):
    graph = {"medssl.reading.find": imports_of("medssl.reading.find", ast.parse(code))}
    assert graph == {"medssl.reading.find": {found}}
    assert upward(graph) == ["medssl.reading.find imports medssl.engine.loop"]
    assert circle_in(graph | {"medssl.engine.loop": {"medssl.reading.find"}})


def test_imports_by_name_are_seen():
    with pytest.raises(AssertionError, match="say in BY_NAME"):
        imports_of("medssl.reading.find", ast.parse("importlib.import_module('medssl.engine.loop')"))
    assert {f"medssl.datasets.{row.module}" for row in registry.ROWS} <= GRAPH["medssl.datasets.registry"]
    assert "medssl.train_concl" in GRAPH["medssl.study.plan"]


def test_every_folder_has_a_floor():
    rooms = {name.split(".")[1] for name, (_, place) in MODULES.items() if len(place.parts) > 1}
    assert rooms <= LEVEL.keys()


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_functions_are_short():
    """But those of parsers, whose lines are options, and the named ones."""
    long = [
        (str(place), function.name, function.end_lineno - function.lineno + 1)
        for tree, place in MODULES.values()
        for function in functions(tree)
        if function.end_lineno - function.lineno + 1 > LONGEST and function.name != "get_parser"
    ]
    assert [each for each in long if each[:2] not in LONG] == []
    assert {each[:2] for each in long} == LONG.keys()  # none that has become short


def test_the_loop_is_flat():
    tree, _ = MODULES["medssl.engine.loop"]
    fit = next(function for function in functions(tree) if function.name == "fit")
    assert fit.end_lineno - fit.lineno + 1 <= LONGEST_LOOP
    assert functions(fit) == [fit]
    assert not [node for node in ast.walk(fit) if isinstance(node, ast.Lambda)]
    others = [f for f in functions(tree) if f.name != "fit"]
    assert max(f.end_lineno - f.lineno + 1 for f in others) <= 40
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    # The phases, in their order, are called in the step loop itself.
    (loop,) = (node for node in ast.walk(fit) if isinstance(node, ast.While))
    calls = [ast.unparse(node.func) for node in ast.walk(loop) if isinstance(node, ast.Call)]
    text = ast.unparse(loop)
    phases = ("next_of", "set_learning_rate", "views(", "wrapped(", ".backward()", ".optimizer", ".after_step(", "log(",
              "validate(", "state.save(")  # fmt: skip
    places = [text.index(phase) for phase in phases if phase != ".optimizer"]
    assert places == sorted(places)
    assert {"state.scaler.step", "method.after_step", "state.scaler.scale(loss).backward"} <= set(calls)


WRITERS = {"write_text", "write_bytes", "savefig", "WriteImage", "copyfile", "copy2", "copytree", "to_csv", "tofile"}
# Writes inside of `writing`, `write_folder` or `naming`, which their own module says, and what is no file.
WITHIN = {
    ("export_encoder.py", "part.write_bytes"), ("study/report.py", "figure.savefig"),
    ("engine/checkpoint.py", "open"), ("datasets/cache.py", "open"), ("study/jobs.py", "open"),
}  # fmt: skip
# The file that names a lock's owner, and what stands for streams that are not there.
ALONE = {("locks.py", "open"), ("errors.py", "open")}


def writes_in(tree):
    """Calls by which a file is written, but those that a lambda leaves to somebody else."""
    if isinstance(tree, ast.Lambda):
        return
    if isinstance(tree, ast.Call):
        name = ast.unparse(tree.func)
        modes = [arg.value for arg in tree.args[1:2] if isinstance(arg, ast.Constant)]
        if name == "open" and any(set("wax+") & set(mode) for mode in modes):
            yield name
        if isinstance(tree.func, ast.Attribute) and tree.func.attr in WRITERS:
            yield name
    for node in ast.iter_child_nodes(tree):
        yield from writes_in(node)


def test_writes_stand_in_one_file():
    """A full disk is told apart in `files.py`, which knows how libraries tell of it."""
    found = {
        (str(place), name)
        for tree, place in MODULES.values()
        for name in writes_in(tree)
        if place.parts[0] not in ("benchmarks", "docs") and str(place) != "files.py"
    }
    assert found == WITHIN | ALONE


def names_in(tree):
    """All identifiers: variables, attributes, arguments, options' names."""
    for node in ast.walk(tree):
        yield from (getattr(node, field) for field in ("id", "attr", "arg", "name") if hasattr(node, field))


def modules_with(*names):
    """Paths of the modules that use one of the identifiers."""
    return {str(place) for tree, place in MODULES.values() if not {*names}.isdisjoint(names_in(tree))}


def test_ranks_stand_in_one_file():
    assert modules_with("rank", "world", "process_rank", "world_size") == {"engine/parallel.py"}


def test_renames_stand_in_one_file():
    found = {
        (str(place), ast.unparse(node))
        for tree, place in MODULES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) in ("os.replace", "os.rename", "os.fsync")
        and place.parts[0] != "benchmarks"  # one of which slows them down
    }
    # A cache's blocks are places in one file, whose progress is noted when they are on the disk.
    assert found == {("files.py", "os.replace"), ("files.py", "os.fsync"), ("datasets/cache.py", "os.fsync")}


def texts_with(word):
    """Paths of the modules in whose text a word stands, in code, comment or docstring; not as a part of a protocol's
    name."""
    return {
        str(place)
        for _, place in MODULES.values()
        if re.search(rf"(?<!magical-)(?<!pcrlv2-)\b{word}\b", (ROOT / place).read_text(encoding="utf-8"))
    }


@pytest.mark.parametrize("name", ["montgomery", "shenzhen", "stare", "chase", "brats", "nct"])
def test_a_set_is_named_by_its_module_and_its_row(name):
    row = registry.row_of(name)
    assert texts_with(name) - {f"datasets/{row.module}.py"} <= {"datasets/registry.py", *EXAMPLES.get(name, ())}


# Commands in docstrings, and tools that are for one set.
EXAMPLES = {
    "nct": {f"train_{method}.py" for method in ("byol", "concl", "densecl", "moco", "pcl", "simclr")}
    | {"study/intervals.py"},  # the noncentral t distribution has the same name
    "brats": {"tasks/segmentation3d.py", "finetune_segmentation.py"},
}


def literal_tuples(tree):
    """Tuples and lists of three or more numbers above 1, as text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Tuple | ast.List) and len(node.elts) >= 3:
            values = [part.value for part in node.elts if isinstance(part, ast.Constant)]
            if len(values) == len(node.elts) and all(isinstance(v, int | float) and v > 1 for v in values):
                yield tuple(map(float, values))


@pytest.mark.parametrize("numbers", [(96, 96, 48), (112, 112, 64), (96, 96, 64)])
def test_published_crop_sizes_stand_once(numbers):
    places = [str(place) for tree, place in MODULES.values() if tuple(map(float, numbers)) in set(literal_tuples(tree))]
    assert places == ["views/ops3d.py"]


def test_one_name_one_meaning():
    """Files of one name in two rooms are about the same thing."""
    same = {"classification", "segmentation", "luna", "concepts", "contrast"}
    stems = Counter(place.stem for _, place in MODULES.values() if place.stem != "__init__")
    assert {stem for stem, count in stems.items() if count > 1} <= same
    defined = Counter()
    for tree, place in MODULES.values():
        if place.parts[0] != "benchmarks":
            for node in tree.body:
                if isinstance(node, ast.FunctionDef) and node.name in ("share", "iou", "KINDS", "sample"):
                    defined[node.name] += 1
    assert defined == {"iou": 1, "sample": 2}  # views out of images, and out of volumes
    assert modules_with("KINDS") == set()
