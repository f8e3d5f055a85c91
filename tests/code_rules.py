"""The rules of the house that no linter knows: each takes a file and returns what it breaks."""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

BASES = {
    "Protocol",
    "Enum",
    "IntEnum",
    "StrEnum",
    "Struct",
    "TypedDict",
    "Structure",
    "RuleBasedStateMachine",
    "TestCase",
}
BASE_ENDINGS = ("Error", "Exception", "Servicer", "Interceptor")
VAGUE_NAME = re.compile(r"(^|_)(utils?|common|helpers?|managers?|mixins?|misc)$")
CAN_RUN_CODE = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
BANNED_CALLS = {"eval", "exec", "torch.load", "yaml.load", "os.system", "os.popen", "__import__"}
ENVIRONMENT = {"environ", "environb", "getenv", "putenv"}
HEAVY = {"torch", "triton", "transformers", "onnx", "onnxruntime", "tensorrt_llm"}
HEAVY_INSIDE = re.compile(r"(^|/)(runtimes|export)/")
TORCH_FILES = re.compile(r"^(kernels/.*/(reference|triton)\.py$|kernels/gpu/|compression/)")
OPEN_PARAMETERS = {  # binders and the client
    "kernels/backend.py",
    "serving/client/aio.py",
    "serving/client/sync.py",
}
IMPORTERS = {"kernels/backend.py", "src/vivace/__init__.py", "src/vivace/__main__.py"}
BROAD_EXCEPTS = {  # where anything may be caught, how often
    "serving/boundary.py": 1,  # one per kind of call: a bug ends one request, not the server
    "engine/tokenizer.py": 1,  # the library raises the base class for a broken file
}
MARKS = re.compile(r"\b(" + "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X")) + r")\b(?!\(#\d+\))")


@dataclass(frozen=True, slots=True)
class Source:
    """A file of the repository; `path` is relative to its root."""

    path: str
    text: str

    @property
    def nodes(self) -> list[ast.AST]:
        """Everything in its syntax tree."""
        return list(ast.walk(ast.parse(self.text)))


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a name or attribute; what it cannot name it leaves out."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Subscript):
        return dotted(node.value)
    return node.id if isinstance(node, ast.Name) else ""


def imported(node: ast.AST) -> list[str]:
    """Top-level packages that a statement imports."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and not node.level:
        return [str(node.module).split(".")[0]]
    return []


def inheritance(source: Source) -> Iterator[str]:
    """Composition: bases are protocols, enums, structs, exceptions, and what libraries demand."""
    classes = (node for node in source.nodes if isinstance(node, ast.ClassDef))
    for node in classes:
        for base in map(dotted, node.bases):
            name = base.split(".")[-1]
            if name not in BASES and not name.endswith(BASE_ENDINGS):
                yield f"{node.name} inherits from {base}"


def vague_modules(source: Source) -> Iterator[str]:
    """A module is named for what it decides."""
    path = PurePosixPath(source.path)
    for part in (*path.parts[:-1], path.stem):
        if VAGUE_NAME.search(part):
            yield f"{part} says nothing"


def type_checking(source: Source) -> Iterator[str]:
    """An import for types alone hides a cycle."""
    for node in source.nodes:
        if dotted(node).split(".")[-1] == "TYPE_CHECKING":
            yield "TYPE_CHECKING"


def environment(source: Source) -> Iterator[str]:
    """Settings are in one tree, not in the environment."""
    for node in source.nodes:
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (f"os.{a.name}" for a in node.names if a.name in ENVIRONMENT)
        elif isinstance(node, ast.Attribute) and dotted(node) in {f"os.{e}" for e in ENVIRONMENT}:
            yield dotted(node)


def code_from_data(source: Source) -> Iterator[str]:
    """Nothing that was read is ever run."""
    for node in source.nodes:
        yield from (f"imports {name}" for name in imported(node) if name in CAN_RUN_CODE)
        if isinstance(node, ast.Call) and dotted(node.func) in BANNED_CALLS:
            yield f"calls {dotted(node.func)}"
        if isinstance(node, ast.keyword):
            flag = isinstance(node.value, ast.Constant) and node.value.value is False
            if node.arg in ("shell", "allow_pickle", "trust_remote_code") and not flag:
                yield f"passes {node.arg}"


def inner_imports(source: Source) -> Iterator[str]:
    """Imports stand at the top, but for heavy optional ones, commands, and what binds late."""
    for function in source.nodes:
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        for node in ast.walk(function):
            heavy = set(imported(node)) <= HEAVY and HEAVY_INSIDE.search(source.path)
            allowed = heavy or source.path.endswith("/cli.py")  # a command imports what it runs
            if isinstance(node, ast.Import | ast.ImportFrom) and not allowed:
                yield f"line {node.lineno} imports inside a function"
            late = isinstance(node, ast.Call) and dotted(node.func).endswith("import_module")
            if late and source.path not in IMPORTERS:
                yield f"line {function.lineno} calls import_module"


def torch_imports(source: Source) -> Iterator[str]:
    """torch is for the reference, Triton and compression: a CPU server never loads it."""
    for node in source.nodes:
        if {"torch", "triton"} & set(imported(node)) and not TORCH_FILES.search(source.path):
            yield f"imports {imported(node)}"


def broad_excepts(source: Source) -> Iterator[str]:
    """Everything is caught at the listed boundaries alone; to clean up and raise again is free."""
    broad = 0
    for node in source.nodes:
        if isinstance(node, ast.ExceptHandler):
            caught = ast.dump(node.type) if node.type else "BaseException"
            last = node.body[-1]
            raises_again = isinstance(last, ast.Raise) and last.exc is None
            broad += ("'Exception'" in caught or "BaseException" in caught) and not raises_again
    if broad > BROAD_EXCEPTS.get(source.path, 0):
        yield f"{broad} handlers catch everything"


def open_parameters(source: Source) -> Iterator[str]:
    """A signature says what it takes."""
    for node in [] if source.path in OPEN_PARAMETERS else source.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.args.kwarg:
            yield f"{node.name} takes **{node.args.kwarg.arg}"


def global_state(source: Source) -> Iterator[str]:
    """No function changes a module."""
    for node in source.nodes:
        if isinstance(node, ast.Global):
            yield f"global {', '.join(node.names)}"


def run_time_tuning(source: Source) -> Iterator[str]:
    """Kernels are tuned before they ship: a search while serving stalls requests, and cannot run in a graph."""
    for node in source.nodes:
        names = [node.attr] if isinstance(node, ast.Attribute) else []
        if isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        if "autotune" in names:
            yield f"line {node.lineno} uses autotune"


def open_marks(source: Source) -> Iterator[str]:
    """What is left to do has an issue's number."""
    yield from (found[0] for found in MARKS.finditer(source.text))


Rule = Callable[[Source], Iterator[str]]
PYTHON_RULES: tuple[Rule, ...] = (
    inheritance,
    vague_modules,
    type_checking,
    environment,
    code_from_data,
    inner_imports,
    torch_imports,
    broad_excepts,
    open_parameters,
    global_state,
    run_time_tuning,
)
