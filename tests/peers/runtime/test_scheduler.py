"""Batches: who is in, who waits, and for how long."""

from __future__ import annotations

import random
import statistics
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peers.runtime.scheduler import (
    AGEING_BATCHES,
    CLAIMS_KEPT,
    PIECE_TOKENS,
    STEP_TOKENS,
    Item,
    Pace,
    Pick,
    Scheduler,
    Tempo,
    claim_of,
)
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
    assert order.index(single) <= 2, "one turn of the crowd's steps, which takes a prompt along, and one of its prompts"


def test_classes_go_before_turns_and_whoever_was_passed_over_for_long_rises() -> None:
    desk = Desk()
    background = desk.submit(0, 1, urgency=Urgency.BACKGROUND)
    prompt = desk.submit(2, 2 * BUDGET)
    assert [desk.works() for _ in range(3)] == [[prompt], [prompt], [background]]
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
        assert STEP_TOKENS <= pace.beside_steps <= budget
        assert pace.beside_steps <= 4 * 4 * STEP_TOKENS or pace.beside_steps * token_s <= step_s * 1.001
    assert tempo.pace(budget, decoding=False).alone == budget


@settings(max_examples=30, deadline=None)
@given(st.floats(0, 10), st.floats(1 / 1000, 1 / 4), st.sampled_from([64, 256, 2048]), st.integers(0, 99))
def test_what_every_forward_takes_keeps_no_piece_small(overhead: float, token: float, budget: int, seed: int) -> None:
    """`overhead` of a forward with a piece, and a `token` of it, in steps. Prompts of any length end, and
    no measurement is exact."""
    rng, step_s = random.Random(seed), 0.01
    tempo, pieces, left = Tempo(1), [], 0
    for _ in range(200):
        tempo.measured(step_s * rng.uniform(1, 1.05), steps=4, longer=0)
        left = left or rng.randint(1, 3000)
        piece = min(left, tempo.pace(budget, decoding=True).beside_steps)
        left -= piece
        took_s = step_s * (1 + overhead + token * piece)
        tempo.measured(took_s * rng.uniform(1, 1.02), steps=4, longer=piece)
        pieces.append(tempo.pace(budget, decoding=True).beside_steps)
    right = max(PIECE_TOKENS, min(budget, 1 / token))
    assert right / 3 <= statistics.median(pieces[50:]) <= right * 3


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
    passed_over: set[int] = set()
    """Steps for which the last batch had no room, being of longer works."""

    def run() -> bool:
        nonlocal passed_over
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
        longer_alone = all(item.tokens > STEP_TOKENS for item in items)
        assert not (longer_alone and passed_over)
        passed_over = {work for work in heads if longer_alone and desk.items[work].tokens <= STEP_TOKENS}
        return bool(picks)

    for session, tokens, group, batches in works:
        desk.submit(session, tokens, owner=f"owner {session % 3}", group=group)
        for _ in range(batches):
            run()
    while run():
        pass
    assert done == {work: item.tokens for work, item in desk.items.items()}
    assert desk.scheduler.queued_tokens == 0


class Busy(Desk):
    """Owners who always have work: some with steps of many sessions, some with prompts, some with both."""

    def __init__(self, steps: dict[str, int], prompts: dict[str, int], groups: int) -> None:
        """How many sessions of each owner; `groups`: how many sessions share one, none where it is 0."""
        super().__init__()
        self._groups = groups
        self._runs = 0
        self.last_run: dict[int, int] = {}
        """Of each session, the last forward that held something of it."""
        self._sessions = [(owner, 1) for owner, count in steps.items() for _ in range(count)]
        self._sessions += [(owner, 10 * BUDGET) for owner, count in prompts.items() for _ in range(count)]

    def claims(self) -> set[tuple[str, bool]]:
        """Whose works the next forward holds, and whether they are steps."""
        for session, (owner, tokens) in enumerate(self._sessions):
            if not self.scheduler.works_of(session):
                group = f"of {session % self._groups}" if self._groups else f"{session} alone"
                self.submit(session, tokens, owner=owner, group=group)
        items = [self.items[pick.work] for pick in self.run()]
        self._runs += 1
        self.last_run.update((item.session, self._runs) for item in items)
        return {(item.owner, item.is_step) for item in items}


sessions_of = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 20), max_size=6)


@settings(max_examples=40, deadline=None)
@given(sessions_of.filter(bool), st.integers(1, 8), st.integers(0, 100))
def test_owners_of_sessions_that_run_alone_get_as_many_forwards_in_any_window(
    steps: dict[str, int], window: int, first: int
) -> None:
    desk = Busy(steps, {}, groups=0)
    served = [next(iter(desk.claims())) for _ in range(first + window * len(steps))][first:]
    assert {owner: served.count((owner, True)) for owner in steps} == dict.fromkeys(steps, window)


