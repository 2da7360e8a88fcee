# SPDX-License-Identifier: Apache-2.0
"""The backward's own kernels with bugs put into them: the emulator finds each one by its name."""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
PROGRAM = ROOT / "tests" / "cpp" / "fine_backward.cpp"
SEEDS = 18  # the nine schedules of test_emulator.py, with many stages and with few

# What a pass is made of. A bug has a namespace of its own, with copies of all of these.
HEADERS = (
    "tile/ring.h",
    "kernels/slots.h",
    "kernels/fine_backward_keys.h",
    "kernels/fine_backward_queries.h",
)
PASSES = {
    "kernels/fine_backward_keys.h": ("Keys",),
    "kernels/fine_backward_queries.h": ("Queries",),
}  # the others are found in both

# header: {bug: (text that the header has once, what becomes of it, how that must be reported)}.
# Spaces stand for any white space. Where a bug has several effects, the schedule decides which
# comes first.
BUGS = {
    "kernels/fine_backward_keys.h": {
        # K and V, and what the consumer is told with them
        "KvFullNotAwaited": (
            "s_.kv_full[w_].wait(round);",
            "",
            r"(NEVER WRITTEN|RACE): .*load from assignment\[\d\]",
        ),
        "AssignmentReadBeforeKvFull": (
            "s_.kv_full[w_].wait(round); const Assignment item = s_.assignment[w_].get();",
            "const Assignment item = s_.assignment[w_].get(); s_.kv_full[w_].wait(round);",
            r"(NEVER WRITTEN|RACE): .*load from assignment\[\d\]",
        ),
        "KvEmptyNotAwaited": (
            "s_.kv_empty[w].wait(round - 1);",
            "",
            "RACE|TOO MANY ARRIVALS on kv_full",
        ),
        "AssignmentSetBeforeKvEmpty": (
            "s_.kv_empty[w].wait(round - 1); s_.assignment[w].set(assignment);",
            "s_.assignment[w].set(assignment); s_.kv_empty[w].wait(round - 1);",
            r"RACE: .*store to assignment\[\d\]",
        ),
        "KvEmptyBeforeStore": (
            "if (item.tile >= 0) store(item); s_.kv_empty[w_].arrive_all();",
            "s_.kv_empty[w_].arrive_all(); if (item.tile >= 0) store(item);",
            r"(RACE: |MISSING NAMED BARRIER).*TMA load into [kv]\[\d\]",
        ),
        "KvEmptyLost": (
            "s_.kv_empty[w_].arrive_all();",
            "",
            r"DEADLOCK: .*producer waits for kv_empty\[0\] use 0",
        ),
        "KvEmptyTwice": (
            "s_.kv_empty[w_].arrive_all();",
            "s_.kv_empty[w_].arrive_all(); s_.kv_empty[w_].arrive_all();",
            r"(DEADLOCK: .*producer waits for|PHASE ALIAS: .*|TOO MANY ARRIVALS on) kv_empty",
        ),
        "KvEmptyByOneThread": (
            "s_.kv_empty[w_].arrive_all();",
            "if (elect_one()) s_.kv_empty[w_].arrive_one();",
            r"DEADLOCK: .*producer waits for kv_empty\[0\] use 0 .* 127 of 128 arrivals missing",
        ),
        "KvEmptyOfOneThread": (
            's.kv_empty[w].init(kWarpgroupThreads, "kv_empty", w);',
            's.kv_empty[w].init(1, "kv_empty", w);',
            "TOO MANY ARRIVALS on kv_empty",
        ),
        "KvEmptyNotInitialised": (
            's.kv_empty[w].init(kWarpgroupThreads, "kv_empty", w);',
            "",
            "MBARRIER NOT INITIALISED",
        ),
        "KvExpectsWholeTiles": (
            "2 * p_.keys.box_rows(at) * D * 2",
            "2 * kTileRows * D * 2",
            r"WRONG EXPECT_TX: kv_full\[\d\] use \d still expects 1024 bytes",
        ),
        "IdleConsumerNotTold": (
            "if (tile < 0) return full.arrive_one();",
            "if (tile < 0) return;",
            r"DEADLOCK: .*consumer1 waits for kv_full\[1\]",
        ),
        "StopNotTold": (
            "assign(w, {0, 0, Assignment::kStop}, round).arrive_one();",
            "assign(w, {0, 0, Assignment::kStop}, round);",
            r"DEADLOCK: \[consumer0 waits for kv_full\[0\]",
        ),
        # the slots, and the barrier that what comes into them counts on
        "LastFlagLost": (
            "step.owners, following.tile < 0);",
            "step.owners, false);",
            "DEADLOCK: .*consumer0 waits for slot_full",
        ),
        "NothingNotPosted": (
            "if (step.tile < 0) s_.slots.post_nothing(slot_++);",
            "",
            "DEADLOCK: .*consumer0 waits for slot_full",
        ),
        "StatsBytesForgotten": (
            "D * 2 + static_cast<int>(sizeof(RowStats));",
            "D * 2;",
            r"WRONG EXPECT_TX: slot_full\[\d+\] use \d expects fewer bytes",
        ),
        "StatsOnWrongBarrier": (
            "&p_.stats(work.batch, head, tile), sizeof(RowStats), full);",
            "&p_.stats(work.batch, head, tile), sizeof(RowStats), s_.kv_full[0]);",
            r"WRONG EXPECT_TX: (kv_full\[0\]|slot_full\[\d+\] use \d still expects 512 bytes)",
        ),
        "StatsNotLoaded": (
            "bulk_load(&s_.stats[stage], &p_.stats(work.batch, head, tile), "
            "sizeof(RowStats), full);",
            "",
            r"WRONG EXPECT_TX: slot_full\[\d+\] use \d still expects 512 bytes",
        ),
        "StatsInWrongStage": (
            "bulk_load(&s_.stats[stage],",
            "bulk_load(&s_.stats[0],",
            r"(RACE|NEVER WRITTEN): .*stats\[\d+\]",
        ),
        "LoadedIntoNextStage": (
            "const int stage = s_.slots.ring.stage(slot_);",
            "const int stage = s_.slots.ring.stage(slot_ + 1);",
            r"(NEVER WRITTEN|RACE): .*(q|grad_out|stats)\[\d+\]",
        ),
        # slots given back
        "SlotReleasedBeforeWait": (
            "wgmma_wait<0>(grad_k_); slots_.release(held); differentiate(next);",
            "slots_.release(held); wgmma_wait<0>(grad_k_); differentiate(next);",
            r"RACE: .*TMA load into (q|grad_out)\[\d+\]",
        ),
        "LastSlotReleasedBeforeWait": (
            "wgmma_wait<0>(grad_k_); slots_.release(held); held = next.number",
            "slots_.release(held); wgmma_wait<0>(grad_k_); held = next.number",
            r"RACE: .*TMA load into (q|grad_out)\[\d+\]",
        ),
        "SlotNotReleased": (
            "slots_.release(held); differentiate(next);",
            "differentiate(next);",
            "DEADLOCK: .*producer waits for slot_empty",
        ),
        "LastSlotNotReleased": (
            "slots_.release(held); held = next.number",
            "held = next.number",
            "DEADLOCK: .*producer waits for slot_empty",
        ),
        "SlotReleasedTwice": (
            "slots_.release(held); differentiate(next);",
            "slots_.release(held); slots_.release(held); differentiate(next);",
            "(DEADLOCK: .*producer waits for|PHASE ALIAS: .*|TOO MANY ARRIVALS on) slot_|RACE",
        ),
        # products
        "ScoresNotAwaited": (
            "wgmma_wait<1>(scores_);",
            "",
            "FRAGMENT IN FLIGHT: .*an accumulator",
        ),
        "ScoresWaitTooShallow": (
            "wgmma_wait<1>(scores_);",
            "wgmma_wait<2>(scores_);",
            "WGMMA STILL IN FLIGHT",
        ),
        "FirstScoresNotAwaited": (
            "wgmma_wait<0>(scores_);",
            "",
            "FRAGMENT IN FLIGHT: .*an accumulator",
        ),
        "FirstScoresWaitTooShallow": (
            "wgmma_wait<0>(scores_);",
            "wgmma_wait<1>(scores_);",
            "WGMMA STILL IN FLIGHT",
        ),
        "ProductsInWrongOrder": (
            "issue_scores(next); issue_grad_k(held);",
            "issue_grad_k(held); issue_scores(next);",
            "WGMMA STILL IN FLIGHT",
        ),
        "GradScoresNotAwaited": (
            "wgmma_wait<1>(grad_scores_);",
            "",
            "FRAGMENT IN FLIGHT: .*an accumulator",
        ),
        "GradScoresWaitTooShallow": (
            "wgmma_wait<1>(grad_scores_);",
            "wgmma_wait<2>(grad_scores_);",
            "WGMMA STILL IN FLIGHT",
        ),
        "GradVNotAwaited": (
            "wgmma_wait<0>(grad_v_);",
            "",
            "FRAGMENT IN FLIGHT: .*an operand",
        ),
        "GradVWaitTooShallow": (
            "wgmma_wait<0>(grad_v_);",
            "wgmma_wait<1>(grad_v_);",
            "WGMMA STILL IN FLIGHT",
        ),
        "GradVNotAwaitedBeforeRounding": (
            "wgmma_wait<0>(grad_v_); round_to<Element>(rounded_, grad_scores_);",
            "round_to<Element>(rounded_, grad_scores_); wgmma_wait<0>(grad_v_);",
            "FRAGMENT IN FLIGHT: .*an operand",
        ),
        "GradKWaitTooShallow": (
            "wgmma_wait<0>(grad_k_); slots_.release(held); held = next.number",
            "wgmma_wait<1>(grad_k_); slots_.release(held); held = next.number",
            "WGMMA STILL IN FLIGHT",
        ),
        "GradKNotAwaited": (
            "wgmma_wait<0>(grad_k_); slots_.release(held); differentiate(next);",
            "slots_.release(held); differentiate(next);",
            "FRAGMENT IN FLIGHT|RACE",
        ),
        "GradVNotCommitted": (
            "mma_AB<Element>(grad_v_, rounded_, s_.grad_out[slot.stage]); wgmma_commit();",
            "mma_AB<Element>(grad_v_, rounded_, s_.grad_out[slot.stage]);",
            "WGMMA STILL IN FLIGHT",
        ),
        # the gradients leave
        "GradientsNotFenced": (
            "fence_async_proxy(); named_sync(",
            "named_sync(",
            r"MISSING PROXY FENCE .*TMA store from [kv]\[\d\]",
        ),
        "FencedBeforeTheLastStore": (
            "round_to<Element>(rounded, grad_v_); write_tile(s_.v[w_], rounded); "
            "fence_async_proxy();",
            "fence_async_proxy(); round_to<Element>(rounded, grad_v_); "
            "write_tile(s_.v[w_], rounded);",
            r"MISSING PROXY FENCE .*TMA store from v\[\d\]",
        ),
        "WarpsDoNotMeet": (
            "named_sync(1 + w_, kWarpgroupThreads);",
            "",
            r"MISSING NAMED BARRIER .*TMA store from [kv]\[\d\]",
        ),
        "WarpgroupsMeet": (
            "named_sync(1 + w_, kWarpgroupThreads);",
            "named_sync(1, 2 * kWarpgroupThreads);",
            r"DEADLOCK: .*named barrier 1 \(128 of 256 threads are there\)",
        ),
        "StoredByAll": (
            "if (elect_one()) { const TileBox grad_k",
            "{ const TileBox grad_k",
            'NOT ELECTED: .*"TMA store from"',
        ),
        "StoresNotCommitted": (
            "bulk_commit();",
            "",
            "RACE|STORES NEVER COMMITTED",
        ),
        "StoresNotRead": (
            "bulk_commit(); bulk_wait_read<0>();",
            "bulk_commit();",
            r"RACE: .*TMA load into [kv]\[\d\].* not ordered after .*TMA store from",
        ),
        "StoresWaitTooShallow": (
            "bulk_wait_read<0>();",
            "bulk_wait_read<1>();",
            r"RACE: .*TMA load into [kv]\[\d\].* not ordered after .*TMA store from",
        ),
        # rows of a tile that no load brings
        "TailOfKNotZeroed": (
            "zero_tail(s.k[w], p.keys.grid.tile.volume(), thread, threads);",
            "",
            r"NEVER WRITTEN: .* k\[\d+\]",
        ),
        "TailOfVNotZeroed": (
            "zero_tail(s.v[w], p.keys.grid.tile.volume(), thread, threads);",
            "",
            r"NEVER WRITTEN: .* v\[\d+\]",
        ),
        "TailOfQNotZeroed": (
            "zero_tail(s.q[i], p.queries.grid.tile.volume(), thread, threads);",
            "",
            r"NEVER WRITTEN: .* q\[\d+\]",
        ),
        "TailOfGradOutNotZeroed": (
            "zero_tail(s.grad_out[i], p.queries.grid.tile.volume(), thread, threads);",
            "",
            r"NEVER WRITTEN: .* grad_out\[\d+\]",
        ),
        "TailsNotFenced": (
            "} fence_async_proxy(); } class Producer",
            "} } class Producer",
            r"MISSING PROXY FENCE between \[prologue: store to",
        ),
        # nothing but the numbers tells
        "NotRestartedForNextHead": (
            "tiles.restart(int64_t{rows} * words);",
            "tiles.restart(0);",
            "WRONG NUMBERS in d[kv]",
        ),
    },
    "kernels/fine_backward_queries.h": {
        # Q and dO, and what the consumer is told with them
        "QFullNotAwaited": (
            "s_.q_full[w_].wait(round);",
            "",
            r"(NEVER WRITTEN|RACE): .*load from assignment\[\d\]",
        ),
        "AssignmentReadBeforeQFull": (
            "s_.q_full[w_].wait(round); const Assignment item = s_.assignment[w_].get();",
            "const Assignment item = s_.assignment[w_].get(); s_.q_full[w_].wait(round);",
            r"(NEVER WRITTEN|RACE): .*load from assignment\[\d\]",
        ),
        "QEmptyNotAwaited": (
            "s_.q_empty[w].wait(round - 1);",
            "",
            "RACE|TOO MANY ARRIVALS on q_full",
        ),
        "QEmptyAwaitedForThisRound": (
            "s_.q_empty[w].wait(round - 1);",
            "s_.q_empty[w].wait(round);",
            r"DEADLOCK: .*producer waits for q_empty\[0\] use 0",
        ),
        "QEmptyBeforeStore": (
            "if (item.tile >= 0) store(item); s_.q_empty[w_].arrive_all();",
            "s_.q_empty[w_].arrive_all(); if (item.tile >= 0) store(item);",
            r"(RACE: |MISSING NAMED BARRIER).*TMA load into (q|grad_out)\[\d\]",
        ),
        "QEmptyBeforeGather": (
            "gather(); if (item.tile >= 0) store(item); s_.q_empty[w_].arrive_all();",
            "s_.q_empty[w_].arrive_all(); gather(); if (item.tile >= 0) store(item);",
            r"(RACE: |MISSING NAMED BARRIER).*TMA load into (q|grad_out)\[\d\]",
        ),
        "QEmptyLost": (
            "s_.q_empty[w_].arrive_all();",
            "",
            r"DEADLOCK: .*producer waits for q_empty\[0\] use 0",
        ),
        "BytesOfGradOutForgotten": (
            "full.arrive_expect_tx(2 * p_.queries.box_rows(at) * D * 2);",
            "full.arrive_expect_tx(p_.queries.box_rows(at) * D * 2);",
            r"WRONG EXPECT_TX: q_full\[\d\] use \d expects fewer bytes|RACE: .*grad_out\[\d\]",
        ),
        "SlotExpectsWholeTiles": (
            "const int bytes = 2 * p_.keys.box_rows(at) * D * 2;",
            "const int bytes = 2 * kTileRows * D * 2;",
            r"WRONG EXPECT_TX: slot_full\[\d+\] use \d still expects 1024 bytes",
        ),
        "IdleConsumerNotTold": (
            "if (tile < 0) return full.arrive_one();",
            "if (tile < 0) return;",
            r"DEADLOCK: .*consumer\d waits for q_full",
        ),
        # the slots, and the barrier that what comes into them counts on
        "LastFlagLost": (
            "following.tile < 0);",
            "false);",
            "DEADLOCK: .*consumer0 waits for slot_full",
        ),
        "NothingNotPosted": (
            "if (step.tile < 0) s_.slots.post_nothing(slot_++);",
            "",
            "DEADLOCK: .*consumer0 waits for slot_full",
        ),
        # slots given back
        "SlotReleasedBeforeWait": (
            "wgmma_wait<0>(grad_q_); slots_.release(held); round_to",
            "slots_.release(held); wgmma_wait<0>(grad_q_); round_to",
            r"RACE: .*TMA load into (k|v)\[\d+\]",
        ),
        "SlotReleasedBeforeGradient": (
            "issue_gradient(held); wgmma_wait<0>(grad_q_); slots_.release(held); held =",
            "slots_.release(held); issue_gradient(held); wgmma_wait<0>(grad_q_); held =",
            r"RACE: .*TMA load into (k|v)\[\d+\]",
        ),
        "SlotNotReleased": (
            "slots_.release(held); held = next.number",
            "held = next.number",
            "DEADLOCK: .*producer waits for slot_empty",
        ),
        "SlotReleasedTwice": (
            "slots_.release(held); held = next.number",
            "slots_.release(held); slots_.release(held); held = next.number",
            "(DEADLOCK: .*producer waits for|PHASE ALIAS: .*|TOO MANY ARRIVALS on) slot_|RACE",
        ),
        # products
        "ScoresNotAwaited": (
            "wgmma_wait<1>(scores_, grad_scores_);",
            "",
            "FRAGMENT IN FLIGHT: .*an accumulator",
        ),
        "FirstScoresWaitTooShallow": (
            "wgmma_wait<0>(scores_, grad_scores_);",
            "wgmma_wait<1>(scores_, grad_scores_);",
            "WGMMA STILL IN FLIGHT",
        ),
        "ProductsInWrongOrder": (
            "issue_scores(next); issue_gradient(held);",
            "issue_gradient(held); issue_scores(next);",
            "WGMMA STILL IN FLIGHT",
        ),
        "GradQWaitTooShallow": (
            "wgmma_wait<0>(grad_q_); slots_.release(held); held",
            "wgmma_wait<1>(grad_q_); slots_.release(held); held",
            "WGMMA STILL IN FLIGHT",
        ),
        "RoundedOverwritten": (
            "wgmma_wait<0>(grad_q_); slots_.release(held); round_to<Element>(rounded_, "
            "grad_scores_);",
            "round_to<Element>(rounded_, grad_scores_); wgmma_wait<0>(grad_q_); "
            "slots_.release(held);",
            "FRAGMENT IN FLIGHT: .*an operand",
        ),
        # the gradient leaves
        "GradientNotFenced": (
            "fence_async_proxy(); named_sync(",
            "named_sync(",
            r"MISSING PROXY FENCE .*TMA store from q\[\d\]",
        ),
        "WarpsDoNotMeet": (
            "named_sync(1 + w_, kWarpgroupThreads);",
            "",
            r"MISSING NAMED BARRIER .*TMA store from q\[\d\]",
        ),
        "StoreNotRead": (
            "bulk_wait_read<0>();",
            "",
            r"RACE: .*TMA load into q\[\d\].* not ordered after .*TMA store from",
        ),
        # rows of a tile that no load brings
        "TailOfKNotZeroed": (
            "zero_tail(s.k[i], p.keys.grid.tile.volume(), thread, threads);",
            "",
            r"NEVER WRITTEN: .* k\[\d+\]",
        ),
        "TailOfVNotZeroed": (
            "zero_tail(s.v[i], p.keys.grid.tile.volume(), thread, threads);",
            "",
            r"NEVER WRITTEN: .* v\[\d+\]",
        ),
        "TailOfQNotZeroed": (
            "zero_tail(s.q[w], p.queries.grid.tile.volume(), thread, threads);",
            "",
            r"NEVER WRITTEN: .* q\[\d+\]",
        ),
        "TailOfGradOutNotZeroed": (
            "zero_tail(s.grad_out[w], p.queries.grid.tile.volume(), thread, threads);",
            "",
            r"NEVER WRITTEN: .* grad_out\[\d+\]",
        ),
        "TailsNotFenced": (
            "} fence_async_proxy(); } class Producer",
            "} } class Producer",
            r"MISSING PROXY FENCE between \[prologue: store to",
        ),
    },
    "kernels/slots.h": {
        "SlotFullNotAwaited": (
            "s_.ring.wait(number);",
            "",
            r"(RACE|NEVER WRITTEN|PHASE ALIAS): .*(flags|slot_full)\[\d+\]",
        ),
        "SlotEmptyNotAwaited": (
            "ring.wait_empty(n); rows[ring.stage(n)].set(tokens);",
            "rows[ring.stage(n)].set(tokens);",
            r"RACE: .*producer: (store to|TMA load into) |TOO MANY ARRIVALS on slot_full",
        ),
        "RowsOfNothingNotSet": (
            "rows[ring.stage(n)].set(0);",
            "",
            r"NEVER WRITTEN: .*load from rows\[\d+\]",
        ),
        "ReadBeforeFull": (
            "s_.ring.wait(number); const uint32_t flags = s_.flags[stage].get();",
            "const uint32_t flags = s_.flags[stage].get(); s_.ring.wait(number);",
            r"(RACE|NEVER WRITTEN|PHASE ALIAS): .*(flags|slot_full)\[\d+\]",
        ),
        "RowsReadAfterRelease": (
            "s_.ring.release(number); } return",
            "s_.ring.release(number); s_.rows[stage].get(); } return",
            r"RACE: .*rows\[\d+\]",
        ),
        "OthersSlotsKept": (
            "s_.ring.release(number);",
            "",
            "DEADLOCK: .*producer waits for slot_empty",
        ),
        "LimitOneTooFar": (
            "held.number + Stages",
            "held.number + Stages + 1",
            "DEADLOCK: .*producer waits for slot_empty",
        ),
        "ItemNotBegun": (
            "{ ended_ = false; }",
            "{}",
            "LOADS STILL IN FLIGHT|DEADLOCK: .*slot_empty",
        ),
        "NothingSaidAfterArrival": (
            "flags[ring.stage(n)].set(kLast); ring.full[ring.stage(n)].arrive_one();",
            "ring.full[ring.stage(n)].arrive_one(); flags[ring.stage(n)].set(kLast);",
            r"(RACE|NEVER WRITTEN): .*load from flags\[\d+\]",
        ),
    },
    "tile/ring.h": {
        "OneConsumerFreesASlot": (
            "consumers * kWarpgroupThreads",
            "kWarpgroupThreads",
            r"(DEADLOCK: .*producer waits for|PHASE ALIAS: .*|TOO MANY ARRIVALS on) slot_|RACE",
        ),
        "EmptyAwaitedForThisUse": (
            "empty[stage(n)].wait(use(n) - 1);",
            "empty[stage(n)].wait(use(n));",
            r"DEADLOCK: .*producer waits for slot_empty\[0\] use 0",
        ),
        "FullAwaitedForAnEarlierUse": (
            "full[stage(n)].wait(use(n));",
            "full[stage(n)].wait(use(n) - 1);",
            r"(RACE|NEVER WRITTEN|PHASE ALIAS): .*(flags|slot_full)\[\d+\]",
        ),
    },
}


