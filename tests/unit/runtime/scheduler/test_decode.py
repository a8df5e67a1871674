"""The decode scheduler, as whole trajectories: each test lists every step, or checks every end."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock_runtime.kvcache.pool import PagePool
from penstock_runtime.scheduler.admission import Local, Refused, Rejected, Remote, RemoteSettings
from penstock_runtime.scheduler.cost_model import CostModel
from penstock_runtime.scheduler.decode import DecodeScheduler, DecodeSettings
from penstock_wire.messages import Sampling, TokenOut
from tests.unit.runtime.scheduler.decode_simulation import (
    COST,
    ROOT,
    STOP,
    Simulation,
    answer,
    prompt_of,
)


def outputs(count: int, **options: object) -> Sampling:
    return Sampling(seed=0, max_tokens=count, **options)  # type: ignore[arg-type]


def test_a_prompt_is_prefilled_in_chunks_and_then_decodes() -> None:
    sim = Simulation()
    sim.add("a", prompt_of(50, 1), outputs(3))
    assert sim.run() == ["a@0+20", "a@20+20", "a@40+10*", "a@50+1*", "a@51+1*"]


def test_prefill_beside_decode_is_held_back_but_goes_on() -> None:
    sim = Simulation()
    sim.add("a", prompt_of(4, 1), outputs(6))
    assert sim.turn()
    sim.add("b", prompt_of(30, 2), outputs(1))
    # 8 ms beside a decoding request are two pages of four tokens at 1 ms each.
    assert sim.run() == [
        "a@0+4*",
        "a@4+1* b@0+8",
        "a@5+1* b@8+8",
        "a@6+1* b@16+8",
        "a@7+1* b@24+6*",
        "a@8+1*",
    ]


def test_prefill_beside_decode_goes_on_even_when_the_machine_is_too_slow_for_it() -> None:
    slow = replace(Simulation().settings, prefill_seconds=1e-6)
    sim = Simulation(settings=slow)
    sim.add("a", prompt_of(4, 1), outputs(4))
    sim.turn()
    sim.add("b", prompt_of(12, 2), outputs(1))
    assert sim.run()[1:] == ["a@4+1* b@0+4", "a@5+1* b@4+4", "a@6+1* b@8+4*"]


def test_a_short_prompt_overtakes_a_long_one() -> None:
    sim = Simulation()
    sim.add("long", prompt_of(100, 1), outputs(1))
    sim.turn()
    sim.add("short", prompt_of(8, 2), outputs(1))
    assert sim.run()[:3] == ["long@0+20", "short@0+8* long@20+12", "long@32+20"]


def test_a_prompt_seen_before_computes_its_last_page_only() -> None:
    sim = Simulation()
    prompt = prompt_of(16, 1)
    sim.add("a", prompt, outputs(1))
    sim.run()
    sim.add("b", prompt, outputs(1))
    sim.run()
    # The whole prompt is cached, but somebody must compute logits of its last token.
    assert sim.steps == ["a@0+16*", "b@12+4*"]


def test_generated_tokens_are_found_by_the_next_turn_of_a_conversation() -> None:
    sim = Simulation()
    prompt = prompt_of(6, 1)
    sim.add("a", prompt, outputs(8))
    sim.run()
    conversation = prompt + array("i", sim.streams["a"]) + prompt_of(3, 2)
    steps = len(sim.steps)
    sim.add("b", conversation, outputs(1))
    # Of the 14 tokens the last one's KV was never computed; 12 are full pages.
    assert sim.run()[steps:] == ["b@12+5*"]


def test_choices_of_one_prompt_are_prefilled_once() -> None:
    sim = Simulation()
    for name in "abc":
        sim.add(name, prompt_of(17, 1), outputs(1))
    assert sim.run() == ["a@0+17*", "b@16+1* c@16+1*"]


def test_a_long_prompt_goes_to_its_group_and_its_last_token_is_computed_here() -> None:
    sim = Simulation()
    prompt = prompt_of(23, 1)
    sim.add("a", prompt, outputs(2), group="g")
    (admission,) = sim.admit()
    assert admission == Remote("a", "g", prompt[:-1], 0, tuple(range(6)))
    assert sim.start_step() is None
    assert sim.run() == ["a@22+1*", "a@23+1*"]


def test_the_last_token_may_need_a_page_that_is_not_granted() -> None:
    sim = Simulation()
    sim.add("a", prompt_of(17, 1), outputs(1), group="g")
    (admission,) = sim.admit()
    assert isinstance(admission, Remote)
    assert len(admission.pages) == 4
    assert sim.run() == ["a@16+1*"]


def test_a_short_remainder_is_prefilled_here() -> None:
    sim = Simulation()
    prompt = prompt_of(60, 1)
    sim.add("a", prompt, outputs(1), group="g")
    sim.run()
    sim.add("b", prompt + prompt_of(8, 2), outputs(1), group="g")
    assert sim.admit() == [Local("b")]
    # Unless the group is forced, which is how a canary is tried.
    sim.add("c", prompt + prompt_of(8, 3), outputs(1), group="g", force_group=True)
    (admission,) = sim.admit()
    assert isinstance(admission, Remote)
    assert admission.cached == 60
    sim.run()


def test_what_the_group_had_cached_is_reported_as_cached() -> None:
    """Of the first attempt: what a later one finds may be the request's own."""

    def admitted(sim: Simulation, name: str) -> int:
        sim.admit()
        for stage in range(2):
            sim.work_remotely(next(iter(sim.jobs)), stage, pages=20)
        request = sim.scheduler.get(name)
        assert request is not None
        return request.cached_tokens

    sim = Simulation()
    prompt = prompt_of(41, 1)
    sim.add("a", prompt, outputs(1), group="g")
    sim.group_cached = 28
    assert admitted(sim, "a") == 28
    sim.add("b", prompt[:20] + prompt_of(20, 2), outputs(1), group="g")
    sim.group_cached = 12
    assert admitted(sim, "b") == 20, "here is more of it than in the group"
    early = array("i", answer(prompt_of(30, 3), outputs(11), 99)[0][:10])
    sim.add("c", prompt_of(30, 3), outputs(11), group="g", output=early)
    sim.group_cached = 36
    assert admitted(sim, "c") == 30, "an earlier attempt's output is no prompt"
    sim.add("d", prompt_of(41, 5), outputs(1), group="g")
    sim.admit()
    sim.fail_remotely(next(iter(sim.jobs)))
    sim.group_cached = 40
    assert admitted(sim, "d") == 0
    sim.run()


