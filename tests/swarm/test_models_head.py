"""Threads that meet at a head get their own rows' products, in fewer products than there are threads."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peers.model.kernels import Pool, linear
from swarm.models.head import Meeting, share_head
from swarm.models.loading import HEAD_ROWS
from swarm.session.callers import Callers
from tests.helpers.local_remote import make_world

WEIGHT = torch.arange(12.0).view(4, 3)
DEADLINE_S = 30


class Head:
    """A product that waits for a sign, so that others come meanwhile."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.began, self.go_on = threading.Event(), threading.Event()
        self.fails = False

    def wait(self, rows_MK: Tensor) -> None:
        self.sizes.append(len(rows_MK))
        self.began.set()
        assert self.go_on.wait(DEADLINE_S)

    def __call__(self, rows_MK: Tensor) -> Tensor:
        self.wait(rows_MK)
        if self.fails:
            self.fails = False
            raise MemoryError("no room")
        return rows_MK @ WEIGHT.T


def crowd(meeting: Meeting, head: Head, count: int) -> tuple[list[Tensor | None], list[BaseException]]:
    """One caller, then `count - 1` who come while its product runs."""
    outputs: list[Tensor | None] = [None] * count
    errors: list[BaseException] = []

    def call(index: int) -> None:
        try:
            outputs[index] = meeting(torch.full((1, index % 2 + 1, 3), float(index)))
        except MemoryError as error:
            errors.append(error)

    meet(meeting, head, [threading.Thread(target=call, args=(index,)) for index in range(count)])
    return outputs, errors


def meet(meeting: Meeting, head: Head, threads: Sequence[threading.Thread]) -> None:
    """Run these, all but the first of which come while its product runs."""
    threads[0].start()
    assert head.began.wait(DEADLINE_S)
    for thread in threads[1:]:
        thread.start()
    for _ in range(int(DEADLINE_S * 1000)):
        if len(meeting._waiting) >= len(threads) - 1:
            break
        threading.Event().wait(0.001)
    head.go_on.set()
    for thread in threads:
        thread.join(DEADLINE_S)


def test_rows_that_wait_share_one_product() -> None:
    head = Head()
    outputs, errors = crowd(Meeting(head), head, 6)
    assert not errors
    assert head.sizes == [1, 2 + 1 + 2 + 1 + 2]
    for index, output in enumerate(outputs):
        assert output is not None
        assert torch.equal(output, torch.full((1, index % 2 + 1, 3), float(index)) @ WEIGHT.T)
        assert output.untyped_storage().nbytes() == output.nbytes


def test_a_product_that_fails_fails_only_who_ran_it() -> None:
    head = Head()
    head.fails = True
    outputs, errors = crowd(Meeting(head), head, 4)
    assert len(errors) == 1
    assert [index for index, output in enumerate(outputs) if output is None] == [0]


def test_callers_that_were_answered_together_share_one_product() -> None:
    callers, sizes, ready = Callers(), list[int](), threading.Barrier(4)
    callers._usual_s = DEADLINE_S  # so nobody is overdue, however busy this machine is

    def product(rows_MK: Tensor) -> Tensor:
        sizes.append(len(rows_MK))
        return rows_MK @ WEIGHT.T

    meeting = Meeting(product, callers)
    meeting._product_s = DEADLINE_S

    def call() -> None:
        callers.answered(threading.get_ident(), time.perf_counter())
        ready.wait(DEADLINE_S)
        meeting(torch.ones(1, 3))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert sizes == [4]


def test_a_leader_in_inference_mode_gives_the_others_tensors_like_any_others() -> None:
    with torch.inference_mode():
        output = Meeting(lambda rows_MK: rows_MK @ WEIGHT.T)(torch.ones(1, 3))
    assert not output.is_inference()


def test_who_does_not_come_is_not_waited_for_longer_than_a_product_takes() -> None:
    callers = Callers()
    meeting = Meeting(lambda rows_MK: rows_MK @ WEIGHT.T, callers)
    callers.answered("somebody who interrupts his answer", time.perf_counter())
    meeting._product_s = 0.001
    assert torch.equal(meeting(torch.ones(1, 3)), torch.ones(1, 3) @ WEIGHT.T)


def test_gradients_flow_through_the_layers_own_product() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 4).requires_grad_(False)

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    model = Model()
    share_head(model)
    x = torch.ones(2, 3, requires_grad=True)
    model.head(x).sum().backward()
    assert x.grad is not None
    with torch.no_grad():
        torch.testing.assert_close(model.head(x), x @ model.head.weight.T + model.head.bias)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 1, 3)])
def test_any_shape_comes_back(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert torch.equal(Meeting(lambda rows: rows @ WEIGHT.T)(x), x @ WEIGHT.T)


def test_threads_that_generate_with_a_loaded_model_share_products_of_its_accelerated_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(linear, "_fastest_s", lambda *_: (0.0, 1.0))  # as on a machine where the library wins
    world, right, product = make_world("llama"), Pool.linear, Head()
    head = world.model.get_output_embeddings()
    assert isinstance(head, linear.FastLinear)
    assert head.rows_max == HEAD_ROWS

    def counted(pool: Pool, input_MK: Tensor, *others: Any) -> Tensor:
        product.wait(input_MK)
        return right(pool, input_MK, *others)

    monkeypatch.setattr(Pool, "linear", counted)
    prompts = [torch.tensor([[5, 6 + index, 7]]) for index in range(6)]
    outputs: dict[int, Tensor] = {}

    def generate(index: int) -> None:
        outputs[index] = world.model.generate(prompts[index], max_new_tokens=1, do_sample=False)

    threads = [threading.Thread(target=generate, args=(index,)) for index in range(6)]
    meet(inspect.getclosurevars(head.forward).nonlocals["meeting"], product, threads)
    assert product.sizes == [1, 5]
    for index, prompt in enumerate(prompts):
        assert torch.equal(outputs[index], world.local.generate(prompt, max_new_tokens=1, do_sample=False))