@pytest.fixture(scope="session")
def compiler():
    """The compiler that the build itself would take."""
    spec = importlib.util.spec_from_file_location(
        "vsa_test_backward_toolchain", ROOT / "third_party" / "cuda_toolchain.py"
    )
    toolchain = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = toolchain  # dataclasses look it up
    spec.loader.exec_module(toolchain)
    del sys.modules[spec.name]
    found = toolchain.find_compiler()
    if found.tool is None:
        record = importlib.resources.files("vsa") / "_build.json"
        built = json.loads(record.read_text()) if record.is_file() else {"compiled": True}
        if not built["compiled"]:
            pytest.skip(f"vsa was built without its compiled part: {built['why']}")
        pytest.fail(f"no C++20 compiler was found: {'; '.join(found.rejected)}")
    return found.tool


def run(*command):
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{command[0]} failed:\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


def build(compiler, program, *flags):
    run(compiler, "-std=c++20", f"-I{CSRC}", *flags, PROGRAM, "-o", program)
    return lambda *words: run(program, *words)


def substitute(header, bug):
    """The text of a header with a bug in it."""
    old, new, _ = BUGS[header][bug]
    pattern = r"\s+".join(re.escape(word) for word in old.split())
    text, count = re.subn(pattern, lambda _: new, (CSRC / header).read_text())
    assert count == 1, f"{bug}: {header} has this {count} times, not once: {old}"
    return text


