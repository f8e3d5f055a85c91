"""Words to the tree of settings, and the tree to words.

What comes later wins: the defaults, one TOML file, `--set key=value`, the flags. A file's models give way to those named on
the command line. Decides what a word means; what a value may be is `engine/config.py`'s to say.
"""

import json
import re
import tomllib
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from vivace.engine.config import ServeConfig, choices_of
from vivace.engine.errors import ConfigError

FLAGS = {  # what people set daily
    "host": "server.host",
    "port": "server.port",
    "insecure": "server.insecure",
    "backend": "backend",
    "device": "device",
    "strict-jit": "gpu.strict_jit",
    "quantize": "weights.quantize",
    "cache-dir": "weights.cache_dir",
    "kv-cache-dtype": "cache.dtype",
    "threads": "cpu.threads",
    "kv-memory": "cache.memory_bytes",
    "max-context": "max_context_tokens",
    "max-running": "scheduler.max_running",
    "max-waiting": "scheduler.max_waiting",
}
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
SIZE = re.compile(r"(\d+)(KiB|MiB|GiB)")
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
MODELS = "models: name to clients = folder, relative to where the server is started"

Tables = dict[str, Any]


def add_flags(parser: ArgumentParser) -> None:
    """What a command takes that `from_words` is to read."""
    parser.add_argument(
        "models",
        nargs="*",
        type=Path,
        metavar="MODEL",
        help="a folder with config.json and *.safetensors",
    )
    parser.add_argument(
        "--name",
        action="append",
        default=[],
        help="a model's name to clients, once for each MODEL (default: the folder's)",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="settings, as a TOML file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any setting, such as scheduler.max_running=8; may be repeated; "
        "`vivace config` prints them all",
    )
    for flag in FLAGS:
        add_flag(parser, flag)


def add_flag(parser: ArgumentParser, flag: str) -> None:
    """One of FLAGS; its value is left as it was written."""
    one = _find(FLAGS[flag])
    words: dict[str, Any] = {"action": "store_const", "const": "true"}
    if one.type is not bool:
        words = {"metavar": "SIZE" if one.name.endswith("_bytes") else "VALUE"}
    parser.add_argument(f"--{flag}", help=_about(one).replace("%", "%%"), **words)


def from_words(args: Namespace) -> ServeConfig:
    """The tree that the arguments of `add_flags` ask for. Raises ConfigError."""
    tables = {} if args.config is None else _read(args.config)
    for word in args.set:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise ConfigError(f"--set must be KEY=VALUE, got {word!r}")
        _put(tables, key.strip(), _parsed(value))
    for flag, path in FLAGS.items():
        if (value := getattr(args, flag.replace("-", "_"))) is not None:
            _put(tables, path, _parsed(value))
    if args.models or args.name:
        tables["models"] = _named(args.models, args.name)
    return from_tables(tables)


def from_tables(tables: Tables) -> ServeConfig:
    """The tree that parsed TOML asks for. Raises ConfigError naming the setting, its value and what is allowed."""
    tree: ServeConfig = _section(ServeConfig, "", tables)
    return tree


def to_toml(config: ServeConfig, remarks: Mapping[str, Sequence[str]]) -> str:
    """The whole tree, every setting with its meaning; `from_tables` reads it back. `remarks`: lines on a model."""
    lines: list[str] = []
    for one in fields(config):
        value = getattr(config, one.name)
        if one.name == "models":
            lines += ["", f"# {MODELS}", "[models]"]
            for name, folder in value.items():
                key = name if BARE_KEY.fullmatch(name) else _string(name)
                lines.append(f"{key} = {_string(str(folder))}")
                lines += (f"#   {remark}" for remark in remarks.get(name, ()))
        elif is_dataclass(value):
            about = (type(value).__doc__ or "").rstrip(".")
            lines += ["", f"[{one.name}]  # {about}"]
            lines += (
                _line(f"{one.name}.", part, getattr(value, part.name)) for part in fields(value)
            )
        else:
            lines.append(_line("", one, value))
    return "\n".join(lines) + "\n"


