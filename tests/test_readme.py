"""What the README and the pages of docs name exists: files, make targets, commands, imports."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from vivace.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/architecture.md",
    "docs/gpu-check.md",
    "docs/kernels.md",
    "docs/operations.md",
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.M | re.S)
SPAN = re.compile(r"`([^`\n]+)`")
SUFFIXES = (".py", ".md", ".toml", ".txt", ".proto", ".json", ".cpp", ".h", ".cfg")
FOLDERS = ("engine", "kernels", "serving", "bench", "compression", "tests", "docs", "examples")
MADE_BY_OTHERS = {
    "config.json",
    "tokenizer.json",
    "generation_config.json",
    "gpu-check.json",
    "gpu-check-rehearsal.json",
}


def code_spans(text):
    """What stands between backticks in prose."""
    return SPAN.findall(FENCE.sub("", text))


def fences(text):
    """(language, code) of every block."""
    return FENCE.findall(text)


def is_path(word):
    """Whether a word claims to be a file or folder of this repository."""
    if not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)*/?", word) or word in MADE_BY_OTHERS:
        return False
    return word.endswith(SUFFIXES) or ("/" in word and word.split("/")[0] in FOLDERS)


def named_paths(text):
    """Paths in backticks, and those of a map: an indented name lies in the folder above it."""
    paths = [word for span in code_spans(text) for word in span.split() if is_path(word)]
    for language, code in fences(text):
        if language not in ("", "text"):
            continue
        folder = ""
        for line in code.splitlines():
            if not (words := line.split()):
                continue
            if not line[0].isspace():
                folder = words[0] if words[0].endswith("/") and is_path(words[0]) else ""
                paths += [words[0]] if is_path(words[0]) else []
            elif folder and is_path(words[0]):
                paths.append(folder + words[0])
    return paths


def missing_paths(text):
    """Paths that are named and do not exist; a bare file name may lie anywhere in the tree."""
    return [
        path
        for path in named_paths(text)
        if not (ROOT / path).exists()
        and ("/" in path or not any(any((ROOT / folder).rglob(path)) for folder in FOLDERS))
    ]


def commands(text):
    """Lines of shell that are named, in backticks or blocks."""
    blocks = [code for language, code in fences(text) if language in ("", "sh", "bash", "console")]
    return [*code_spans(text), *(line for code in blocks for line in code.splitlines())]


def missing_targets(text):
    """`make` targets that are named and that the Makefile has not."""
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, flags=re.M))
    named = {name for line in commands(text) for name in re.findall(r"\bmake ([a-z][\w-]*)", line)}
    return named - targets


def missing_commands(text):
    """`vivace` commands that are named and do not exist."""
    start = r"^(?:\$ )?(?:\S*/)?(?:python3? -m )?vivace ([a-z][\w-]*)"
    named = {found[1] for line in commands(text) if (found := re.match(start, line.strip()))}
    return named - COMMANDS.keys()


def missing_names(text):
    """What Python blocks import from the package and it has not."""
    missing = []
    for language, code in fences(text):
        for node in ast.walk(ast.parse(code)) if language == "python" else ():
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vivace"):
                module = import_module(str(node.module))
                missing += [a.name for a in node.names if not hasattr(module, a.name)]
    return missing


CHECKS = [missing_paths, missing_targets, missing_commands, missing_names]


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_what_a_page_names_exists(page, check):
    assert not check((ROOT / page).read_text(encoding="utf-8"))


def test_the_readme_shows_the_two_commands_the_map_and_an_example():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first_screen = "\n".join(text.splitlines()[:40])
    assert "make demo" in first_screen
    assert "make test" in first_screen
    assert {"engine/scheduler.py", "serving/servicer.py"} <= set(named_paths(text))
    assert "python" in {language for language, _ in fences(text)}


WRONG = [
    (missing_paths, "see `engine/no_such_file.py`"),
    (missing_paths, "see `no_such_page.md`"),
    (missing_paths, "```\nengine/      the engine\n  no_such_file.py    nothing\n```"),
    (missing_paths, "```text\nserving/no_such_file.py\n```"),
    (missing_targets, "run `make dinner`"),
    (missing_targets, "```sh\ncd vivace && make dinner\n```"),
    (missing_commands, "run `vivace sing`"),
    (missing_commands, "```sh\n.venv/bin/vivace sing MODEL\n```"),
    (missing_names, "```python\nfrom vivace import Nothing\n```"),
]


@pytest.mark.parametrize(("check", "text"), WRONG)
def test_a_check_finds_what_does_not_exist(check, text):
    assert check(text)


def test_the_checks_pass_what_exists():
    text = (
        "`engine/core.py`, `pyproject.toml`, `config.json`, `make demo`, `vivace serve MODEL`\n"
        "```\nengine/   the engine\n  core.py   the loop\n  models/spec.py\nmake test\n```\n"
        "```python\nfrom vivace import LLM\n```\n"
    )
    assert [check(text) for check in CHECKS if check(text)] == []