def test_a_failed_prefill_resumes_from_what_all_stages_delivered() -> None:
    sim = Simulation()
    prompt = prompt_of(41, 1)
    sim.add("a", prompt, outputs(1), group="g")
    sim.admit()
    (grant,) = sim.jobs
    sim.work_remotely(grant, 0, pages=8)
    sim.work_remotely(grant, 1, pages=5)
    sim.fail_remotely(grant)
    (admission,) = sim.admit()
    assert isinstance(admission, Remote)
    assert admission.cached == 20
    assert sim.pool.counts().quarantined == 5
    assert sim.run() == ["a@40+1*"]


def test_after_enough_failures_a_prompt_is_prefilled_here() -> None:
    sim = Simulation()
    sim.add("a", prompt_of(41, 1), outputs(1), group="g")
    for _ in range(2):
        (admission,) = sim.admit()
        assert isinstance(admission, Remote)
        sim.fail_remotely(next(iter(sim.jobs)))
    assert sim.admit() == [Local("a")]
    assert sim.run() == ["a@0+20", "a@20+20", "a@40+1*"]


def test_a_forced_group_that_fails_gives_the_request_up() -> None:
    sim = Simulation()
    sim.add("a", prompt_of(41, 1), outputs(1), group="g", force_group=True)
    for _ in range(2):
        sim.admit()
        sim.fail_remotely(next(iter(sim.jobs)))
    (admission,) = sim.admit()
    assert isinstance(admission, Rejected)
    assert (admission.code, admission.retriable) == ("prefill_lost", True)
    sim.check_quiet()


def test_a_group_that_is_re_formed_is_waited_for_until_a_deadline() -> None:
    sim = Simulation()
    sim.groups = ()
    sim.add("a", prompt_of(41, 1), outputs(1), group="g")
    sim.add("b", prompt_of(5, 2), outputs(1))
    assert sim.admit() == [Local("b")]
    assert sim.scheduler.next_deadline() == 5.0
    sim.now = 4.9
    assert sim.admit() == []
    sim.now = 5.0
    assert sim.admit() == [Local("a")]
    sim.run()


def test_another_group_helps_out() -> None:
    sim = Simulation()
    sim.groups = ("h",)
    sim.add("a", prompt_of(41, 1), outputs(1), group="g")
    (admission,) = sim.admit()
    assert isinstance(admission, Remote)
    assert admission.group == "h"
    sim.run()


