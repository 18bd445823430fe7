"""What holds for the product's source as a whole: imports run one way, and nothing that is loaded can run code."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from helpers import ROOT

TOP_LEVEL = ("trainloop_complete_with_fixes", "model_persistence", "policy_refined")
PARTS = sorted(str(path.relative_to(ROOT / "arc")).removesuffix(".py") for path in (ROOT / "arc").rglob("*.py"))
# The product, without tests and benchmarks: those may build hostile files and measure other ways to save.
PRODUCT = [*(f"{name}.py" for name in TOP_LEVEL), *(f"arc/{name}.py" for name in PARTS)]

UNPICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "pandas"}
CODE_RUNNERS = {
    *("eval", "exec", "compile", "__import__", "runpy", "importlib.import_module", "os.system", "yaml.load"),
    *("torch.load", "torch.save", "torch.jit.load", "torch.package", "torch.hub"),
    *("torch.serialization.load", "torch.serialization.save", "torch.distributed.checkpoint"),
}


def parse(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"), file)


def imports(tree: ast.AST) -> dict[str, str]:
    """What each imported name in a module stands for, at any depth: {"np": "numpy", "load": "torch.load"}."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name] = alias.name
                if alias.asname is None:  # `import a.b` binds a
                    names.setdefault(alias.name.partition(".")[0], alias.name.partition(".")[0])
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{'.' * node.level}{node.module or ''}.{alias.name}"
    return names


