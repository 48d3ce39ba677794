"""Who may import whom, what stands at the top level, and what `--help` loads."""

import ast
import functools
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lora_export"

# A module may import modules of its own layer and of earlier ones. A folder is one entry.
LAYERS = [
    ("errors",),
    ("progress", "untrusted"),
    ("plan", "adapter"),
    ("machines", "storage"),
    ("graph", "formats"),
    ("sites",),
    ("base",),
    ("binding", "engines"),
    ("modes", "packages"),
    ("runtimes",),
    ("demo", "doctor", "integrity"),
    ("parity", "bench"),
    ("reports",),
    ("commands",),
    ("cli",),
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}

# Calls that pass on however many arguments there are: children of an element, arguments of a CUDA function.
TAKES_ANY_NUMBER = {"element", "page", "call"}


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def entry(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(path: Path, top_level: bool = False):
    """Yield (dotted name, line) of what a file imports; `if TYPE_CHECKING` blocks do not count."""
    return ((name, line) for name, line, is_at_top in imports(path) if is_at_top or not top_level)


@functools.cache
def imports(path: Path) -> list[tuple[str, int, bool]]:
    """Return the dotted name and line of what a file imports, and whether it is imported with the file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    skipped = {
        id(inner)
        for node in nodes
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    top, found = set(map(id, tree.body)), []
    for node in nodes:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        found += [(name, node.lineno, id(node) in top) for name in names]
    return found


def test_layers_are_imported_downwards_only():
    wrong = []
    for path in modules():
        own = entry(path)
        if own in ("__init__", "__main__"):
            continue
        assert own in RANK, f"{path.relative_to(ROOT)}: give '{own}' a place in LAYERS"
        for name, line in imported(path):
            parts = name.split(".")
            if parts[0] != "lora_export" or len(parts) < 2 or parts[1] not in RANK:
                continue
            if RANK[parts[1]] > RANK[own]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_plug_ins_do_not_import_their_siblings():
    """Registered files (an operator, a format, a mode, a verb) stand alone."""
    from lora_export.base.kinds import KINDS
    from lora_export.commands import COMMANDS
    from lora_export.formats import FORMATS
    from lora_export.formats.schemes import SCHEMES
    from lora_export.modes.quantising import METHODS
    from lora_export.sites import OPERATORS

    registries = (COMMANDS, FORMATS, SCHEMES, OPERATORS, KINDS, METHODS)
    targets = [target for registry in registries for target in registry.values()]
    plug_ins = {target.partition(":")[0] for target in targets}
    plug_ins |= {f"lora_export.modes.{path.stem}" for path in (PACKAGE / "modes").glob("[!_]*.py")}
    wrong = []
    for module in sorted(plug_ins):
        path = ROOT / (module.replace(".", "/") + ".py")
        for name, line in imported(path):
            sibling = name.rpartition(".")[0] == module.rpartition(".")[0]
            if name in plug_ins and name != module and sibling:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports its sibling {name}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["torch", "transformers", "peft", "onnxruntime", "tensorrt", "matplotlib"])
def test_heavy_packages_are_imported_late(name):
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in modules()
        for found, line in imported(path, top_level=True)
        if found.split(".")[0] == name
    ]
    assert not wrong, f"{name} at module top: {wrong}"


def test_what_is_always_installed_is_imported():
    """A dependency that nothing imports is a download for nothing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.match(r"[\w-]+", line)[0].replace("-", "_").lower() for line in project["dependencies"]}
    found = {name.split(".")[0] for path in modules() for name, _ in imported(path)}
    assert names <= found | {"pyyaml"}
    assert "yaml" in found


def test_tensorrt_is_imported_in_engines_and_runtimes_only():
    wrong = [
        str(path.relative_to(ROOT))
        for path in modules()
        for found, _ in imported(path)
        if found.split(".")[0] in ("tensorrt", "tensorrt_rtx") and entry(path) not in ("engines", "runtimes")
    ]
    assert not wrong


def test_a_reason_is_a_value_and_no_text():
    """What can't be done is a `Refusal`: callers tell it by its class, and hints hang on its kind."""
    wrong = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
                kinds = set(ast.unparse(node.returns).split(" | "))
                if "str" in kinds and kinds - {"str", "None"}:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} -> {' | '.join(kinds)}")
    assert not wrong, "\n".join(wrong)


