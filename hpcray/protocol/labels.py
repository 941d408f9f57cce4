"""Conditions on the labels of nodes: written by users, sent as names, decided by every node. Pure.

    {"zone": "in(a,b)"}  --parse_selector-->  conditions  --name-->  "?zone=a,b"
    {"zone": In("a", "b"), "gpu": DoesNotExist()}              -->   "?!gpu;zone=a,b"
    the first, or else (fallback_strategy) {"zone": "c"}       -->   "?zone=a,b|zone=c"

A hard condition travels as a resource that the nodes which meet it offer without limit: queues,
grants and leases know nothing else of it. A soft one is offered by all (`~zone=a`), and those
that meet it are asked first. So are, of several alternatives, those that meet an earlier one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# (key, operator, values): "=" one of them, "!=" none of them (or no such label), "" there is such
# a label, "!" there is none.
Condition = tuple[str, str, tuple[str, ...]]

HARD = "?"
SOFT = "~"
# What a node that meets a condition offers of it, and what one task takes: enough for all.
OFFERED = 1 << 40
TAKEN = 1

_WORD = r"[A-Za-z0-9](?:[-._A-Za-z0-9]{0,61}[A-Za-z0-9])?"
_VALUE = re.compile(f"(?:{_WORD})?")
_NAME = re.compile(_WORD)
_DNS = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9]*[A-Za-z0-9])?")
_MANY = re.compile(r"in\((.*)\)")
_RULE = "at most 63 letters, digits, '-', '_' and '.', a letter or digit first and last"


def check_key(key: object) -> str:
    """
    Raises:
      TypeError, ValueError: it cannot name a label.
    """
    if not isinstance(key, str):
        raise TypeError(f"a label is named by a string, not {key!r}")
    prefix, slash, name = key.rpartition("/")
    if not _NAME.fullmatch(name):
        raise ValueError(f"{key!r} cannot name a label: {_RULE}")
    if slash and (len(prefix) > 253 or not all(map(_DNS.fullmatch, prefix.split(".")))):
        raise ValueError(f"{key!r} cannot name a label: before the slash comes a domain name")
    return key


def check_value(value: object) -> str:
    """
    Raises:
      TypeError, ValueError: no label can have it.
    """
    if not isinstance(value, str):
        raise TypeError(f"the value of a label is a string, not {value!r}")
    if not _VALUE.fullmatch(value):
        raise ValueError(f"{value!r} cannot be a label's value: {_RULE}")
    return value


def parse_selector(selector: Mapping[str, str]) -> list[Condition]:
    """The option `label_selector`: `value`, `!value`, `in(a,b)`, `!in(a,b)`.

    Raises:
      TypeError, ValueError: a key or value that cannot be.
    """
    found: list[Condition] = []
    for key, text in selector.items():
        check_key(key)
        if not isinstance(text, str):
            raise TypeError(f"label_selector[{key!r}] must be a string, not {text!r}")
        wanted = text.removeprefix("!")
        many = _MANY.fullmatch(wanted)
        values = tuple(v.strip() for v in many[1].split(",")) if many else (wanted,)
        try:
            if text == "!" or (many and "" in values):
                raise ValueError("it names no value")
            found.append((key, "=" if wanted == text else "!=", tuple(map(check_value, values))))
        except ValueError as error:
            raise ValueError(
                f"label_selector[{key!r}]={text!r}: {error}; write 'value', '!value', 'in(a,b)' or "
                "'!in(a,b)'") from None
    return found


def name(kind: str, *alternatives: Iterable[Condition]) -> str:
    """As a resource: equal conditions have equal names, whatever their order. Of alternatives the
    first is preferred."""
    return kind + "|".join(";".join(sorted({
        f"!{key}" if operator == "!" else f"{key}{operator}{','.join(sorted(set(values)))}"
        for key, operator, values in conditions})) for conditions in alternatives)


def is_condition(resource: str) -> bool:
    return resource[0] in "?~"


def prefers(resource: str) -> bool:
    """Whether some of the nodes that offer it are better than others."""
    return resource[0] == SOFT or (resource[0] == HARD and "|" in resource)


def rating(labels: Mapping[str, str], resource: str) -> int:
    """How well a node with these labels meets a condition: 0 best, up to the number of its
    alternatives, which says that it meets none."""
    alternatives = resource[1:].split("|")
    for index, text in enumerate(alternatives):
        if not text or all(_meets(labels, part) for part in text.split(";")):
            return index
    return len(alternatives)


def meets(labels: Mapping[str, str], resource: str) -> bool:
    """Whether a node with these labels meets all conditions in the name, or an alternative."""
    return rating(labels, resource) <= resource.count("|")


def _meets(labels: Mapping[str, str], text: str) -> bool:
    if text[0] == "!":
        return text[1:] not in labels
    key, equals, values = text.partition("=")
    if not equals:
        return key in labels
    if key[-1] == "!":
        return labels.get(key[:-1]) not in values.split(",")
    return labels.get(key) in values.split(",")


def parse_labels(text: str) -> dict[str, str]:
    """Labels of a node as HPCRAY_LABELS has them: JSON, or `zone=a,tier=fast`.

    Raises:
      ValueError: it is neither, or names what cannot be a label.
    """
    text = text.strip()
    if text.startswith("{"):
        import json

        found = json.loads(text)
    else:
        parts = [part.strip() for part in text.split(",") if part.strip()]
        if not all("=" in part for part in parts):
            raise ValueError(f"{text!r} is not of the form key=value,key=value")
        found = {key.strip(): value.strip()
                 for key, _, value in (part.partition("=") for part in parts)}
    return check_labels(found)


NODE_ID = "ray.io/node-id"
ACCELERATOR = "ray.io/accelerator-type"
HOST = "hpcray.io/host"


def check_labels(labels: Mapping[str, str]) -> dict[str, str]:
    """
    Raises:
      TypeError, ValueError: naming what cannot be a label.
    """
    for key, value in labels.items():
        check_key(key)
        try:
            check_value(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"labels[{key!r}]: {error}") from None
        if key == NODE_ID:
            raise ValueError(f"{NODE_ID} is the node's own label and cannot be given")
    return dict(labels)