def test_full_kv_preempts_the_latest_and_the_oldest_goes_on() -> None:
    sim = Simulation(pool_pages=6)
    sim.add("a", prompt_of(7, 1), outputs(14))
    sim.add("b", prompt_of(7, 2), outputs(14))
    sim.run()
    assert sim.scheduler.preemptions == 1
    first = {name: next(i for i, s in enumerate(sim.steps) if f"{name}@19" in s) for name in "ab"}
    assert first["a"] < first["b"]


def test_granted_pages_are_never_preempted() -> None:
    sim = Simulation(pool_pages=8)
    sim.add("a", prompt_of(11, 1), outputs(12))
    sim.add("b", prompt_of(17, 2), outputs(2), group="g")
    sim.admit()
    while (batch := sim.start_step()) is not None:
        sim.end_step(batch)
    # a's next page is b's: it sits out, and b stays until its group is done with it.
    assert sim.pool.counts().granted == 4
    assert sim.steps[-1] == "a@15+1*"
    sim.run()


def test_an_older_request_takes_the_pages_of_a_younger_one_to_come_back() -> None:
    sim = Simulation(pool_pages=10)
    sim.add("a", prompt_of(33, 1), outputs(2), group="g")
    sim.admit()
    sim.fail_remotely(next(iter(sim.jobs)))
    sim.acknowledge(sim.revoked[0])
    sim.groups = ()
    sim.add("b", prompt_of(9, 2), outputs(20))
    sim.admit()
    sim.end_step(sim.start_step() or pytest.fail("nothing to compute"))
    sim.groups = ("g",)
    (admission,) = sim.admit()
    assert isinstance(admission, Remote)
    assert sim.scheduler.preemptions == 1
    sim.run()


def test_a_request_whose_step_is_out_is_not_preempted() -> None:
    sim = Simulation(pool_pages=10)
    sim.groups = ()
    sim.add("a", prompt_of(33, 1), outputs(2), group="g")
    sim.add("b", prompt_of(9, 2), outputs(20))
    assert sim.admit() == [Local("b")]
    batch = sim.start_step()
    assert batch is not None
    sim.groups = ("g",)
    assert sim.admit() == []
    sim.end_step(batch)
    (admission,) = sim.admit()
    assert isinstance(admission, Remote)
    sim.run()


def test_a_request_may_fill_the_whole_pool() -> None:
    sim = Simulation(pool_pages=5)
    sim.add("a", prompt_of(15, 1), outputs(100))
    sim.run()
    assert sim.finished == {"a": "length"}
    assert len(sim.streams["a"]) == 5


def test_stop_tokens_end_a_request_only_after_min_tokens() -> None:
    stopping = next(
        p
        for p in (prompt_of(5, n) for n in range(100))
        if answer(p, outputs(9, stop_token_ids=(STOP,)), 99)[0] in ([1, STOP], [2, STOP])
    )
    sim = Simulation()
    sim.add("a", stopping, outputs(9, stop_token_ids=(STOP,)))
    sim.add("b", stopping, outputs(9, stop_token_ids=(STOP,), min_tokens=3))
    sim.run()
    assert sim.finished["a"] == "stop"
    assert len(sim.streams["a"]) == 2
    assert len(sim.streams["b"]) > 3


def test_a_moved_request_goes_on_behind_its_output() -> None:
    prompt = prompt_of(9, 1)
    expected, _ = answer(prompt, outputs(6), 99)
    sim = Simulation()
    sim.add("a", prompt, outputs(6), output=array("i", expected[:4]))
    assert sim.run() == ["a@0+13*", "a@13+1*"]
    sim.add("b", prompt, outputs(4), output=array("i", expected[:4]))
    assert sim.finished["b"] == "length"


def test_what_can_never_be_answered_is_refused() -> None:
    scheduler = DecodeScheduler(PagePool(8, 4), 1000, DecodeSettings(max_waiting=1))
    nothing = array("i")
    with pytest.raises(Refused, match="up to 31") as long:
        scheduler.add("a", prompt_of(32, 1), nothing, outputs(1), ROOT)
    with pytest.raises(Refused, match="empty"):
        scheduler.add("a", nothing, nothing, outputs(1), ROOT)
    assert (long.value.code, long.value.retriable) == ("too_long", False)
    scheduler.add("a", prompt_of(31, 1), nothing, outputs(1), ROOT)
    with pytest.raises(Refused, match="here already"):
        scheduler.add("a", prompt_of(3, 1), nothing, outputs(1), ROOT)
    with pytest.raises(Refused, match="wait") as busy:
        scheduler.add("b", prompt_of(3, 1), nothing, outputs(1), ROOT)
    assert (busy.value.code, busy.value.retriable) == ("overloaded", True)


