# SPDX-License-Identifier: Apache-2.0
"""Hold what we rely on in the hosts (facts.json) to the source of their wheels.

python tests/hosts/compare_with_wheels.py --folder FOLDER downloads the pinned wheels, reads them
without importing anything, and says in a sentence what has moved. With --version HOST==VERSION it
reads another one than the pinned. It needs a network, and is no part of CI.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hosts import wheels

Source = Callable[[str], "str | None"]


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Names, with defaults as they are written, and with the marks of Python's syntax."""
    found: list[str] = []
    plain = [*node.args.posonlyargs, *node.args.args]
    defaults = [None] * (len(plain) - len(node.args.defaults)) + [*node.args.defaults]
    found += [_parameter(arg, default) for arg, default in zip(plain, defaults, strict=True)]
    if node.args.vararg:
        found.append(f"*{node.args.vararg.arg}")
    elif node.args.kwonlyargs:
        found.append("*")
    pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    found += [_parameter(arg, default) for arg, default in pairs]
    if node.args.kwarg:
        found.append(f"**{node.args.kwarg.arg}")
    return found


def _parameter(arg: ast.arg, default: ast.expr | None) -> str:
    return arg.arg if default is None else f"{arg.arg}={ast.unparse(default)}"


def definition(tree: ast.AST, path: str) -> Any:
    """The function or class that a dotted path names in a module."""
    for name in path.split("."):
        inside = [node for node in ast.walk(tree) if _is_called(node, name)]
        direct = [node for node in ast.iter_child_nodes(tree) if _is_called(node, name)]
        if not (direct or inside):
            return None
        tree = (direct or inside)[-1]
    return tree


def _is_called(node: ast.AST, name: str) -> bool:
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    return isinstance(node, kinds) and node.name == name


def found_in(tree: ast.Module, fact: dict[str, Any]) -> Any:
    """What a module has in the place of a fact; None where it has nothing of the kind."""
    what, name = fact["what"], fact["name"]
    if what == "parameters":
        node = definition(tree, name)
        return parameters(node) if isinstance(node, ast.FunctionDef) else None
    if what == "bases":
        node = definition(tree, name)
        return [ast.unparse(base) for base in node.bases] if node else None
    if what == "fields":
        node = definition(tree, name)
        names = [each.target.id for each in node.body if _is_field(each)] if node else []
        return [each for each in fact["is"] if each in names] if names else None
    if what == "value":
        scope = tree
        *owner, last = name.split(".")
        if owner:
            scope = definition(tree, ".".join(owner))
        return _value(scope, last)
    if what == "import":
        return _imported(tree, name)
    scope = definition(tree, fact["in"])
    calls = [each for each in ast.walk(scope) if _calls(each, name)] if scope else []
    forms = [_form(call) for call in calls]
    return fact["is"] if fact["is"] in forms else (forms[0] if forms else None)


def _is_field(node: ast.AST) -> bool:
    return isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)


def _value(scope: ast.AST | None, name: str) -> str | None:
    for node in ast.walk(scope) if scope else ():
        targets = node.targets if isinstance(node, ast.Assign) else []
        if isinstance(node, ast.AnnAssign) and node.value:
            targets = [node.target]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return ast.unparse(node.value)
    return None


def _imported(tree: ast.AST, name: str) -> bool | None:
    module, _, what = name.rpartition(".")
    found = [each for each in ast.walk(tree) if isinstance(each, ast.ImportFrom)]
    names = [alias.name for each in found if each.module == module for alias in each.names]
    return True if what in names else None


def _calls(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == name


def _form(call: ast.Call) -> dict[str, Any]:
    return {
        "positional": len(call.args),
        "keywords": sorted(each.arg or "**" for each in call.keywords),
    }


def moved(host: dict[str, Any], source: Source) -> Iterator[str]:
    """A sentence for every fact that a host's source does not bear out."""
    for fact in host["facts"]:
        text = source(fact["module"])
        where = f"{host['distribution']}: {fact['module']}"
        if text is None:
            yield f"{where} is gone"
            continue
        found = found_in(ast.parse(text), fact)
        called = f" in {fact['in']}" if "in" in fact else ""
        if found is None:
            yield f"{where} has no {fact['what']} {fact['name']}{called} any more"
        elif found != fact["is"]:
            yield (
                f"{where}: the {fact['what']} of {fact['name']}{called} was {fact['is']} and is "
                f"{found}"
            )


def main() -> None:
    """Compare all hosts, and fail where something has moved."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where wheels are kept; else a temporary one")
    parser.add_argument("--version", action="append", default=[], metavar="HOST==VERSION")
    options = parser.parse_args()
    others = dict(each.split("==") for each in options.version)
    sentences = []
    with tempfile.TemporaryDirectory() as temporary:
        for host in wheels.facts():
            if host["version"] is None:
                print(f"{host['distribution']} has no wheel: its facts are read, not compared")
                continue
            version = others.get(host["distribution"], host["version"])
            folder = options.folder or Path(temporary)
            root = wheels.fetch(host["distribution"], version, folder)
            these = list(moved(host, lambda module, root=root: wheels.source(root, module)))
            name, count = host["distribution"], len(host["facts"])
            print(f"{name} {version}: {count} facts, {len(these)} moved")
            sentences += these
    print(*sentences, sep="\n")
    sys.exit(bool(sentences))


if __name__ == "__main__":
    main()