def _read(path: Path) -> Tables:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def _parsed(text: str) -> Any:
    """A value as TOML has it; a bare word is a text."""
    try:
        table = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError as error:
        if text[:1] in ("", '"', "'", "[", "{"):
            raise ConfigError(f"not a TOML value: {text!r}: {error}") from error
        return text
    if len(table) != 1:
        raise ConfigError(f"one value, not several lines: {text!r}")
    return table["value"]


def _put(tables: Tables, path: str, value: Any) -> None:
    """Set one value; a table is merged into what is there."""
    section, _, key = path.partition(".")
    if key:
        value = {key: value}
    before = tables.get(section)
    if isinstance(before, dict) and isinstance(value, dict):
        value = {**before, **value}
    tables[section] = value


def _named(folders: Sequence[Path], names: Sequence[str]) -> Tables:
    if names and len(names) != len(folders):
        raise ConfigError(
            f"--name must be given once for each MODEL or not at all, "
            f"got {len(names)} for {len(folders)}"
        )
    models: Tables = {}
    for folder, name in zip(folders, names or [f.resolve().name for f in folders], strict=True):
        if name in models:
            raise ConfigError(
                f"models must have different names, got {name!r} for {models[name]} and {folder}; "
                "give each one with --name"
            )
        models[name] = str(folder)
    return models


def _section(kind: Any, prefix: str, table: Any) -> Any:
    if not isinstance(table, dict):
        raise ConfigError(f"{prefix[:-1]} must be a table of settings, got {table!r}")
    known = {one.name: one for one in fields(kind)}
    if unknown := table.keys() - known.keys():
        name = min(unknown)
        raise ConfigError(
            f"{prefix}{name} ({table[name]!r}) is no setting; there are "
            + ", ".join(f"{prefix}{one}" for one in known)
        )
    return kind(**{key: _value(known[key], prefix + key, raw) for key, raw in table.items()})


def _value(one: Field[Any], path: str, raw: Any) -> Any:
    """What TOML has no word for: sections, folders, choices, sizes. All else is taken as it is, and checked by the tree."""
    if is_dataclass(one.type):
        return _section(one.type, f"{path}.", raw)
    if one.name == "models":
        return _folders(raw)
    if isinstance(raw, str):
        if (choices := choices_of(one)) is not None:
            return next((member for member in choices if member.value == raw), raw)
        if one.type == Path | None and raw:
            return Path(raw)
        if one.name.endswith("_bytes") and (size := SIZE.fullmatch(raw)):
            return int(size[1]) * UNITS[size[2]]
    return raw


def _folders(raw: Any) -> dict[str, Path]:
    if not isinstance(raw, dict):
        raise ConfigError(f"models must be a table, name = folder, got {raw!r}")
    for name, folder in raw.items():
        if not (isinstance(folder, str) and folder):
            raise ConfigError(f"models.{name} must be the path of a folder, got {folder!r}")
    return {name: Path(folder) for name, folder in raw.items()}


def _find(path: str) -> Field[Any]:
    kind: Any = ServeConfig
    for part in path.split("."):
        one = next(one for one in fields(kind) if one.name == part)
        kind = one.type
    return one


def _line(prefix: str, one: Field[Any], value: Any) -> str:
    flags = (flag for flag, path in FLAGS.items() if path == prefix + one.name)
    about = _about(one) + "".join(f" (--{flag})" for flag in flags)
    return (
        f"# {one.name} =  # {about}"
        if value is None
        else f"{one.name} = {_toml(one, value)}  # {about}"
    )


def _about(one: Field[Any]) -> str:
    text: str = one.metadata["about"]
    return text if one.default is None else f"{text}; default {_toml(one, one.default)}"


def _toml(one: Field[Any], value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Enum):
        return _string(value.value)
    if isinstance(value, str | Path):
        return _string(str(value))
    if one.name.endswith("_bytes"):
        for unit, size in reversed(UNITS.items()):
            if value % size == 0:
                return f'"{value // size}{unit}"'
    return repr(value)


def _string(text: str) -> str:
    """TOML's strings are JSON's, but for the one control character that JSON lets through."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
