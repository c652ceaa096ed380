"""YAML as people write it: read strictly, so that nothing a user wrote is silently lost.

`1e-3` is a number (plain YAML 1.1 takes it for text) and a key given twice is an error (plain YAML
keeps the last). Knows nothing of what the documents say.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from evomerge.errors import SpecError


def read_yaml(path: Path) -> object:
    """Parse a YAML file. Raises SpecError if it cannot be read or does not parse."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except FileNotFoundError:
        raise SpecError(str(path), ["no such file"]) from None
    except OSError as error:
        raise SpecError(str(path), [f"cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError:
        raise SpecError(str(path), ["cannot be read: is not UTF-8 text"]) from None
    except yaml.YAMLError as error:
        place, said = _told(error)
        raise SpecError(f"{path}{place}", [f"not YAML: {said}"]) from None


def not_yaml(path: Path, error: Exception) -> str:
    """`FILE, line 5: not YAML: ...`, of what reading or parsing a file has raised."""
    place, said = _told(error)
    return f"{path}{place}: not YAML: {said}"


def _told(error: Exception) -> tuple[str, str]:
    """Where a parser noticed the fault, and what it is; without the state it was in."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
        return f", line {error.problem_mark.line + 1}", error.problem
    return "", " ".join(str(error).split())


class _Loader(yaml.SafeLoader):
    """The safe loader with YAML 1.2's floats, and without duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key_node, yaml.ScalarNode) and key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key if isinstance(key_node, yaml.ScalarNode) else id(key_node))
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)