def test_dataclasses_of_more_than_four_fields_are_keyword_only():
    """Those of `LoraModule` and `Adapter` take their first fields by place, the others all by name."""
    wrong = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            made = [ast.unparse(one) for one in getattr(node, "decorator_list", ())]
            dataclass = next((one for one in made if one.startswith("dataclass")), None)
            if dataclass is None:
                continue
            kinds = [ast.unparse(item.annotation) for item in node.body if isinstance(item, ast.AnnAssign)]
            fields = [kind for kind in kinds if not kind.startswith("ClassVar")]
            if "KW_ONLY" in fields:
                fields = fields[: fields.index("KW_ONLY")]
            if len(fields) > 4 and "kw_only=True" not in dataclass:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {len(fields)} fields")
    assert not wrong, "\n".join(wrong)


def test_calls_of_more_than_four_arguments_name_them():
    wrong = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or len(node.args) <= 4:
                continue
            callee = ast.unparse(node.func)
            if callee.rpartition(".")[2] not in TAKES_ANY_NUMBER:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {callee}: {len(node.args)} by place")
    assert not wrong, "\n".join(wrong)


def test_functions_are_read_at_a_glance():
    """At most sixty lines, without the docstring."""
    wrong = []
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            if lines > 60:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {lines} lines")
    assert not wrong, "\n".join(wrong)


def test_a_class_name_means_one_thing():
    """Public classes have names of their own; a registry's plug-ins share those of their functions only."""
    found: dict[str, list[str]] = {}
    for path in modules():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert not {name: files for name, files in found.items() if len(files) > 1}


def test_no_module_is_named_after_nothing():
    assert not [path for path in modules() if path.stem in ("utils", "helpers", "common", "misc")]


def test_top_level_is_what_the_design_lists():
    known = {
        *("pyproject.toml", "README.md", "LICENSE", "SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md"),
        *("constraints.txt", "mkdocs.yml"),
        *("lora_export", "recipes", "tests", "tools", "docs"),
        *(".ci", ".github", ".gitignore", ".pre-commit-config.yaml"),
    }
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not listed:
        pytest.skip("not a git checkout")
    assert {name.split("/")[0] for name in listed} <= known


def test_tests_lie_in_rooms_of_the_same_names():
    """But for what the tests are made from (``zoo``), and recorders, stand-ins and oracles (``doubles``)."""
    rooms = {path.parent.name for path in (ROOT / "lora_export").glob("*/__init__.py")}
    named = {path.parent.relative_to(ROOT / "tests").as_posix() for path in (ROOT / "tests").rglob("*.py")}
    assert named <= rooms | {"zoo", "doubles", "."}
    whole = {"conftest.py", "test_architecture.py", "test_lint.py", "test_readme.py", "test_docs.py"}
    assert {path.name for path in (ROOT / "tests").glob("*.py")} <= whole


LIGHT = """
import sys
sys.argv = ["lora-export", *{arguments!r}]
from lora_export.cli import main
try:
    main()
except SystemExit as stop:
    assert stop.code == 0, stop.code
heavy = ["torch", "transformers", "onnxruntime", "tensorrt", "tensorrt_rtx", "peft", "matplotlib"]
heavy += {more!r}
loaded = [name for name in heavy if name in sys.modules]
assert not loaded, loaded
"""


@pytest.mark.parametrize(
    ("arguments", "more"),
    [
        (["--help"], ["numpy", "onnx", "onnx_ir", "rich"]),
        (["--version"], ["numpy", "onnx", "onnx_ir", "rich"]),
        (["merge-onnx", "--help"], ["numpy", "onnx_ir"]),
        (["merge", "--help"], ["numpy", "onnx_ir"]),
        (["inspect", "--help"], ["numpy", "onnx_ir"]),
        (["demo", "--help"], ["numpy", "onnx_ir"]),
        (["convert-adapter", "--help"], ["numpy", "onnx_ir"]),
        (["swap-onnx", "--help"], ["numpy", "onnx_ir"]),
        (["capture-onnx", "--help"], ["numpy", "onnx_ir"]),
        (["build-engine", "--help"], ["numpy", "onnx_ir"]),
        (["bench", "--help"], ["numpy", "onnx_ir"]),
        (["bank-onnx", "--help"], ["numpy", "onnx_ir"]),
        (["targets", "--help"], ["numpy", "onnx_ir", "rich"]),
        (["targets", "rtx-4090"], ["numpy", "onnx_ir", "rich"]),
        (["doctor", "--help"], ["numpy", "onnx_ir", "rich"]),
        (["run", "--help"], ["numpy", "onnx_ir", "yaml"]),
        (["verify", "--help"], ["numpy", "onnx_ir", "rich"]),
    ],
)
def test_help_loads_nothing_heavy(arguments, more):
    script = LIGHT.format(arguments=arguments, more=more)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_import_of_the_package_loads_nothing_heavy():
    script = "import sys, lora_export; assert not {'numpy', 'torch', 'onnx_ir'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_public_name_is_there():
    import lora_export

    for name in lora_export.__all__:
        assert getattr(lora_export, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lora_export.nothing