def test_a_step_has_room_for_progress() -> None:
    with pytest.raises(ValueError, match="max_batch_tokens 70"):
        DecodeScheduler(PagePool(8, 16), 99, DecodeSettings(max_running=64, max_batch_tokens=70))


def test_a_cancelled_request_keeps_its_pages_until_the_step_is_over() -> None:
    sim = Simulation()
    sim.add("a", prompt_of(10, 1), outputs(9))
    sim.admit()
    batch = sim.start_step()
    assert batch is not None
    sim.cancel("a")
    assert sim.pool.counts().resident == 3
    sim.end_step(batch)
    assert sim.streams["a"] == []
    sim.check_quiet()


def test_steps_that_failed_leave_nothing_in_the_cache() -> None:
    sim = Simulation(ahead=True)
    sim.add("a", prompt_of(10, 1))
    sim.add("b", prompt_of(10, 2))
    sim.admit()
    first, second = sim.start_step(), sim.start_step()
    assert first is not None
    assert second is not None
    sim.cancel("b")
    assert sim.scheduler.abort_steps() == ["a"]
    assert sim.scheduler.idle
    assert sim.pool.counts().free == sim.pool.counts().total


def test_batches_are_given_back_in_their_order() -> None:
    sim = Simulation(ahead=True)
    sim.add("a", prompt_of(10, 1))
    sim.admit()
    first, second = sim.start_step(), sim.start_step()
    assert first is not None
    assert second is not None
    with pytest.raises(RuntimeError, match="2 batches have not been completed"):
        sim.start_step()
    with pytest.raises(ValueError, match="0 tokens for 1"):
        sim.scheduler.complete_step(first, [])
    with pytest.raises(ValueError, match="not the batch"):
        sim.scheduler.complete_step(second, [TokenOut(1)])
    with pytest.raises(ValueError, match="not the batch"):
        sim.scheduler.withdraw_step(first)
    with pytest.raises(ValueError, match="running, not remote"):
        sim.scheduler.remote_done("a", 0)


# --- the next step lies ready while one is computed ---------------------------------------------


def test_a_step_ahead_takes_the_token_that_is_being_chosen() -> None:
    sim = Simulation(ahead=True)
    sim.add("a", prompt_of(40, 1), outputs(4))
    assert sim.run() == ["a@0+20", "a@20+20*", "a@40+1*", "a@41+1*", "a@42+1*"]


def test_steps_ahead_are_those_that_would_have_come() -> None:
    """As long as nobody stops early, nothing is computed for nothing."""
    steps = []
    for ahead in (False, True):
        sim = Simulation(ahead=ahead)
        for n in range(5):
            sim.add(f"r{n}", prompt_of(7 * n + 3, n), outputs(2 * n + 1))
        steps.append(sim.run())
    assert steps[0] == steps[1]


def test_a_stop_token_ends_a_request_whose_next_step_is_out() -> None:
    sampling = outputs(9, stop_token_ids=(STOP,))
    prompts = (prompt_of(11, n) for n in range(100))
    stopping = next(p for p in prompts if len(answer(p, sampling, 99)[0]) == 2)
    sim = Simulation(ahead=True)
    sim.add("a", stopping, sampling)
    sim.admit()
    sim.start_step()
    sim.start_step()
    sim.end_step(sim.out[0])
    third = sim.start_step()
    assert third is not None
    sim.end_step(sim.out[0])
    # It has its answer, and its pages are still being written.
    assert (sim.finished["a"], sim.streams["a"][1:]) == ("stop", [STOP])
    assert sim.pool.counts().resident == 4
    assert sim.start_step() is None
    sim.end_step(third)
    assert sim.steps == ["a@0+11*", "a@11+1*", "a@12+1*"]
    sim.check_quiet()


def test_a_request_that_comes_in_meanwhile_joins_the_next_step() -> None:
    sim = Simulation(ahead=True)
    sim.add("a", prompt_of(10, 1), outputs(4))
    sim.admit()
    sim.start_step()
    sim.start_step()
    sim.add("b", prompt_of(5, 2), outputs(2))
    sim.withdraw_step()
    sim.admit()
    sim.start_step()
    assert sim.run() == ["a@0+10*", "a@10+1* b@0+5*", "a@11+1* b@5+1*", "a@12+1*"]


