# SPDX-License-Identifier: Apache-2.0
"""Marks in a copy of the forward kernel's headers, for bench/work_tile_clocks.py.

A mark names the part of the work that ends there, by its number in ``PARTS``; what it does is in
work_tile_clocks.cu. It replaces a text of a header that it quotes, so a kernel that has changed
there is an error, not a clock of something else.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).resolve().parent.parent / "csrc"
LAUNCH = "launch to first queries"
"""Of a consumer, from where its block sets up its barriers."""
CONSUMER = ("wait for queries", "first chunk and keys", "main loop", "finish and store")
"""Of a consumer's work tile, one after the other; its first wait for queries ends the launch."""
SCHEDULER = (
    *("take work tile", "begin work tile", "find", "arrange"),
    *("open chunk", "write loads", "write steps"),
)
"""Of the scheduler's first chunk, from where the scheduler warp begins."""
PARTS = (LAUNCH, *CONSUMER, *SCHEDULER)


class Mark(NamedTuple):
    """What becomes of a text that a header of csrc has once, however its lines are broken.

    Attributes:
        header: its path in csrc.
        quote: the text.
        becomes: the same with ``mark(part)`` where parts end, each by its name in quotes.
    """

    header: str
    quote: str
    becomes: str


FORWARD, SCHEDULE = "kernels/fine/forward.h", "kernels/schedule/tile_scheduler.h"
MARKS = (
    Mark(
        FORWARD,
        "ResidentTiles<kConsumers> resident;",
        "ResidentTiles<kConsumers> resident; ConsumerClocks clocks[kConsumers];",
    ),
    Mark(
        FORWARD,
        "s.resident.init();",
        "s.resident.init(); for (ConsumerClocks& each : s.clocks) each.begin();",
    ),
    Mark(
        FORWARD,
        "VSA_DEVICE void mainloop() {",
        """VSA_DEVICE void mark(int part) { if (elect_one()) s_.clocks[w_].mark(part); }
        VSA_DEVICE void mainloop() {""",
    ),
    Mark(
        FORWARD,
        "mainloop(); if (work.tile >= 0) store(work); });",
        """mark("wait for queries"); mainloop(); mark("main loop");
        if (work.tile >= 0) store(work); mark("finish and store"); });""",
    ),
    # Waited for once more than without the mark. It is not where the loop waits, because a consumer
    # that has let its tile go begins there again in the middle of a work tile.
    Mark(
        FORWARD,
        "ConsumerStep held = steps_.first();",
        """ConsumerStep held = steps_.first();
        if (held.is(ConsumerStep::kCompute)) wait_keys(held); mark("first chunk and keys");""",
    ),
    Mark(
        FORWARD,
        "if (elect_one()) bulk_wait<0>();",
        "if (elect_one()) { bulk_wait<0>(); s_.clocks[w_].add(); }",
    ),
    Mark(
        SCHEDULE,
        "int next_ = 0, first_number_ = 0;",
        "int next_ = 0, first_number_ = 0; FirstChunkClocks clocks_;",
    ),
    Mark(
        SCHEDULE,
        "const WorkList list(p.queries,",
        "clocks_.begin(); const WorkList list(p.queries,",
    ),
    Mark(
        SCHEDULE,
        "begin_work_tile(work); const int64_t size",
        """clocks_.mark("take work tile"); begin_work_tile(work);
        clocks_.mark("begin work tile"); const int64_t size""",
    ),
    Mark(
        SCHEDULE,
        "find(work.batch, bitmaps + h * size, word); const int loads = arrange();",
        """find(work.batch, bitmaps + h * size, word); clocks_.mark("find");
        const int loads = arrange(); clocks_.mark("arrange");""",
    ),
    Mark(
        SCHEDULE,
        "write_loads(word, done); write_steps(work.batch, here,",
        """clocks_.mark("open chunk"); write_loads(word, done); clocks_.mark("write loads");
        write_steps(work.batch, here,""",
    ),
    Mark(
        SCHEDULE,
        "close(); flags = 0;",
        'clocks_.mark("write steps"); clocks_.end(); close(); flags = 0;',
    ),
)


def marked(header: str, text: str) -> str:
    """A header's text with its marks.

    Raises:
        SystemExit: where it does not have what a mark quotes, or has it more than once.
    """
    for mark in (mark for mark in MARKS if mark.header == header):
        pattern = r"\s+".join(map(re.escape, mark.quote.split()))
        found = list(re.finditer(pattern, text))
        if len(found) != 1:
            raise SystemExit(
                f"work_tile_clocks.py: error: a mark needs csrc/{header} to have this once, "
                f"but it has it {len(found)} times: {mark.quote}"
            )
        begin, end = found[0].span()
        text = text[:begin] + numbered(mark.becomes) + text[end:]
    return text


def numbered(code: str) -> str:
    """Code whose marks name their parts by number."""
    return re.sub(r'mark\("([^"]+)"\)', lambda name: f"mark({PARTS.index(name[1])})", code)


def marked_headers(folder: Path) -> Path:
    """A copy of csrc in this folder, with the marks."""
    copy = folder / "csrc"
    shutil.copytree(CSRC, copy)
    for header in {mark.header for mark in MARKS}:
        (copy / header).write_text(marked(header, (copy / header).read_text()))
    return copy