@settings(max_examples=40, deadline=None)
@given(sessions_of, sessions_of, st.integers(0, 4))
@example(steps={"a": 1, "b": 1, "c": 3}, prompts={"a": 1}, groups=3)
def test_nobody_waits_for_more_forwards_than_there_are_owners_with_steps_and_with_prompts(
    steps: dict[str, int], prompts: dict[str, int], groups: int
) -> None:
    """Twice as many, as every other one is of steps where there are any."""
    claims = {(owner, True) for owner in steps} | {(owner, False) for owner in prompts}
    desk = Busy(steps, prompts, groups)
    since = dict.fromkeys(claims, 0)
    for _ in range(100 if claims else 0):
        served = desk.claims()
        since = {claim: 0 if claim in served else count + 1 for claim, count in since.items()}
        assert all(count < 2 * len(claims) for count in since.values())


@settings(max_examples=40, deadline=None)
@given(sessions_of.filter(bool), sessions_of, st.integers(0, 4))
@example(steps={"a": 1, "b": 1, "c": 3}, prompts={}, groups=3)
def test_no_session_s_step_is_forgotten_beside_others_of_its_owner(
    steps: dict[str, int], prompts: dict[str, int], groups: int
) -> None:
    """Each owner's sessions wait for a turn of their owner's each, at most."""
    desk = Busy(steps, prompts, groups)
    longest = 2 * (len(steps) + len(prompts)) * max(steps.values())
    for run in range(3 * longest):
        desk.claims()
        waited = [run + 1 - desk.last_run.get(session, 0) for session in range(sum(steps.values()))]
        assert max(waited) <= longest


def test_a_crowd_that_runs_alone_delays_another_ones_prompt_by_as_much_as_one_session_would() -> None:
    desk = Busy({"crowd": 63}, {"single": 1}, groups=0)
    assert [("single", False) in desk.claims() for _ in range(8)] == [False, True] * 4


def test_what_can_wait_runs_once_for_each_round_of_steps() -> None:
    desk = Desk()
    patient = desk.submit(99, 10 * BUDGET, urgency=Urgency.BACKGROUND, group="of its own")
    order = []
    for _ in range(40):
        for session in range(10):
            if not desk.scheduler.works_of(session):
                desk.submit(session, 1, owner="crowd", group=f"{session} alone")
        order.append(patient in desk.works())
    assert 3 <= sum(order) <= 4
    assert not any(a and b for a, b in pairwise(order))


def test_steps_beside_a_long_forward_are_in_turn_too() -> None:
    desk = Desk()
    crowd = [desk.submit(session, 1, owner="crowd", group=f"{session} alone") for session in range(5)]
    single = desk.submit(5, 1, owner="single", group="5 alone")
    order = []
    for _ in range(6):
        ((work, _),) = [(pick.work, pick.tokens) for pick in desk.scheduler.steps_beside(())]
        desk.scheduler.ran_beside([work])
        desk.scheduler.advance(work, 1)
        order.append(work)
    assert order == [crowd[0], single, *crowd[1:]]


def test_who_finds_no_room_beside_a_long_forward_loses_no_turn_and_stands_in_nobodys_way() -> None:
    desk = Desk()
    full = desk.submit(0, 1, owner="full", group="0 alone")
    other = desk.submit(1, 1, owner="other", group="1 alone")
    for _ in range(3):
        assert [pick.work for pick in desk.scheduler.steps_beside((), {other}.__contains__)] == [other]
        assert desk.scheduler.steps_beside((), lambda work: False) == []
    desk.scheduler.ran_beside([other])
    desk.scheduler.advance(other, 1)
    desk.submit(1, 1, owner="other", group="1 alone")
    assert desk.works() == [full]


def test_turns_of_those_who_have_gone_are_forgotten() -> None:
    desk = Desk()
    for number in range(3 * CLAIMS_KEPT):
        desk.submit(number, 1, owner=f"owner {number}")
        desk.run()
    assert len(desk.scheduler._turns) <= CLAIMS_KEPT + 1


def test_only_what_could_run_now_decides_whether_all_is_background() -> None:
    desk = Desk()
    assert not desk.scheduler.only_background
    desk.submit(0, 1, urgency=Urgency.BACKGROUND)
    desk.submit(0, 1)
    assert desk.scheduler.only_background
    desk.submit(1, 1)
    assert not desk.scheduler.only_background


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(1, 60), st.booleans()), max_size=60))
def test_the_queue_is_never_full_whoever_sends_what(works: list[tuple[str, int, bool]]) -> None:
    desk, most = Desk(), 100
    for session, (owner, tokens, run) in enumerate(works):
        if desk.scheduler.has_room(claim_of(owner, tokens, Urgency.INTERACTIVE), tokens, most):
            desk.submit(session, tokens, owner=owner)
        if run:
            desk.run()
        assert desk.scheduler.queued_tokens < 2 * most
    while desk.run():
        pass
    assert desk.scheduler.queued_tokens == 0
    assert not desk.scheduler._queued


@pytest.mark.parametrize("owners", [1, 2, 3, 9])
def test_owners_have_equal_parts_of_the_queue_and_leave_one_to_the_next(owners: int) -> None:
    desk, most = Desk(), 1000
    for session in range(100):
        owner = str(session % owners)
        if desk.scheduler.has_room((owner, False), 20, most):
            desk.submit(session, 20, owner=owner)
    assert desk.scheduler.queued_tokens == pytest.approx(2 * most * owners / (owners + 1), abs=20 * owners)
    assert desk.scheduler.has_room(("next", False), 20, most)