def in_namespace(header, bug):
    """All headers, in a namespace that is called like the bug that one of them has."""
    texts = [substitute(h, bug) if h == header else (CSRC / h).read_text() for h in HEADERS]
    code = re.sub(r"^#(pragma once|include .*)$", "", "\n".join(texts), flags=re.MULTILINE)
    return code.replace("namespace vsa {", f"namespace vsa::{bug} {{")


@pytest.mark.parametrize("header", BUGS)
def test_bugs_are_reported_by_name(compiler, tmp_path, header):
    passes = PASSES.get(header, ("Keys", "Queries"))
    copies = [in_namespace(header, bug) for bug in BUGS[header]]
    each = " ".join(f"{name.upper()}({bug})" for bug in BUGS[header] for name in passes)
    bugs = tmp_path / "bugs.h"
    bugs.write_text(
        "\n".join(
            [
                '#include "launch/fine_params.h"',
                *copies,
                f"#define VSA_EACH_BUG(KEYS, QUERIES) {each}",
            ]
        )
    )
    program = build(compiler, tmp_path / "bugs", "-Og", "-w", "-include", bugs)
    reports = {(bug, name): program(bug, name, SEEDS) for bug in BUGS[header] for name in passes}
    missed = {
        (bug, name): report
        for (bug, name), report in reports.items()
        if not re.match(rf"seed \d+: ({BUGS[header][bug][2]})", report)
    }
    assert not missed


def test_kernels_without_a_bug_are_not_reported(compiler, tmp_path):
    program = build(compiler, tmp_path / "kernels", "-O1", "-Wall", "-Wextra", "-Werror")
    for name in ("Keys", "Queries"):
        assert program("vsa", name, 5 * SEEDS) == "nothing"


def test_text_that_a_header_does_not_have_once_is_no_substitution(monkeypatch):
    monkeypatch.setitem(BUGS["tile/ring.h"], "Rotten", ("wait_full(n);", "", ""))
    monkeypatch.setitem(BUGS["tile/ring.h"], "Ambiguous", ("VSA_DEVICE void", "", ""))
    for bug in ("Rotten", "Ambiguous"):
        with pytest.raises(AssertionError, match=f"{bug}: tile/ring.h has this .* not once"):
            substitute("tile/ring.h", bug)
