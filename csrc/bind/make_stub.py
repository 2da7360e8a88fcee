# SPDX-License-Identifier: Apache-2.0
"""Writes vsa/_C.pyi, what type checkers know of the compiled part.

usage: python csrc/bind/make_stub.py

Asks the ``vsa._C`` that this Python imports: its field tables, signatures and constants.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

STUB = Path(__file__).resolve().parents[2] / "vsa" / "_C.pyi"
HEAD = """\
# SPDX-License-Identifier: Apache-2.0
# Written by csrc/bind/make_stub.py from the tables of csrc/bind: change those, not this.
from collections.abc import Sequence
from typing import Any, ClassVar, Final, TypeAlias, final
"""
ACCEPTED = {
    "typing.SupportsInt | typing.SupportsIndex": "int",
    "dict[str, object]": "dict[str, Any]",
    "collections.abc.Sequence": "Sequence",
    "vsa._C.": "",
}
"""What pybind11 calls types of arguments and results, and what they are meant to be."""


def functions(owner: object) -> Iterator[str]:
    """Declarations of the functions of a module or class, as pybind11 heads their docstrings."""
    for name, function in sorted(vars(owner).items()):
        if callable(function) and not isinstance(function, type) and not name.startswith("_"):
            yield declaration(inspect.getdoc(function).splitlines()[0])


def declaration(declared: str) -> str:
    """A function as pybind11 heads its docstring, in the words of the stub."""
    for theirs, ours in ACCEPTED.items():
        declared = declared.replace(theirs, ours)
    return f"def {re.sub(r'self: [^,)]+', 'self', declared)}: ...\n"


def class_of(name: str, kind: type) -> str:
    """A class: of calls with a table of fields, or another one."""
    if hasattr(kind, "FIELDS"):
        return class_of_calls(name, kind)
    declared = (inspect.getdoc(kind.__init__) or "").splitlines()[0]
    body = "".join(f"    {function}" for function in functions(kind))
    if declared.startswith("__init__("):  # pybind11 heads its own docstrings so
        body = f"    {declaration(declared)}" + body
    elif not body:
        body = "    ...\n"
    return f'@final\nclass {name}:\n    """{kind.__doc__}"""\n\n{body}'


def class_of_calls(name: str, call: type) -> str:
    """A class, its keywords as its table has them."""
    keywords = "".join(f"        {field}: {kind},\n" for field, kind in call.FIELDS.items())
    body = "    FIELDS: ClassVar[dict[str, str]]\n"
    body += f"    def __init__(\n        self,\n        *,\n{keywords}    ) -> None: ...\n"
    body += "".join(f"    {function}" for function in functions(call))
    return f'@final\nclass {name}:\n    """{call.__doc__}"""\n\n{body}'


def stub(module: ModuleType) -> str:
    """The text of the stub."""
    parts = [HEAD]
    members = sorted(vars(module).items())
    for name, (definition, meaning) in module.TYPES.items():
        parts.append(f'{name}: TypeAlias = {definition}\n"""{meaning}"""\n')
    constants = ((name, x) for name, x in members if name.isupper())
    parts.append("".join(f"{name}: Final[{kind_of(x)}]\n" for name, x in constants))
    parts.append("".join(functions(module)))
    parts += (class_of(name, x) for name, x in members if isinstance(x, type))
    return "\n".join(parts)


def kind_of(value: object) -> str:
    """The type of a constant."""
    if isinstance(value, tuple):
        return f"tuple[{type(value[0]).__name__}, ...]"
    if isinstance(value, dict):
        return "dict[str, tuple[str, str]]"
    return type(value).__name__


if __name__ == "__main__":
    from vsa import _C

    STUB.write_text(stub(_C))
