"""Reading an experiment: YAML, overrides from the command line, no credentials. Above config."""

import re
from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from cp2image.config import Config
from cp2image.config_errors import explain
from cp2image.errors import ConfigError
from cp2image.storage import read_bytes
from cp2image.yaml_dialect import load_yaml


def read_config(uri: str | None, overrides: list[str] | None = None) -> Config:
    """Read a YAML file, apply ``section.key=value`` overrides, check it, fill its URIs.

    Parameters
    ----------
    uri
        Path or URI of the YAML file; None for the defaults alone.
    overrides
        Each ``section.key=value``, the value in YAML (``train.gamma=[1, 1, 0, 0]``).

    Raises
    ------
    ConfigError
        Naming the key or the line, what was found and what was expected.
    StorageError
        If the file cannot be read.
    """
    where = uri or "the defaults"
    if overrides:
        where += " with --set"
    data = {} if uri is None else _read_sections(uri)
    for override in overrides or []:
        _override(data, override)
    _refuse_credentials(data, where)
    sections = {
        key: {} if value is None and key in Config.model_fields else value
        for key, value in data.items()
    }
    try:
        return Config.model_validate(sections).resolve()
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, Config)}") from error


def _read_sections(uri: str) -> dict[str, Any]:
    try:
        data = load_yaml(read_bytes(uri).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{uri}: not text in UTF-8 ({error}); save it as UTF-8") from error
    except ValueError as error:
        raise ConfigError(f"{uri}: not YAML: {error}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        found = f"{data!r:.60}"
        raise ConfigError(f"{uri}: expected sections such as 'train:', found {found}")
    return data


def _override(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys) or len(keys) < 2:
        raise ConfigError(f"--set {path}: expected section.key=value, as train.steps=500")
    node: Any = data
    for depth, key in enumerate(keys[:-1], start=1):
        if node.get(key) is None:
            node[key] = {}
        node = node[key]
        if not isinstance(node, dict):
            raise ConfigError(f"--set {path}: {'.'.join(keys[:depth])!r} holds a value, not keys")
    try:
        node[keys[-1]] = load_yaml(text)
    except ValueError as error:
        raise ConfigError(f"--set {path}: the value is not YAML: {error}") from error


_CREDENTIALS = re.compile(r"s3://(?!anonymous@)[^/]*[:@]|://[^/@\s]+:[^/@\s]+@")


def _refuse_credentials(data: Any, where: str) -> None:
    for path, text in _texts(data):
        if _CREDENTIALS.search(text):
            raise ConfigError(
                f"{where}: {path} holds credentials in a URI; the config is logged and stored. "
                "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or MLFLOW_TRACKING_URI) instead"
            )


def _texts(node: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield path, node
    elif isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from _texts(value, f"{path}.{key}".lstrip("."))
