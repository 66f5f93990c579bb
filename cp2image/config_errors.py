"""Pydantic's findings in the words of a config's reader. Ground floor: pydantic only."""

import json
import re
from typing import get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cp2image.columns import nearest

_EXPECTED = {
    "bool": "true or false",
    "dict": "keys with values, as {DNA: OrigDNA}",
    "float": "a number",
    "int": "a whole number",
    "list": "a list, as [a, b]",
    "model": "keys below it",
    "string": "text",
    "tuple": "a list, as [a, b]",
}
"""By the first part of pydantic's error types, such as ``int_parsing``."""


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """Return one line per problem of a config that pydantic refused, with the nearest known key."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    lines = [_sentence(problem, model) for problem in problems]
    return lines[0] if len(lines) == 1 else "\n  ".join([f"{len(lines)} problems", *lines])


def _sentence(problem: ErrorDetails, model: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    kind, message, found = problem["type"], problem["msg"], problem["input"]
    if kind == "extra_forbidden":
        key = str(problem["loc"][-1])
        hint = nearest(key, _keys_at(problem["loc"][:-1], model)) or _home(key, model)
        return f"unknown key {path!r}{hint}"
    if kind == "missing":
        return f"{path} is missing"
    if kind == "string_too_short":
        message = "expected text"
    if kind == "too_short":
        message = f"expected {problem.get('ctx', {}).get('min_length', 1)} or more"
    if kind == "too_long":
        context = problem.get("ctx", {})
        message = f"expected {context['max_length']} values, not {context['actual_length']}"
    if kind.endswith(("_type", "_parsing", "_from_float")):
        message = f"expected {_EXPECTED.get(kind.split('_')[0], message)}"
    message = message.removeprefix("Value error, ").removeprefix("Input ")
    if isinstance(found, BaseModel | dict):
        return f"{path}: {message}"
    hint = nearest(found, re.findall(r"'([^']+)'", message)) if isinstance(found, str) else ""
    shown = json.dumps(found, ensure_ascii=False, default=str)
    return f"{path} = {shown:.80}: {message}{hint}"


def _home(key: str, model: type[BaseModel]) -> str:
    sections = [s for s in model.model_fields if key in _keys_at((s,), model)]
    return f" (it belongs below '{sections[0]}:')" if sections else ""


def _keys_at(path: tuple[int | str, ...], model: type[BaseModel]) -> list[str]:
    for part in path:
        field = model.model_fields.get(str(part))
        options = get_args(field.annotation) or (field.annotation,) if field else ()
        inner = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)
