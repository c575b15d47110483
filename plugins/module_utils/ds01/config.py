"""The limits file and the MIG layouts on disk: read, checked against their schemas, parsed. An adapter."""

from __future__ import annotations

import difflib
import json
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import limits
from .errors import Ds01Error
from .libraries import require

if TYPE_CHECKING:
    from .layouts import Layouts

SCHEMA_NAME = "resource-limits.schema.json"
LAYOUTS_SCHEMA_NAME = "mig-layouts.schema.json"
MAX_BYTES = 4 * 1024 * 1024
_MERGE, _TEXT = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:str"
_LIMITS_HINTS = (
    "On a server playbooks/site.yml puts it there; DS01_CONFIG names another.",
    "Start from config/resource-limits.yaml; nothing is granted without it.",
)
_LAYOUTS_HINTS = (
    "Start from config/mig-layouts.yaml, or name the profiles of each GPU instead.",
    "Start from config/mig-layouts.yaml.",
)
_PLAIN_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")


def _invalid(path: Path, problem: str, hint: str = "") -> Ds01Error:
    return Ds01Error("config_invalid", f"{path}: {problem}", hint)


def _yaml_loader(yaml: Any) -> type:
    """PyYAML's safe loader (the C one where there is one), without YAML 1.1's surprises."""

    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key_node, _ in node.value:
                if not isinstance(key_node.value, str) or key_node.tag == _MERGE:
                    continue
                if key_node.value in seen:
                    problem = f"the key {key_node.value!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key_node.value)
                key_node.tag = _TEXT  # a group or user called no, or 1001, is called just that
            return super().construct_mapping(node, deep)

        def construct_plain_int(self, node: Any) -> int | str:
            # YAML 1.1 reads 1:0 as 60 and 010 as 8; nobody who writes that means it.
            return int(node.value) if _PLAIN_INT.fullmatch(node.value) else node.value

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_plain_int)
    return Loader


def read_document(path: Path, what: str = "limits file", hints: tuple[str, str] = _LIMITS_HINTS) -> Mapping[str, Any]:
    """The YAML document, or Ds01Error `config_invalid` with file and line. `what` names the file to people,
    `hints` say what helps where it cannot be read, and where it is empty."""
    yaml = require("yaml", "PyYAML")
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise _invalid(path, f"the {what} cannot be read ({exc.strerror}).", hints[0]) from None
    if len(data) > MAX_BYTES:
        raise _invalid(path, f"the {what} is larger than {MAX_BYTES // 1024**2} MiB.")
    try:
        document = yaml.load(data, Loader=_yaml_loader(yaml))
    except yaml.MarkedYAMLError as exc:
        line = f"line {exc.problem_mark.line + 1}: " if exc.problem_mark else ""
        raise _invalid(path, f"{line}{exc.problem}.") from None
    except (yaml.YAMLError, ValueError) as exc:
        raise _invalid(path, f"this is not YAML: {' '.join(str(exc).split())}.") from None
    if document is None:
        raise _invalid(path, f"the {what} is empty.", hints[1])
    return document


def _validate(document: Any, path: Path, schema_name: str) -> None:
    schema = json.loads(find_schema(path, schema_name).read_text(encoding="utf-8"))
    fastjsonschema = require("fastjsonschema", "fastjsonschema")
    try:
        fastjsonschema.compile(schema, use_default=False)(document)
    except fastjsonschema.JsonSchemaValueException as exc:
        raise _invalid(path, _explain(exc)) from None


def _explain(exc: Any) -> str:
    """One sentence from a schema error: where, what, and the nearest key that would be valid."""
    where = ".".join(str(part) for part in exc.path[1:]) or "the file"
    if exc.rule == "additionalProperties" and isinstance(exc.value, Mapping):
        known = sorted(exc.definition.get("properties", {}))
        key = next(str(k) for k in exc.value if k not in known)
        near = difflib.get_close_matches(key, known, n=1)
        path = key if where == "the file" else f"{where}.{key}"
        suggestion = f"; did you mean {near[0]}?" if near else f"; valid here: {', '.join(known)}."
        return f"{path}: unknown key{suggestion}"
    definition, value = exc.definition, exc.value
    if exc.rule == "propertyNames" and isinstance(value, Mapping):
        definition = definition["propertyNames"]
        value = next(key for key in value if not re.fullmatch(definition["pattern"], str(key)))
    expected = definition.get("x-expected") or exc.message.split(" must be ")[-1]
    return f"{where}: {reprlib.repr(value):.120} is not allowed here; expected {expected}."


def _members(directory: Path) -> dict[str, tuple[str, ...]]:
    """Members by group from `<group>.members` files: a name a line, `#` starts a comment."""
    if not directory.exists():
        return {}
    if not directory.is_dir():
        raise _invalid(directory, "this is not a directory; it holds <group>.members files.")
    result = {}
    try:
        # Not glob(): that takes a directory it may not read for an empty one.
        files = sorted(path for path in directory.iterdir() if path.suffix == ".members")
    except OSError as exc:
        raise _invalid(directory, f"the members files cannot be listed ({exc.strerror}).") from None
    for file in files:
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as exc:
            raise _invalid(file, f"the members file cannot be read ({exc}).") from None
        stripped = (line.partition("#")[0].strip() for line in lines)
        result[file.stem] = tuple(name for name in stripped if name)
    return result


def find_schema(config_path: Path, name: str) -> Path:
    """The schema beside the file, else the one of the checkout or the installed package."""
    here = Path(__file__).resolve()
    candidates = [
        config_path.parent / name,
        here.parents[3] / "config" / name,
        Path("/etc/ds01") / name,
    ]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise _invalid(config_path, f"{name} was not found beside it.", "Run playbooks/site.yml to install it.")


def load(path: Path) -> limits.Config:
    """The checked configuration. Raises Ds01Error `config_invalid`; never falls back to anything."""
    document = read_document(path)
    _validate(document, path, SCHEMA_NAME)
    try:
        parsed = limits.parse_config(document, _members(path.parent / "groups"))
    except Ds01Error as exc:
        raise _invalid(path, exc.message) from None
    near = difflib.get_close_matches(parsed.default_group, parsed.groups, n=1, cutoff=0.8)
    if near and parsed.default_group not in parsed.groups:
        raise _invalid(path, f"default_group: no group is called {parsed.default_group!r}; did you mean {near[0]}?")
    return parsed


def load_layouts(path: Path) -> Layouts:
    """The checked MIG layouts. Raises Ds01Error `config_invalid` with the path of what is wrong."""
    from . import layouts  # most runs need the limits alone

    document = read_document(path, "file of MIG layouts", _LAYOUTS_HINTS)
    _validate(document, path, LAYOUTS_SCHEMA_NAME)
    try:
        return layouts.parse(document)
    except Ds01Error as exc:
        raise _invalid(path, exc.message) from None
