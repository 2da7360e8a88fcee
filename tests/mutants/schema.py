# SPDX-License-Identifier: Apache-2.0
"""All mutants of a header in one copy of it: a mutant schema.

A number chooses, while the program runs, which mutant the copy behaves as. The innermost block
of statements around a changed text becomes

    { if (VSA_MUTANT == 3) { the changed block } else { the block } }

so a kernel is compiled once for all mutants, not once for each. A change outside of functions, of
a constant or a member, cannot be chosen at run time: such a mutant is left to the caller.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

Change = tuple[int, int, str]
"""Where a text begins and ends, and what becomes of it."""


@dataclass
class Block:
    """The text within a pair of braces, from `begin` to `end`."""

    begin: int
    end: int
    statements: bool
    inner: list[Block] = field(default_factory=list)
    mutants: dict[int, str] = field(default_factory=dict)

    def innermost(self, begin: int, end: int) -> list[Block]:
        """The blocks around a text, the innermost first."""
        for block in self.inner:
            if block.begin <= begin and end <= block.end:
                return [*block.innermost(begin, end), block]
        return []

    def written(self, text: str) -> str:
        """The block as a schema."""
        parts, at = [], self.begin
        for block in self.inner:
            parts += [text[at : block.begin], block.written(text)]
            at = block.end
        code = "".join([*parts, text[at : self.end]])
        for number, mutated in self.mutants.items():
            code = f" if (VSA_MUTANT == {number}) {{{mutated}}} else {{{code}}} "
        return code


def without_comments(text: str) -> str:
    return re.sub(r"""("(?:\\.|[^"\\])*")|//[^\n]*""", lambda found: found[1] or "", text)


def blocks(text: str) -> Block:
    """The braces of a text without comments, as a tree."""
    whole = Block(0, len(text), statements=False)
    around = [whole]
    for found in re.finditer(r'"(?:\\.|[^"\\])*"|[{}]', text):
        if found[0] == "{":
            before = text[: found.start()].rstrip()
            head = re.split(r"[;{}]", before)[-1]
            statements = re.search(r"(\)|\]|\)\s*const|\belse|\bdo)$", before) is not None
            # What is evaluated while compiling cannot ask which mutant it is.
            statements &= re.search(r"(?<!if )\bconstexpr\b", head) is None
            block = Block(found.end(), -1, statements)
            around[-1].inner.append(block)
            around.append(block)
        elif found[0] == "}":
            around.pop().end = found.start()
    assert len(around) == 1, "braces come in pairs"
    return whole


def schema(text: str, changes: Mapping[int, Change]) -> tuple[str, set[int]]:
    """A text without comments as the schema of its mutants, and those that are in it."""
    whole, taken = blocks(text), set()
    for number, (begin, end, new) in changes.items():
        around = whole.innermost(begin, end)
        block = next((block for block in around if block.statements), None)
        if block is not None:
            block.mutants[number] = text[block.begin : begin] + new + text[end : block.end]
            taken.add(number)
    return whole.written(text), taken
