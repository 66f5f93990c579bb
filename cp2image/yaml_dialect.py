"""YAML as experiments are written in. Ground floor: PyYAML only.

Numbers and booleans are those of YAML 1.2, so that plate ``0123``, well ``NO`` and date-like names
stay text and ``1e-3`` is a number; a key that stands twice is refused. What is written reads back
the same here and in a YAML 1.1 reader.
"""

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_RESOLVERS = [
    (_TAG + "null", re.compile(r"(~|null|Null|NULL|)\Z")),
    (_TAG + "bool", re.compile(r"(true|True|TRUE|false|False|FALSE)\Z")),
    (_TAG + "int", re.compile(r"[-+]?(0|[1-9]\d*)\Z")),
    (
        _TAG + "float",
        re.compile(
            r"([-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))"
            r"|\.(nan|NaN|NAN))\Z"
        ),
    ),
    (_TAG + "merge", re.compile(r"<<\Z")),
]
_READ = {None: _RESOLVERS}
_WRITTEN = {**yaml.SafeDumper.yaml_implicit_resolvers, None: _RESOLVERS}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _READ

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {key.value!r} stands here and in line {seen[key.value]}; "
                        "remove one of them",
                        problem_mark=key.start_mark,
                    )
                seen[key.value] = key.start_mark.line + 1
        return node


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _WRITTEN

    def represent_text(self, text: str) -> yaml.ScalarNode:
        # Line breaks beyond ASCII would be folded when read back, unless they are escaped.
        style = None if text.isprintable() else '"'
        return self.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)


def load_yaml(text: str) -> Any:
    """Return the content of one YAML document.

    Raises
    ------
    ValueError
        Naming the line and what is wrong there, without quoting the text around it.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        problem = " ".join(part for part in (error.context, error.problem) if part)
        hint = "; indent with spaces, not tabs" if "\\t" in problem else ""
        raise ValueError(f"{line}{problem}{hint}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def dump_yaml(data: Any) -> str:
    """Return ``data`` as YAML, keys in their own order."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text