def test_a_request_cancelled_in_two_steps_keeps_its_pages_until_both_are_over() -> None:
    sim = Simulation(ahead=True)
    sim.add("a", prompt_of(10, 1), outputs(9))
    sim.admit()
    sim.start_step()
    sim.start_step()
    sim.cancel("a")
    sim.cancel("a")
    sim.end_step(sim.out[0])
    assert sim.pool.counts().resident == 3
    assert sim.start_step() is None
    sim.withdraw_step()
    assert sim.streams["a"] == []
    sim.check_quiet()


def test_the_oldest_waits_for_the_steps_that_are_out_to_take_pages() -> None:
    sim = Simulation(pool_pages=5, ahead=True)
    sim.add("a", prompt_of(7, 1), outputs(14))
    sim.add("b", prompt_of(5, 2), outputs(3))
    sim.admit()
    elsewhere = sim.pool.allocate(1)
    assert sim.start_step() is not None
    assert sim.start_step() is not None
    sim.end_step(sim.out[0])
    # Both are in the step that is out, and a's next token needs a page of b's.
    assert sim.start_step() is None
    assert sim.scheduler.preemptions == 0
    sim.end_step(sim.out[0])
    assert sim.start_step() is not None
    assert sim.scheduler.preemptions == 1
    sim.pool.release(elsewhere)
    sim.run()


def test_load_counts_what_is_computed_here() -> None:
    sim = Simulation()
    sim.add("a", prompt_of(100, 1))
    sim.add("b", prompt_of(60, 2), group="g")
    sim.turn()
    sim.add("c", prompt_of(30, 3))
    load = sim.scheduler.load()
    assert (load.running, load.waiting, load.queued_tokens) == (2, 1, 92 + 30)
    assert load.queued_seconds == pytest.approx(COST.work(8, 100) + COST.work(0, 30))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    pool_pages=st.integers(8, 40),
    page_size=st.sampled_from([1, 2, 4, 8]),
    max_running=st.integers(1, 6),
    batch_tokens=st.integers(14, 40),
    cancels=st.sampled_from([0.0, 0.1]),
    failures=st.sampled_from([0.0, 0.15]),
    ahead=st.booleans(),
)
def test_every_request_ends_with_its_own_tokens(
    seed: int,
    pool_pages: int,
    page_size: int,
    max_running: int,
    batch_tokens: int,
    cancels: float,
    failures: float,
    ahead: bool,
) -> None:
    """Random arrivals, prefixes, cancels and failures over a pool that is too small."""
    options = DecodeSettings(
        max_running=max_running,
        max_batch_tokens=batch_tokens,
        prefill_seconds=0.006,
        idle_prefill_seconds=0.02,
        remote=RemoteSettings(least_tokens=6, attempts=2, group_wait_seconds=5),
    )
    sim = Simulation(
        pool_pages=pool_pages,
        page_size=page_size,
        max_model_len=60,
        settings=options,
        seed=seed,
        ahead=ahead,
    )
    generator = sim.random
    stems = [prompt_of(30, n) for n in range(3)]
    arrivals = generator.randrange(1, 14)
    longest = min(40, pool_pages * page_size - 1)
    for turn in range(3000):
        if arrivals and generator.random() < 0.4:
            arrivals -= 1
            shared = generator.choice(stems)[: generator.randrange(0, 30)]
            prompt = (shared + prompt_of(generator.randrange(1, 12), turn))[:longest]
            sampling = outputs(
                generator.randrange(1, 12), stop_token_ids=(STOP,), min_tokens=turn % 3
            )
            sim.add(
                f"r{arrivals:02}",
                prompt,
                sampling,
                group=generator.choice(["", "g", "h"]),
                force_group=generator.random() < 0.1,
            )
        sim.random_turn(cancels=cancels, failures=failures)
        if not arrivals and sim.scheduler.idle:
            break
    else:
        pytest.fail(f"no end in sight: {sim.steps[-5:]}")
    sim.check_quiet()


def test_the_oldest_is_never_overtaken_for_long() -> None:
    """A stream of short prompts does not starve a long one, whoever has the cheaper steps."""
    sim = Simulation()
    sim.add("old", prompt_of(120, 0), outputs(1))
    for n in range(60):
        sim.add(f"n{n}", prompt_of(6, n + 1), outputs(1))
        sim.turn()
        if "old" in sim.finished:
            break
    # Alone it takes 6 steps; it has a claim to half of each.
    assert len(sim.steps) <= 12


def test_cost_model_is_the_one_given() -> None:
    model = CostModel(COST)
    assert DecodeScheduler(PagePool(64, 4), 100, cost=model).cost is model
