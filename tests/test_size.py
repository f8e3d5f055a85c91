"""Smallness has a budget. Whoever needs more raises a number here, with a decision record."""

from pathlib import Path

import pytest

from tests.code_size import code_lines, cpp_lines, python_lines

ROOT = Path(__file__).parents[1]
CPP = {".cpp", ".h"}
MAX_FILE_LINES = 400
MAX_FOLDER_LINES = [  # folder, kind of file, lines of code
    ("engine", {".py"}, 7_500),
    ("kernels", {".py"}, 7_500),
    ("kernels", CPP, 6_000),
    ("compression", {".py"}, 4_000),
    ("serving", {".py"}, 4_000),
    ("bench", {".py"}, 3_500),
]


def sources(folder, suffixes):
    """Files that people wrote."""
    paths = (path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)
    return [path for path in paths if not path.stem.endswith(("_pb2", "_pb2_grpc"))]


@pytest.mark.parametrize(("folder", "suffixes", "most"), MAX_FOLDER_LINES)
def test_a_folder_keeps_its_budget(folder, suffixes, most):
    lines = sum(map(code_lines, sources(folder, suffixes)))
    assert 0 < lines <= most or (folder == "compression" and lines == 0)


def test_no_file_is_longer_than_400_lines():
    folders = (*{folder for folder, _, _ in MAX_FOLDER_LINES}, "src/vivace", "tests", "examples")
    paths = [path for folder in folders for path in sources(folder, CPP | {".py"})]
    assert len(paths) > 80
    lengths = {str(path.relative_to(ROOT)): code_lines(path) for path in paths}
    assert {name: n for name, n in lengths.items() if n > MAX_FILE_LINES} == {}


def test_only_code_counts():
    source = '"""One.\n\nTwo.\n"""\n\n# comment\nx = [\n    1,  # why\n]\n\n'
    source += 'def f():\n    """Doc."""\n    return """a\nb"""\n'
    assert python_lines(source) == 6
    assert python_lines('x = """not a\ndocstring"""\n') == 2
    assert cpp_lines("// a\n/* b\n c */ int x;\n\nint y;  // z\n/* d */\n") == 2
