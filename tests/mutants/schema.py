# SPDX-License-Identifier: Apache-2.0
"""All mutants of a header in one copy of it: a mutant schema.

A number chooses, while the program runs, which mutant the copy behaves as. The innermost block
of statements around a changed text becomes

    { if (VSA_MUTANT == 3) { the changed block } else { the block } }

so a kernel is compiled once for all mutants, not once for each. What initialises a member becomes

    member(VSA_MUTANT == 3 ? (the changed value) : (the value))

A change outside of functions, of a constant or a type, cannot be chosen at run time: such a mutant
is left to the caller, and costs a kernel of its own.
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

    def numbers(self) -> set[int]:
        """Of all mutants in it."""
        return set(self.mutants).union(*(block.numbers() for block in self.inner))

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


def narrowed(text: str, change: Change) -> Change:
    """A change without the words that it begins or ends with and leaves as they are.

    What stands around a mutant in its table, so that it is found once, may reach beyond the block
    that changes.
    """
    begin, end, new = change
    old_words, new_words = (re.findall(r"\s+|\w+|[^\w\s]", part) for part in (text[begin:end], new))

    def same(a: str, b: str) -> bool:
        return a == b or (a.isspace() and b.isspace())

    while old_words and new_words and same(old_words[0], new_words[0]):
        begin += len(old_words.pop(0))
        del new_words[0]
    while old_words and new_words and same(old_words[-1], new_words[-1]):
        end -= len(old_words.pop())
        del new_words[-1]
    return begin, end, "".join(new_words)


def initialiser(text: str, number: int, change: Change) -> tuple[str, str] | None:
    """What initialises a member, and the same as one that is chosen while the program runs."""
    begin, end, new = change
    before = re.search(r"[:,]\s*$", text[:begin])
    of_old, of_new = (re.fullmatch(r"(\w+)\((.*)\)", x, re.DOTALL) for x in (text[begin:end], new))
    if before is None or of_old is None or of_new is None or of_old[1] != of_new[1]:
        return None
    return of_old[0], f"{of_old[1]}(VSA_MUTANT == {number} ? ({of_new[2]}) : ({of_old[2]}))"


def schema(text: str, changes: Mapping[int, Change]) -> tuple[str, set[int]]:
    """A text without comments as the schema of its mutants, and those that are in it."""
    whole, initialisers = blocks(text), {}
    for number, change in changes.items():
        begin, end, new = narrowed(text, change)
        around = whole.innermost(begin, end)
        block = next((block for block in around if block.statements), None)
        if block is not None:
            block.mutants[number] = text[block.begin : begin] + new + text[end : block.end]
        elif (chosen := initialiser(text, number, change)) is not None:
            initialisers[number] = chosen
    code = whole.written(text)
    for old, chosen in initialisers.values():
        assert code.count(old) == 1, f"{old} initialises one member"
        code = code.replace(old, chosen)
    return code, whole.numbers() | initialisers.keys()