def imported_packages(tree: ast.AST) -> set[str]:
    """First parts of what is imported; "." for a relative import."""
    return {whole.partition(".")[0] or "." for whole in imports(tree).values()}


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """`t.load` as "torch.load" where t is torch; "" for what is no plain name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        before = dotted(node.value, names)
        return f"{before}.{node.attr}" if before else ""
    return ""


def dangers(tree: ast.AST) -> Iterator[str]:
    """Every way in `tree` in which loading something could run code, as "line: what"."""
    names = imports(tree)
    for whole in names.values():
        if whole.partition(".")[0] in UNPICKLERS or is_code_runner(whole):
            yield f"import: {whole}"
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            continue  # a flag that is called "compile" runs nothing
        if isinstance(node, (ast.Name, ast.Attribute)) and is_code_runner(dotted(node, names)):
            yield f"{node.lineno}: {dotted(node, names)}"
        elif isinstance(node, ast.Call):
            yield from (f"{node.lineno}: {what}" for what in dangerous_arguments(node, names))
        elif isinstance(node, ast.Constant) and node.value in ("trust_remote_code", "allow_pickle", "weights_only"):
            yield f"{node.lineno}: {node.value} as a string"


def is_code_runner(name: str) -> bool:
    return any(name == runner or name.startswith(f"{runner}.") for runner in CODE_RUNNERS)


def dangerous_arguments(call: ast.Call, names: dict[str, str]) -> Iterator[str]:
    keywords = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    for flag in ("trust_remote_code", "allow_pickle"):
        if flag in keywords and not is_false(keywords[flag]):
            yield flag
    if dotted(call.func, names) == "numpy.load" and "allow_pickle" not in keywords:
        yield "numpy.load without allow_pickle=False"


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


# --------------------------------------------------------------------------------------------------------------------


def test_the_files_that_users_know_are_there() -> None:
    for name in TOP_LEVEL:
        assert (ROOT / f"{name}.py").is_file()
    assert (ROOT / "arc" / "__init__.py").read_text() == ""
    assert len(PARTS) > 10


@pytest.mark.parametrize("part", PARTS)
def test_arc_never_imports_the_top_level(part: str) -> None:
    assert imported_packages(parse(f"arc/{part}.py")) & {*TOP_LEVEL, ".", "tests", "conftest"} == set()


PERSISTENCE = [file for file in PRODUCT if file.startswith("arc/persistence/")]
RUN = [file for file in PRODUCT if file.startswith("arc/run/")]


def arc_imports(file: str) -> set[str]:
    """The modules and packages of arc that a file names, as "arc.x" or "arc.x.y"."""
    return {
        ".".join(whole.split(".")[:depth])
        for whole in imports(parse(file)).values()
        for depth in (2, 3)
        if whole.startswith("arc.")
    }


@pytest.mark.parametrize("file", ["model_persistence.py", *PERSISTENCE])
def test_persistence_knows_neither_models_nor_flags_nor_tasks(file: str) -> None:
    packages = imported_packages(parse(file))
    assert packages & {"trainloop_complete_with_fixes", "policy_refined", "transformers", "peft", "."} == set()
    assert all(name == "arc.persistence" or name.startswith("arc.persistence.") for name in arc_imports(file))


def test_only_the_public_face_imports_persistence() -> None:
    inside = {*PERSISTENCE, "model_persistence.py"}
    assert [file for file in PRODUCT if file not in inside and "arc.persistence" in arc_imports(file)] == []
    assert len(PERSISTENCE) > 8


@pytest.mark.parametrize("file", RUN)
def test_run_imports_no_model_data_or_report_code(file: str) -> None:
    assert {name for name in arc_imports(file) if not name.startswith("arc.run")} == set()


EVIDENCE = [file for file in PRODUCT if file.startswith("arc/evidence/")]


def test_nobody_outside_names_a_module_inside_the_evidence() -> None:
    for file in PRODUCT:
        if file not in EVIDENCE:
            inside = {whole for whole in imports(parse(file)).values() if whole.count(".") > 2}
            assert not any(whole.startswith("arc.evidence.") for whole in inside), file
    assert len(EVIDENCE) > 12


@pytest.mark.parametrize("file", EVIDENCE)
def test_evidence_sees_only_tasks_augmentation_and_files(file: str) -> None:
    modules = {module_named(whole) for whole in imports(parse(file)).values() if whole.startswith("arc.")}
    assert {name for name in modules if name and not name.startswith("evidence/")} <= {"tasks", "augment", "run/files"}


def test_files_and_functions_fit() -> None:
    """No file above 700 lines (the script 1,200), no function above 60, the step 45 from the prompt to the memory."""
    for file in PRODUCT:
        tree, lines = parse(file), (ROOT / file).read_text(encoding="utf-8").count("\n")
        assert lines <= (1200 if file == "trainloop_complete_with_fixes.py" else 700), f"{file}: {lines} lines"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{file}: {node.name}"
    script = (ROOT / "trainloop_complete_with_fixes.py").read_text(encoding="utf-8")
    step = script[script.index("prompt, key = read_prompt(run, batch)") : script.index("offers = None if")]
    assert step.count("\n") < 45 and {f"FIX {n}" for n in range(1, 7)} <= {*re.findall(r"FIX \d", script)}


def test_only_tests_import_the_script() -> None:
    for file in PRODUCT:
        if file != "trainloop_complete_with_fixes.py":
            assert "trainloop_complete_with_fixes" not in imported_packages(parse(file)), file
    assert imported_packages(parse("policy_refined.py")) & {"model_persistence", "."} == set()


def test_only_one_file_imports_transformers() -> None:
    importers = [file for file in PRODUCT if imported_packages(when_run(file)) & {"transformers", "tokenizers"}]
    assert importers == ["arc/qwen_source.py"]


def test_no_circle_inside_arc() -> None:
    needs = {part: modules_of(part) for part in PARTS}
    while free := [part for part, needed in needs.items() if not needed]:
        for part in free:
            del needs[part]
        needs = {part: needed - set(free) for part, needed in needs.items()}
    assert needs == {}


def modules_of(part: str) -> set[str]:
    """The arc modules that a part imports when it is run."""
    tree = when_run(f"arc/{part}.py")
    return {module for whole in imports(tree).values() if (module := module_named(whole))} - {part}


def when_run(file: str) -> ast.Module:
    """The module without what is imported for type checkers alone, which does no harm."""
    tree = parse(file)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    return tree


def module_named(name: str) -> str | None:
    """The part that "arc.x.y.Z" is in: "x/y", or "x/__init__" where x is a package and y is one of its names."""
    words = name.split(".")[1:] if name.startswith("arc.") else []
    for end in range(len(words), 0, -1):
        for part in ("/".join(words[:end]), "/".join([*words[:end], "__init__"])):
            if part in PARTS:
                return part
    return None


@pytest.mark.parametrize("file", PRODUCT)
def test_nothing_that_is_loaded_can_run_code(file: str) -> None:
    assert list(dangers(parse(file))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import dill as d",
        "import torch\ntorch.load('x', weights_only=True)",
        "import torch as t\nt.save({}, 'x')",
        "from torch import load\nload('x')",
        "import torch\nread = torch.load",
        "import torch.distributed.checkpoint as dcp",
        "from torch.distributed import checkpoint",
        "import torch\ntorch.hub.load('a', 'b')",
        "import numpy as np\nnp.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.lib.format.read_array(file, allow_pickle=flag)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "AutoModel.from_pretrained('x', **{'trust_remote_code': True})",
        "eval('1')",
        "exec(text)",
    ],
)
def test_the_check_finds_what_it_looks_for(source: str) -> None:
    assert list(dangers(ast.parse(source)))


def test_the_check_lets_the_safe_ways_pass() -> None:
    safe = """
import numpy as np, torch
from safetensors.torch import load_file
load_file("x")
np.load("x", allow_pickle=False)
model.eval()
re.compile("x")
AutoModel.from_pretrained("x", trust_remote_code=False)
"""
    assert list(dangers(ast.parse(safe))) == []
