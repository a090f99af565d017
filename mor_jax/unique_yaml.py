"""YAML in which a key stands once: the library's reader keeps the last of two without a word."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [key for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        names = [self.construct_object(key, deep=True) for key in keys if key.tag != "tag:yaml.org,2002:merge"]
        twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """What a YAML text says, in Python's plain types.

    >>> load_yaml("{rank: 8, targets: [q_proj]}")
    {'rank': 8, 'targets': ['q_proj']}

    Raises:
      yaml.YAMLError: it is not YAML, or a mapping has a key twice.
    """
    return yaml.load(text, Loader=_Loader)  # a safe loader
