"""Counts lines of code: what is neither blank, nor comment, nor docstring."""

import ast
import io
import re
import tokenize
from pathlib import Path

IGNORED = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def python_lines(source: str) -> int:
    """Lines of Python code; a statement over several lines counts each."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in IGNORED:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            lines.difference_update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return len(lines)


def cpp_lines(source: str) -> int:
    """Lines of C++ code. A comment mark inside a string literal is taken for a comment."""
    without = re.sub(r"/\*.*?\*/", lambda found: "\n" * found[0].count("\n"), source, flags=re.S)
    return sum(bool(line.split("//")[0].strip()) for line in without.splitlines())


def code_lines(path: Path) -> int:
    """Lines of code of a Python or C++ file."""
    count = python_lines if path.suffix == ".py" else cpp_lines
    return count(path.read_text(encoding="utf-8"))
