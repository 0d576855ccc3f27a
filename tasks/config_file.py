"""The config file, looked at before its settings are read: is it there, is it YAML, does it hold each name once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile

from adalink.errors import ConfigError

__all__ = ["ConfigFile", "check_config_file"]


class ConfigFile(ActionConfigFile):  # type: ignore[misc]  # untyped here
    """The option `--config`."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Check the file, then take its settings."""
        check_config_file(Path(values))
        super().__call__(parser, cfg, values, option_string)


def check_config_file(path: Path) -> None:
    """Raises ConfigError, with line and column, where the file is missing, is no YAML, holds no names, or one of them twice."""
    try:
        text = path.read_text(encoding="utf-8")
        yaml.safe_load(text)  # refuses tags that would make objects
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
    except FileNotFoundError:
        raise ConfigError(f"the config {path} does not exist: check the path") from None
    except OSError as error:
        raise ConfigError(f"the config {path} cannot be read ({error.strerror}): give a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"the config {path} is not text in UTF-8 ({error.reason} at byte {error.start}): give a YAML file") from None
    except yaml.MarkedYAMLError as error:
        place = f" at line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}" if error.problem_mark else ""
        raise ConfigError(f"the config {path} is not YAML: {error.problem}{place}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"the config {path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(tree, yaml.MappingNode):
        found = "nothing" if tree is None else "a list" if isinstance(tree, yaml.SequenceNode) else "one value"
        raise ConfigError(f"the config {path} holds {found}: expected names with values, such as `task: captioning`")
    for name, line in _twice(tree):
        raise ConfigError(f"the config {path} gives {name!r} a second time at line {line}: keep one of them")


def _twice(node: yaml.Node) -> Iterator[tuple[str, int]]:
    """(name, line) of every name that stands twice in one mapping; YAML would take the last and say nothing."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    yield key.value, key.start_mark.line + 1
                seen.add(key.value)
            yield from _twice(value)
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _twice(item)
