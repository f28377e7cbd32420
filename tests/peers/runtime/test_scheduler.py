"""Batches: who is in, who waits, and for how long."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peers.runtime.scheduler import AGEING_BATCHES, STEP_TOKENS, Item, Pace, Pick, Scheduler, Tempo
from peers.wire.messages import Urgency

BUDGET = 64


class Desk:
    """A scheduler whose every pick succeeds."""

    def __init__(self, budget: int = BUDGET) -> None:
        self.scheduler = Scheduler(budget)
        self.items: dict[int, Item] = {}

    def submit(
        self,
        session: int,
        tokens: int,
        *,
        owner: str = "alice",
        group: str = "g",
        urgency: Urgency = Urgency.INTERACTIVE,
    ) -> int:
        work = len(self.items)
        self.items[work] = Item(work=work, session=session, owner=owner, tokens=tokens, group=group, urgency=urgency)
        self.scheduler.submit(self.items[work])
        return work

    def run(self) -> list[Pick]:
        picks = self.scheduler.next_batch()
        for pick in picks:
            self.scheduler.advance(pick.work, pick.tokens)
        return picks

    def works(self) -> list[int]:
        return [pick.work for pick in self.run()]


def test_works_of_one_session_run_in_order_and_one_at_a_time() -> None:
    desk = Desk()
    works = [desk.submit(0, 1) for _ in range(3)]
    assert [desk.works() for _ in range(4)] == [[works[0]], [works[1]], [works[2]], []]


def test_every_session_that_has_a_step_shares_the_forward() -> None:
    desk = Desk()
    works = [desk.submit(session, 1) for session in range(10)]
    assert sorted(desk.works()) == works


def test_a_prompt_is_taken_in_pieces_behind_the_steps() -> None:
    desk = Desk()
    prompt, step = desk.submit(0, 150), desk.submit(1, 3)
    assert desk.run() == [Pick(work=step, offset=0, tokens=3), Pick(work=prompt, offset=0, tokens=61)]
    step = desk.submit(1, 1)
    assert desk.run() == [Pick(work=step, offset=0, tokens=1), Pick(work=prompt, offset=61, tokens=63)]
    assert desk.run() == [Pick(work=prompt, offset=124, tokens=26)]
    assert desk.scheduler.queued_tokens == 0


def test_steps_leave_a_quarter_of_the_budget_to_a_waiting_prompt() -> None:
    desk = Desk()
    prompt = desk.submit(0, 32)
    for session in range(1, 100):
        desk.submit(session, 1)
    assert Pick(work=prompt, offset=0, tokens=16) in desk.run()


def test_groups_never_share_a_forward() -> None:
    desk = Desk()
    first, second = desk.submit(0, 1, group="blocks 0:5"), desk.submit(1, 1, group="blocks 0:3")
    assert desk.works() == [first]
    assert desk.works() == [second]


def test_steps_and_prompts_of_other_groups_alternate() -> None:
    desk = Desk()
    prompt = desk.submit(0, 10 * BUDGET, group="solo")
    runs = []
    for _ in range(6):
        if not desk.scheduler.works_of(1):
            desk.submit(1, 1)
        runs.append("prompt" if desk.works() == [prompt] else "step")
    assert runs == ["prompt", "step"] * 3


def test_owners_take_turns() -> None:
    desk = Desk()
    for session in range(100):
        desk.submit(session, 1, owner="crowd")
    other = desk.submit(100, 1, owner="single")
    assert other in desk.works()
    prompts = [desk.submit(200 + i, BUDGET, owner="crowd") for i in range(3)]
    single = desk.submit(300, BUDGET, owner="single")
    order = []
    while picks := desk.run():
        order += [pick.work for pick in picks if pick.work in (*prompts, single)]
    assert order.index(single) <= 1


def test_classes_go_before_turns_and_whoever_was_passed_over_for_long_rises() -> None:
    desk = Desk()
    background = desk.submit(0, 1, urgency=Urgency.BACKGROUND)
    training = desk.submit(1, BUDGET, urgency=Urgency.TRAINING)
    prompt = desk.submit(2, 2 * BUDGET)
    assert [desk.works() for _ in range(4)] == [[prompt], [prompt], [training], [background]]
    background = desk.submit(0, 1, urgency=Urgency.BACKGROUND)
    served = 0
    while background in desk.scheduler.works_of(0):
        desk.submit(2, BUDGET)  # there is always a prompt
        desk.run()
        served += 1
    assert AGEING_BATCHES < served <= 2 * AGEING_BATCHES + 2


def test_a_step_in_the_background_is_no_step() -> None:
    desk = Desk()
    slow, quick = desk.submit(0, 1, urgency=Urgency.BACKGROUND), desk.submit(1, 1)
    assert desk.scheduler.steps_beside(()) == [Pick(work=quick, offset=0, tokens=1)]
    assert desk.works() == [quick, slow]


def test_steps_beside_a_running_forward_are_of_other_sessions_and_of_one_group() -> None:
    desk = Desk()
    running, first, other = desk.submit(0, 1), desk.submit(1, 1, group="a"), desk.submit(2, 1, group="b")
    desk.submit(3, 100)
    assert desk.scheduler.steps_beside({0}) == [Pick(work=first, offset=0, tokens=1)]
    assert desk.scheduler.steps_beside({0, 1}) == [Pick(work=other, offset=0, tokens=1)]
    assert desk.scheduler.steps_beside({0, 1, 2}) == []
    assert running in desk.scheduler.works_of(0)


def test_the_pace_bounds_longer_works_but_never_stops_them() -> None:
    desk = Desk()
    prompt = desk.submit(0, 200)
    slow = Pace(beside_steps=5, alone=7)
    assert desk.scheduler.next_batch(slow) == [Pick(work=prompt, offset=0, tokens=7)]
    step = desk.submit(1, 1)
    assert desk.scheduler.next_batch(slow) == [
        Pick(work=step, offset=0, tokens=1),
        Pick(work=prompt, offset=0, tokens=5),
    ]


def test_without_room_beside_steps_longer_works_run_alone_and_in_turn() -> None:
    desk = Desk()
    prompt, step = desk.submit(0, 200), desk.submit(1, 1)
    apart = Pace(beside_steps=0, alone=7)
    for offset in (0, 7):
        assert desk.scheduler.next_batch(apart) == [Pick(work=prompt, offset=offset, tokens=7)]
        desk.scheduler.advance(prompt, 7)
        assert desk.scheduler.next_batch(apart) == [Pick(work=step, offset=0, tokens=1)]
        desk.scheduler.advance(step, 1)
        step = desk.submit(1, 1)


seconds = st.floats(1e-6, 10)


@given(seconds, seconds, st.integers(1, 80), st.integers(64, 4096))
def test_steps_wait_about_as_long_as_they_take(step_s: float, token_s: float, slices: int, budget: int) -> None:
    tempo = Tempo(slices)
    assert tempo.pace(budget, decoding=True).alone == budget  # nothing is known yet
    tempo.measured(step_s, steps=3, longer=0)
    tempo.measured(100 * token_s, steps=0, longer=100)
    pace = tempo.pace(budget, decoding=True)
    least = 32 if slices > 1 else 64
    assert least <= pace.alone <= budget
    assert pace.alone == least or pace.alone * token_s / slices <= step_s * 1.001
    if slices > 1:
        assert pace.beside_steps == 0
    else:
        assert STEP_TOKENS <= pace.beside_steps <= max(STEP_TOKENS, budget)
        assert pace.beside_steps == STEP_TOKENS or pace.beside_steps * token_s <= step_s * 1.001
    assert tempo.pace(budget, decoding=False).alone == budget


def test_steps_are_late_when_they_add_more_to_a_token_than_these_blocks_may_and_that_is_forgotten() -> None:
    """A third of a model, of which a token takes 0.1 s."""
    tempo = Tempo(1, share=1 / 3)
    tempo.answered(0.9, None)
    assert not tempo.late
    for seconds, late in ((0.01, False), (0.021, False), (0.024, True)):
        for _ in range(20):
            tempo.answered(seconds, 0.1)
        assert tempo.late == late
    steps = 0
    while tempo.late:  # they just take so long now
        tempo.answered(0.03, 0.15)
        steps += 1
    assert 50 < steps < 300


def test_a_removed_work_makes_room_for_the_next_in_line() -> None:
    desk = Desk()
    first, second = desk.submit(0, 1), desk.submit(0, 1)
    desk.scheduler.remove(first)
    assert desk.scheduler.works_of(0) == [second]
    assert desk.works() == [second]
    assert desk.scheduler.queued_tokens == 0


def test_a_budget_that_holds_no_step_beside_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 64"):
        Scheduler(BUDGET - 1)


work_lists = st.lists(
    st.tuples(
        st.integers(0, 5),  # session
        st.one_of(st.integers(1, 3), st.integers(1, 300)),  # tokens
        st.sampled_from("ab"),  # group
        st.integers(0, 2),  # batches run before the next is submitted
    ),
    max_size=25,
)


@settings(max_examples=100, deadline=None)
@given(work_lists)
def test_everything_runs_once_in_order_within_the_budget(works: list[tuple[int, int, str, int]]) -> None:
    desk = Desk()
    done: dict[int, int] = {}
    passed_over: dict[int, int] = {}

    def run() -> bool:
        heads = [line[0] for session in range(6) if (line := desk.scheduler.works_of(session))]
        picks = desk.run()
        items = [desk.items[pick.work] for pick in picks]
        assert bool(picks) == bool(heads)
        assert sum(pick.tokens for pick in picks) <= BUDGET
        assert {pick.work for pick in picks} <= set(heads)
        assert len({item.group for item in items}) <= 1
        for pick in picks:
            assert pick.offset == done.get(pick.work, 0)
            done[pick.work] = pick.offset + pick.tokens
        if all(item.tokens > STEP_TOKENS for item in items):
            for work in heads:
                if desk.items[work].tokens <= STEP_TOKENS:
                    passed_over[work] = passed_over.get(work, 0) + 1
        return bool(picks)

    for session, tokens, group, batches in works:
        desk.submit(session, tokens, owner=f"owner {session % 3}", group=group)
        for _ in range(batches):
            run()
    while run():
        pass
    assert done == {work: item.tokens for work, item in desk.items.items()}
    assert all(count == 1 for count in passed_over.values())
    assert desk.scheduler.queued_tokens == 0
