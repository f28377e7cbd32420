"""Gradients through peers equal local ones: inputs, prompts and heads, padded and packed batches, whatever peers do.

Real engines, handlers and drivers in one process; the real processes' version is in `tests/integration`.
"""

from __future__ import annotations

import asyncio
import copy
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from torch import Tensor
from transformers import AutoModelForSequenceClassification, DynamicCache, Trainer, TrainingArguments

from peers.errors import Refused
from peers.model.adapters import Dropout, dropped
from peers.serving import training as serving
from peers.serving.shelves import TrainingLimits
from peers.wire.messages import AdapterGradient, AdapterTarget, Train, Trained
from routing.errors import CallerError, NoRoute
from swarm import SwarmModelForSequenceClassification
from swarm.errors import SessionClosed, UnsupportedCache, UnsupportedGradient, UnsupportedMask
from swarm.models.classification import with_class_head
from swarm.session import exchange as client
from swarm.session import training
from swarm.session.training import TrainingConfig, TrainingRoute, micro_batches
from tests.helpers.families import FAMILIES, NUM_BLOCKS, VOCABULARY, save_checkpoint
from tests.helpers.memory_swarm import MemorySwarm

pytestmark = pytest.mark.usefixtures("plain_forwards")

SPANS = [(0, 1), (1, NUM_BLOCKS)]
LAYERS = {"gpt-neox": ("query_key_value", "dense_4h_to_h"), "bloom": ("query_key_value", "dense_4h_to_h")}
EVERY_ROW = TrainingConfig(micro_batch_tokens=8)
TOLERANCE = 1e-5


def distance(actual: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    return float((actual - expected).detach().norm() / expected.detach().norm())


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Rows of 9, 6 (padded on the left) and 5 (on the right) tokens; no label is predicted from padding."""
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, 5:] = 0, 0
    ids = ids * mask  # which is the padding token
    labels = ids.masked_fill(mask == 0, -100)
    labels[1, 3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradient_of_inputs(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Loss, and its gradient for the embeddings of what is no padding."""
    given = dict(inputs)
    ids = given.pop("input_ids")
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=embeds, **given).loss
    loss.backward()
    assert embeds.grad is not None
    return loss.detach(), embeds.grad * given.get("attention_mask", torch.ones_like(ids))[..., None]


def adapted(base: Any, *targets: str, **settings: Any) -> Any:
    """With LoRA on these layers of every block; neither A nor B is zero."""
    torch.manual_seed(3)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=3, target_modules=list(targets), init_lora_weights=False, **settings
    )
    return get_peft_model(base, config)


PROMPTS: dict[str, PeftConfig] = {
    "prompt tuning": PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
    "p-tuning": PromptEncoderConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix tuning": PrefixTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3),
    "prefix by a network": PrefixTuningConfig(
        task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8
    ),
}


def prompted(base: Any, method: str) -> Any:
    torch.manual_seed(5)
    return get_peft_model(base, copy.deepcopy(PROMPTS[method])).train()


def gradients_of_adapter(tuned: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    tuned.zero_grad()
    tuned(**inputs).loss.backward()
    return [weight.grad.clone() for weight in tuned.parameters() if weight.requires_grad]


def gradients_of_all(tuned: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Of an adapter, and of what it is fed with."""
    _, of_inputs = gradient_of_inputs(tuned, inputs)
    return [of_inputs, *(weight.grad for weight in tuned.parameters() if weight.requires_grad)]


def route_of(model: Any) -> TrainingRoute:
    route: TrainingRoute = model._remote_layers.remote.training
    return route


def limit(swarm: MemorySwarm, **limits: int) -> None:
    for peer in swarm.peers:
        peer.training.shelf.limits = TrainingLimits(**limits)


def counts(swarm: MemorySwarm) -> tuple[int, int, int]:
    """Backwards, those that used no graph of a forward, and works that are still kept."""
    trainings = [peer.training for peer in swarm.peers]
    return (
        sum(training.counts.backwards for training in trainings),
        sum(training.counts.recomputed for training in trainings),
        sum(len(training.shelf) for training in trainings),
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "gemma3", "gpt-neox", "bloom"])
def test_gradients_of_inputs_equal_local_ones_whatever_peers_kept(family: str, tmp_path: Path) -> None:
    local = save_checkpoint(FAMILIES[family], tmp_path / "model").requires_grad_(False)
    inputs = batch()
    expected_loss, expected = gradient_of_inputs(local, inputs)
    inner, outer = LAYERS.get(family, ("v_proj", "down_proj"))
    if family == "mixtral":
        outer = "q_proj"  # its experts are no linear layers
    whole = adapted(copy.deepcopy(local), inner, outer)
    expected_adapter = gradients_of_adapter(whole, inputs)
    with MemorySwarm(tmp_path / "model", SPANS, cache=tmp_path / "cache", training=True) as swarm:
        model = swarm.model(training=EVERY_ROW)
        tuned = adapted(swarm.model(guest=True, training=EVERY_ROW), inner, outer)
        input_bytes = 9 * 32 * 4
        for kept, (max_bytes, per_peer) in enumerate([(1 << 30, 1 << 30), (1 << 30, 3 * input_bytes), (1 << 30, 1)]):
            limit(swarm, max_bytes=max_bytes, max_bytes_per_peer=per_peer)
            before = counts(swarm)
            loss, gradient = gradient_of_inputs(model, inputs)
            assert distance(loss, expected_loss) <= TOLERANCE
            assert distance(gradient, expected) <= TOLERANCE
            backwards, recomputed = counts(swarm)[0] - before[0], counts(swarm)[1] - before[1]
            assert (backwards, recomputed) == (6, 6 if kept else 0)
            adapter = gradients_of_adapter(tuned, inputs)
            assert len(adapter) == len(expected_adapter) == 2 * 2 * NUM_BLOCKS
            for actual, right in zip(adapter, expected_adapter, strict=True):
                assert distance(actual, right) <= TOLERANCE
        assert route_of(model).traffic.resent == 6
        own = family == "bloom"  # its attention is: it takes no prefix, and no gap behind a soft prompt
        shown = {name: value[::2] for name, value in inputs.items()} if own else inputs
        methods = {"llama": tuple(PROMPTS), "bloom": ("prompt tuning",)}.get(family, ("prompt tuning", "prefix tuning"))
        for method in methods:
            kept = not method.startswith("prefix")
            limit(swarm, max_bytes=1 << 30, max_bytes_per_peer=1 << 30 if kept else 1)
            bases = swarm.model(guest=True, training=EVERY_ROW), copy.deepcopy(local)
            for actual, right in zip(
                *(gradients_of_adapter(prompted(base, method), shown) for base in bases), strict=True
            ):
                assert distance(actual, right) <= TOLERANCE, method
        swarm.add_peer(0, NUM_BLOCKS)
        survivor = swarm.model(guest=True, training=EVERY_ROW)
        hit = interrupted(survivor, lambda _, stretch, backward: backward and 0 in stretch.span, swarm.network.cut)
        bases = survivor, copy.deepcopy(local)
        for actual, right in zip(
            *(gradients_of_all(adapted(base, inner, outer), inputs) for base in bases), strict=True
        ):
            assert distance(actual, right) <= TOLERANCE, "after a kill"
        assert hit
        assert swarm.eventually(lambda: counts(swarm)[2] == 0), "peers forget what was used"
        assert swarm.eventually_settled()


@pytest.fixture(scope="module")
def local(folder: Path) -> Any:
    return save_checkpoint(FAMILIES["llama"], folder).requires_grad_(False)


@pytest.fixture(scope="module")
def crowd(folder: Path, local: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemorySwarm]:
    """Two ways through the model, cut differently."""
    cache = tmp_path_factory.mktemp("cache")
    with MemorySwarm(folder, [(0, 2), (2, 4), (0, 3), (3, 4)], cache=cache, training=True, latency_s=0.01) as swarm:
        yield swarm


@pytest.fixture
def swarm(crowd: MemorySwarm) -> Iterator[MemorySwarm]:
    """Everybody is well, and has room."""
    limit(crowd, max_bytes=1 << 30, max_bytes_per_peer=1 << 30)
    yield crowd

    async def heal() -> None:
        crowd.network.partition()
        for peer in crowd.peers:
            crowd.network.heal(peer.links.transport.peer_id)

    crowd.thread.call(heal())


@pytest.fixture
def model(swarm: MemorySwarm, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its client is new, holds nothing against anybody, and does not look who is slow, which this machine decides."""
    monkeypatch.setattr(training, "REVIEW_S", math.inf)
    return swarm.model(guest=True, training=EVERY_ROW)


def test_a_head_and_what_it_is_fed_by_get_the_gradients_of_a_local_classifier(
    local: Any, folder: Path, swarm: MemorySwarm
) -> None:
    inputs = batch()
    remote = swarm.model(
        guest=True, kind=SwarmModelForSequenceClassification, adapt=lambda model: with_class_head(model, 3)
    )
    whole = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=torch.float32).eval()
    whole.model.requires_grad_(False)
    assert [name for name, weight in remote.named_parameters() if weight.requires_grad] == ["score.weight"]
    whole.score.load_state_dict(remote.score.state_dict())
    assert isinstance(remote, type(whole))
    inputs["labels"] = torch.tensor([0, 2, 1])
    losses = [model(**inputs).loss for model in (remote, whole)]
    assert distance(*losses) <= TOLERANCE
    for loss in losses:
        loss.backward()
    assert distance(remote.score.weight.grad, whole.score.weight.grad) <= TOLERANCE
    # embeddings have no padding token by which a model finds a row's end: it is found by the mask
    (_, actual), (_, expected) = (
        gradient_of_inputs(model, {name: value[:2] for name, value in inputs.items()}) for model in (remote, whole)
    )
    assert distance(actual, expected) <= TOLERANCE
    with torch.no_grad():
        of_ids = remote(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        embeds = remote.get_input_embeddings()(inputs["input_ids"])
        assert distance(remote(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits, of_ids) < 1e-5


def test_packed_documents_attend_to_themselves_alone_with_and_without_gradients(local: Any, model: Any) -> None:
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([[*range(5), *range(4), *range(3)], [*range(7, 13), *range(6)]])
    inputs = {"input_ids": ids, "position_ids": positions, "labels": ids, "use_cache": False}
    expected_loss, expected = gradient_of_inputs(local, inputs)
    loss, gradient = gradient_of_inputs(model, inputs)
    assert distance(loss, expected_loss) <= TOLERANCE
    assert distance(gradient, expected) <= TOLERANCE
    with torch.no_grad():
        assert distance(model(**inputs).loss, expected_loss) <= TOLERANCE
    with pytest.raises(UnsupportedMask, match="one by one"):  # with a mask, a local model would let them see each other
        model(**inputs, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
def test_prompts_and_prefixes_by_peft_equal_local_ones_and_load_locally(
    local: Any, folder: Path, model: Any, tmp_path: Path, method: str
) -> None:
    def tuned(base: Any) -> tuple[Any, list[float]]:
        tuned = prompted(base, method)
        optimizer = torch.optim.AdamW([weight for weight in tuned.parameters() if weight.requires_grad], lr=0.05)
        losses = []
        for step in range(4):
            loss = tuned(**batch(step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return tuned.eval(), losses

    (remote, losses), (_, expected) = tuned(model), tuned(local)
    # AdamW divides by a gradient's own size, which makes more of what is nearly nothing
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[-1] != pytest.approx(losses[0], rel=1e-2)
    remote.save_pretrained(tmp_path / "adapter")
    inputs = {name: value for name, value in batch(9).items() if name != "labels"}
    loaded = PeftModel.from_pretrained(copy.deepcopy(local), tmp_path / "adapter")
    with torch.no_grad():
        actual, here = (each.eval()(**inputs).logits[:, -9:] for each in (remote, loaded))
    kept = inputs["attention_mask"][..., None] > 0
    assert distance(actual * kept, here * kept) <= TOLERANCE


def test_a_prefix_that_cannot_travel_is_refused_by_name(model: Any) -> None:
    ids = batch()["input_ids"][:1].repeat(2, 1)

    def prefix(*shapes: tuple[int, ...]) -> DynamicCache:
        return DynamicCache([(torch.zeros(shape), torch.zeros(shape)) for shape in shapes])

    whole = (2, 2, 3, 8)
    other = prefix(*[whole] * NUM_BLOCKS)
    other.layers[1].values[1] += 1
    for cache, says in (
        (prefix(whole), "layers are remote"),
        (prefix(*[(2, 2, 300, 8)] * NUM_BLOCKS), "300 positions"),
        (prefix(*[whole] * 3, (2, 2, 2, 8)), "before block 3"),
        (other, "different prefixes"),
    ):
        with pytest.raises(UnsupportedCache, match=says):
            model(input_ids=ids, past_key_values=cache)
    with pytest.raises(Refused, match="keys and values of that shape"):
        model(input_ids=ids, past_key_values=prefix(*[(2, 2, 3, 6)] * NUM_BLOCKS))
    answer = model(input_ids=ids, past_key_values=prefix(*[whole] * NUM_BLOCKS), use_cache=True)
    with pytest.raises(SessionClosed):  # it is not taken for the prefix alone
        model(input_ids=ids, past_key_values=answer.past_key_values)


def interrupted(
    model: Any, when: Callable[[TrainingRoute, Any, bool], bool], act: Callable[[str], None], after_s: float = 0.005
) -> list[str]:
    """Let `act` happen to the peer of the first step that `when` chooses, while that is on its way."""
    route, ask, hit = route_of(model), route_of(model)._exchange.ask, list[str]()

    async def asking(batch: Any, stretch: Any, gradient: Any, **options: Any) -> Tensor:
        if hit or not when(route, stretch, gradient is not None):
            return await ask(batch, stretch, gradient, **options)
        hit.append(stretch.hop.peer_id)
        answer = asyncio.ensure_future(ask(batch, stretch, gradient, **options))
        await asyncio.sleep(after_s)  # the way there takes longer
        act(stretch.hop.peer_id)
        return await answer

    route._exchange.ask = asking
    return hit


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("block", [0, 3])
def test_a_peer_that_dies_on_the_way_changes_no_gradient(
    local: Any, swarm: MemorySwarm, model: Any, block: int, backward: bool
) -> None:
    def chosen(_: TrainingRoute, stretch: Any, is_backward: bool) -> bool:
        return is_backward == backward and block in stretch.span

    hit = interrupted(model, chosen, swarm.network.cut)
    expected_loss, expected = gradient_of_inputs(local, batch())
    loss, gradient = gradient_of_inputs(model, batch())
    assert distance(loss, expected_loss) <= TOLERANCE
    assert distance(gradient, expected) <= TOLERANCE
    assert hit
    assert hit[0] not in {hop.peer_id for hop in route_of(model).route.hops}
    assert route_of(model).traffic.failures["lost"]
    if backward:
        assert route_of(model).traffic.rerouted


def test_a_silent_peer_is_left_for_another(
    local: Any, swarm: MemorySwarm, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "LOOK_S", 0.05)
    monkeypatch.setattr(client, "PING_TIMEOUT_S", 0.2)
    _, expected = gradient_of_inputs(local, batch())
    gradient_of_inputs(model, batch())  # it is known, and was well
    everybody = {peer.links.transport.peer_id for peer in swarm.peers}
    everybody.add(swarm._guests[-1].client.links.transport.peer_id)
    hit = interrupted(model, lambda *_: True, lambda peer: swarm.network.partition([peer], everybody - {peer}))
    assert distance(gradient_of_inputs(model, batch())[1], expected) <= TOLERANCE
    assert hit[0] not in {hop.peer_id for hop in route_of(model).route.hops}


def test_a_paused_peer_is_left_without_blame_and_what_it_kept_is_computed_elsewhere(
    local: Any, swarm: MemorySwarm, model: Any
) -> None:
    def pause(peer_id: str) -> None:
        paused.append(next(peer for peer in swarm.peers if peer.links.transport.peer_id == peer_id))
        paused[0].pause(True)

    paused: list[Any] = []
    _, expected = gradient_of_inputs(local, batch())
    interrupted(model, lambda _, stretch, backward: backward and 3 in stretch.span, pause, after_s=0.0)
    try:
        assert distance(gradient_of_inputs(model, batch())[1], expected) <= TOLERANCE
    finally:
        swarm.pause_peer(paused[0].links.transport.peer_id, False)
    traffic = route_of(model).traffic
    assert traffic.failures["paused"]
    assert traffic.rerouted
    assert not traffic.failures["lost"]


def test_a_slow_peer_is_waited_for_and_then_left(
    local: Any, swarm: MemorySwarm, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the others it is said what they take."""
    _, expected = gradient_of_inputs(local, batch())
    gradient_of_inputs(model, batch())
    slow = route_of(model).route.hops[0].peer_id
    (peer,) = (peer for peer in swarm.peers if peer.links.transport.peer_id == slow)
    backward = peer.training._backward

    async def slowly(*arguments: Any) -> Any:
        await asyncio.sleep(0.5)
        return await backward(*arguments)

    monkeypatch.setattr(peer.training, "_backward", slowly)
    for left in (False, True):
        if left:  # it is time to look
            route_of(model)._review_at_s = 0.0
            paces = route_of(model)._exchange.block_s
            assert paces[slow] > 0.3 * 0.5 / (9 * NUM_BLOCKS), "at least what one step took"
            paces.update({other: paces[slow] / 5 for other in paces if other != slow})
        assert distance(gradient_of_inputs(model, batch())[1], expected) <= TOLERANCE
        assert (slow not in {hop.peer_id for hop in route_of(model).route.hops}) == left
    assert not route_of(model).traffic.failures


def test_micro_batches_are_at_several_hops_at_once_both_ways_and_never_more_than_so_many(
    local: Any, swarm: MemorySwarm, model: Any
) -> None:
    inputs = {name: value.repeat(4, 1) for name, value in batch().items()}
    _, expected = gradient_of_inputs(local, inputs)
    route = route_of(model)
    route.config = TrainingConfig(micro_batch_tokens=8, in_flight=2)
    ask, now, seen = route._exchange.ask, Counter[tuple[bool, int]](), list[tuple[bool, int, int]]()

    async def asking(batch: Any, stretch: Any, gradient: Any, **options: Any) -> Tensor:
        backward, block = gradient is not None, stretch.span.start
        now[backward, block] += 1
        seen.append((backward, sum(count > 0 for count in now.values()), now.total()))
        try:
            return await ask(batch, stretch, gradient, **options)
        finally:
            now[backward, block] -= 1

    route._exchange.ask = asking  # type: ignore[method-assign]
    assert distance(gradient_of_inputs(model, inputs)[1], expected) <= TOLERANCE
    for backward in (False, True):
        assert max(hops for way, hops, _ in seen if way == backward) == 2
    assert max(together for *_, together in seen) == 2 * 2, "for each hop"


def test_a_peer_that_trains_nobody_is_left_without_blame(local: Any, swarm: MemorySwarm, model: Any) -> None:
    for peer in swarm.peers[:2]:
        peer.training.shelf.limits = TrainingLimits(max_bytes=0)
    _, expected = gradient_of_inputs(local, batch())
    for _ in range(2):
        assert distance(gradient_of_inputs(model, batch())[1], expected) <= TOLERANCE
    assert {hop.peer_id for hop in route_of(model).route.hops} == {
        peer.links.transport.peer_id for peer in swarm.peers[2:]
    }
    assert route_of(model).traffic.failures["lost"] == 0


@pytest.mark.parametrize("sends", [False, True])
def test_values_that_are_not_finite_are_their_peers_failure(
    local: Any, swarm: MemorySwarm, model: Any, monkeypatch: pytest.MonkeyPatch, sends: bool
) -> None:
    async def poisoned(link: Any, head: Train, rows: Tensor, adapter: Any) -> tuple[Tensor, float, None]:
        return torch.full_like(rows, float("nan")), 0.1, None

    gradient_of_inputs(model, batch())
    used = {route_of(model).route.hops[0].peer_id}

    if sends:  # as a peer would that does not look
        honest = SimpleNamespace(**vars(serving.tensors))
        monkeypatch.setattr(serving, "tensors", SimpleNamespace(DTYPES=honest.DTYPES, finite=lambda _: True))
    for peer in swarm.peers:
        if peer.links.transport.peer_id in used:
            monkeypatch.setattr(peer.training, "_forward", poisoned)
    _, expected = gradient_of_inputs(local, batch())
    assert distance(gradient_of_inputs(model, batch())[1], expected) <= TOLERANCE
    assert route_of(model).traffic.failures["lost"]
    health = swarm._guests[-1].client.router.opinions(swarm._guests[-1].client.discovery.now_s(), 9)
    reasons = [opinion.reason for opinion in health if opinion.reason]
    assert any("not finite" in reason or "NaN" in reason for reason in reasons)


@pytest.mark.parametrize("of_adapter", [False, True])
def test_a_gradient_that_is_far_too_long_is_its_peers_failure(
    local: Any, swarm: MemorySwarm, model: Any, monkeypatch: pytest.MonkeyPatch, of_adapter: bool
) -> None:
    tuned, whole = adapted(model, "q_proj"), adapted(copy.deepcopy(local), "q_proj")
    gradients_of_adapter(tuned, batch())
    used = route_of(model).route.hops[0].peer_id
    (peer,) = (peer for peer in swarm.peers if peer.links.transport.peer_id == used)
    backward = peer.training._backward

    async def exaggerated(*arguments: Any) -> tuple[Tensor, float, Tensor | None]:
        rows, seconds, added = await backward(*arguments)
        return (rows, seconds, added * 1e12) if of_adapter else (rows * 1e9, seconds, added)

    monkeypatch.setattr(peer.training, "_backward", exaggerated)
    for actual, right in zip(gradients_of_adapter(tuned, batch()), gradients_of_adapter(whole, batch()), strict=True):
        assert distance(actual, right) <= TOLERANCE
    client = swarm._guests[-1].client
    opinions = {opinion.peer_id: opinion.reason for opinion in client.router.opinions(client.discovery.now_s(), 9)}
    assert f"{used} sent a gradient of the {'adapter' if of_adapter else 'input'}" in (opinions[used] or "")


def test_loss_that_is_not_finite_never_leaves(model: Any) -> None:
    embeds = model.get_input_embeddings()(batch()["input_ids"]).detach().requires_grad_()
    loss = model(inputs_embeds=embeds, labels=batch()["labels"]).loss
    with pytest.raises(CallerError, match="not finite"):
        (loss * float("nan")).backward()
    with pytest.raises(CallerError, match="not finite"):
        model(inputs_embeds=embeds * float("inf"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_is_taken_and_sends_no_forward_twice(local: Any, model: Any, reentrant: bool) -> None:
    _, expected = gradient_of_inputs(local, batch())
    model.train().activation_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_activation_checkpointing
    assert distance(gradient_of_inputs(model, batch())[1], expected) <= TOLERANCE
    traffic = route_of(model).traffic
    assert traffic.forwards == traffic.backwards == 6


def test_half_as_many_bytes_come_close(local: Any, swarm: MemorySwarm) -> None:
    inputs = batch()
    _, expected = gradient_of_inputs(local, inputs)
    whole, half = (swarm.model(guest=True, training=TrainingConfig(dtype=dtype)) for dtype in (None, "bfloat16"))
    assert distance(gradient_of_inputs(whole, inputs)[1], expected) <= TOLERANCE
    assert TOLERANCE < distance(gradient_of_inputs(half, inputs)[1], expected) < 0.1
    assert 2 * route_of(half).traffic.bytes_sent == route_of(whole).traffic.bytes_sent


def test_a_graph_may_be_used_twice_and_a_cache_trains_nothing(local: Any, model: Any) -> None:
    embeds = model.get_input_embeddings()(batch()["input_ids"][:1]).detach().requires_grad_()
    answer = model(inputs_embeds=embeds, use_cache=True)
    first, second = (torch.autograd.grad(answer.logits.square().sum(), embeds, retain_graph=True)[0] for _ in range(2))
    assert distance(second, first) <= TOLERANCE
    with pytest.raises(SessionClosed):
        model(input_ids=batch()["input_ids"][:1, :1], past_key_values=answer.past_key_values)
    with torch.no_grad():
        cache = model(inputs_embeds=embeds, use_cache=True).past_key_values
    with pytest.raises(UnsupportedGradient, match="what a cache holds"):
        model(inputs_embeds=embeds[:, :1], past_key_values=cache)
    cache.close()


def test_generation_goes_on_while_somebody_trains(local: Any, swarm: MemorySwarm, model: Any) -> None:
    greedy = {"do_sample": False, "max_new_tokens": 24, "min_new_tokens": 24, "pad_token_id": 0}
    ids = batch()["input_ids"][:1]
    _, expected = gradient_of_inputs(local, batch())
    reader = swarm.model(guest=True)
    with ThreadPoolExecutor(1) as threads:
        training = threads.submit(lambda: [gradient_of_inputs(model, batch())[1] for _ in range(4)])
        assert torch.equal(reader.generate(ids, **greedy), local.generate(ids, **greedy))
        assert all(distance(gradient, expected) <= TOLERANCE for gradient in training.result())


def test_lora_by_peft_equals_local_and_its_adapter_loads_locally(
    local: Any, folder: Path, swarm: MemorySwarm, model: Any, tmp_path: Path
) -> None:
    def tune(base: Any) -> tuple[Any, list[float]]:
        tuned = adapted(base, "q_proj", "up_proj")
        optimizer = torch.optim.SGD([weight for weight in tuned.parameters() if weight.requires_grad], lr=0.05)
        losses = []
        for step in range(4):
            loss = tuned(**batch(step)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return tuned, losses

    (remote, losses), (_, expected) = tune(model), tune(copy.deepcopy(local))
    assert losses == pytest.approx(expected, rel=1e-5)
    remote.save_pretrained(tmp_path / "adapter")
    inputs = batch(9)
    kept = inputs["attention_mask"][..., None] > 0
    loaded = PeftModel.from_pretrained(copy.deepcopy(local), tmp_path / "adapter")
    with torch.no_grad():
        assert distance(remote(**inputs, use_cache=False).logits * kept, loaded(**inputs).logits * kept) <= TOLERANCE
        with remote.disable_adapter():
            assert distance(remote(**inputs).logits * kept, local(**inputs).logits * kept) <= TOLERANCE
    # uploaded once for each step and hop, whatever the number of micro-batches
    values = sum(weight.numel() for weight in remote.parameters() if weight.requires_grad)
    assert 5 * 4 * values <= route_of(model)._uploads.bytes_sent < 5 * 4 * values * 1.3
    # nobody else's work changed, and nobody else can use it
    other = swarm.model(guest=True)
    _, expected_gradient = gradient_of_inputs(local, inputs)
    assert distance(gradient_of_inputs(other, inputs)[1], expected_gradient) <= TOLERANCE


def test_transformers_trainer_runs_unchanged(local: Any, model: Any, tmp_path: Path) -> None:
    """Accumulation, clipping, a schedule, evaluation, checkpoints: the losses of a local run."""
    rows = [{name: value[index] for name, value in batch(seed).items()} for seed in range(6) for index in (0, 2)]

    def train(base: Any, folder: Path) -> list[float]:
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=20,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=0.01,
            max_grad_norm=0.5,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=2,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=10,
            save_steps=10,
            use_cpu=True,
            disable_tqdm=True,
            report_to=[],
            seed=1,
        )
        trainer = Trainer(model=adapted(base, "q_proj"), args=arguments, train_dataset=rows, eval_dataset=rows[:4])
        trainer.train()
        return [entry[name] for entry in trainer.state.log_history for name in ("loss", "eval_loss") if name in entry]

    expected = train(copy.deepcopy(local), tmp_path / "local")
    assert len(expected) == 22
    assert train(model, tmp_path / "remote") == pytest.approx(expected, rel=1e-3)
    assert (tmp_path / "remote" / "checkpoint-20" / "adapter_model.safetensors").exists()


def test_an_adapter_that_a_peer_dropped_is_sent_again(local: Any, swarm: MemorySwarm, model: Any) -> None:
    tuned, whole = adapted(model, "k_proj"), adapted(copy.deepcopy(local), "k_proj")
    gradients_of_adapter(tuned, batch())

    async def drop() -> None:
        for peer in swarm.peers:
            peer.handler.adapters.clear()

    swarm.thread.call(drop())
    for actual, right in zip(gradients_of_adapter(tuned, batch()), gradients_of_adapter(whole, batch()), strict=True):
        assert distance(actual, right) <= TOLERANCE
    assert route_of(model).traffic.failures["unknown_adapter"]


def test_a_peer_that_dies_while_it_is_sent_an_adapter_is_replaced(local: Any, swarm: MemorySwarm, model: Any) -> None:
    tuned, whole = adapted(model, "q_proj"), adapted(copy.deepcopy(local), "q_proj")
    uploads, hit = route_of(model)._uploads, list[str]()
    send = uploads.send

    async def sending(link: Any, adapter: Any, span: Any) -> None:
        if 3 in span and not hit:
            hit.append(link.remote)
            asyncio.get_running_loop().call_soon(swarm.network.cut, link.remote)
        await send(link, adapter, span)

    uploads.send = sending
    try:
        for actual, right in zip(*(gradients_of_adapter(each, batch()) for each in (tuned, whole)), strict=True):
            assert distance(actual, right) <= TOLERANCE
    finally:
        uploads.send = send
    assert hit
    assert route_of(model).traffic.failures["lost"]


def test_a_peer_that_dies_in_a_backward_neither_loses_nor_doubles_an_adapters_gradient(
    local: Any, swarm: MemorySwarm, model: Any
) -> None:
    tuned, whole = adapted(model, "q_proj"), adapted(copy.deepcopy(local), "q_proj")
    hit = interrupted(model, lambda _, stretch, backward: backward and 0 in stretch.span, swarm.network.cut)
    for actual, right in zip(gradients_of_adapter(tuned, batch()), gradients_of_adapter(whole, batch()), strict=True):
        assert distance(actual, right) <= TOLERANCE
    assert hit


@pytest.mark.parametrize("what", ["dies", "forgets", "adds what nobody asked for"])
def test_a_sum_that_does_not_come_or_is_of_other_steps_is_made_again_without_loss_or_doubling(
    local: Any, swarm: MemorySwarm, model: Any, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    tuned, whole = adapted(model, "q_proj"), adapted(copy.deepcopy(local), "q_proj")
    gradients_of_adapter(tuned, batch())
    before = counts(swarm)[2]  # what other tests began and did not end waits for its lease
    used = route_of(model).route.hops[-1].peer_id  # the first in a backward: all others still go on meanwhile
    (peer,) = (peer for peer in swarm.peers if peer.links.transport.peer_id == used)
    summed, happened = peer.training._summed, list[bool]()

    def otherwise(link: Any, head: Train, added: Tensor) -> Any:
        if what == "forgets" and not happened:  # the first of three
            happened.append(True)
            return None
        result = summed(link, head, added)
        if result is None or len(happened) > (what == "forgets"):
            return result
        happened.append(True)
        if what == "dies":
            asyncio.get_running_loop().call_soon(swarm.network.cut, used)
        return ((*result[0], bytes(16)), result[1]) if what.startswith("adds") else result

    monkeypatch.setattr(peer.training, "_summed", otherwise)
    for actual, right in zip(gradients_of_adapter(tuned, batch()), gradients_of_adapter(whole, batch()), strict=True):
        assert distance(actual, right) <= TOLERANCE
    assert happened
    assert route_of(model).traffic.rerouted == (1 if what == "forgets" else 3)
    assert bool(route_of(model).traffic.failures["lost"]) == (what == "dies")
    assert not route_of(model)._exchange._sums
    assert swarm.eventually(lambda: counts(swarm)[2] <= before), "nothing of it stays"


def test_an_adapters_gradient_comes_once_for_each_hop_and_keeps_no_rows_waiting(
    local: Any, swarm: MemorySwarm, model: Any
) -> None:
    tuned, route = adapted(model, "q_proj"), route_of(model)
    heard = defaultdict[str, list[str]](list)

    async def hear(link: Any, message: Any, payload: memoryview) -> None:
        if isinstance(message, AdapterGradient):
            heard[link.remote].append("sum")
            await route._exchange._adapter_gradient(link, message, payload)
        else:
            heard[link.remote].append("gradient" if message.backward else "output")
            await route._exchange._trained(link, message, payload)

    for kind in (Trained, AdapterGradient):
        swarm._guests[-1].client.links.handle(kind, hear)
    gradients_of_adapter(tuned, batch())
    assert list(heard.values()) == [["output"] * 3 + ["gradient"] * 3 + ["sum"]] * 2


class Dropped(torch.nn.Module):
    """Locally what peers do: each row of a batch is a sequence."""

    def __init__(self, dropout: Dropout, target: AdapterTarget, mask_BT: Tensor) -> None:
        super().__init__()
        self._dropout, self._target, self._mask_BT = dropout, target, mask_BT.bool()

    def forward(self, x_BTK: Tensor) -> Tensor:
        x_BTK = x_BTK.clone()
        for row, kept_T in enumerate(self._mask_BT):
            x_BTK[row, kept_T] = x_BTK[row, kept_T] * dropped(self._dropout, self._target, row, int(kept_T.sum()))
        return x_BTK


def test_lora_dropout_comes_from_a_seed_and_is_the_same_whoever_computes_it_again(
    local: Any, swarm: MemorySwarm, model: Any
) -> None:
    tuned, whole = (
        adapted(base, "q_proj", "down_proj", lora_dropout=0.4).train() for base in (model, copy.deepcopy(local))
    )
    inputs = batch()

    def gradients(base: Any, seed: int = 11) -> list[Tensor]:
        torch.manual_seed(seed)
        return gradients_of_adapter(base, inputs)

    torch.manual_seed(11)
    dropout = Dropout(0.4, int(torch.randint(1 << 62, ())))
    layers = whole.base_model.model.model.layers
    for target in model._remote_layers._adapters.read().targets:
        module = layers[target.block].get_submodule(target.module)
        module.lora_dropout["default"] = Dropped(dropout, target, inputs["attention_mask"])
    expected = gradients(whole)

    def same(actual: list[Tensor]) -> bool:
        return all(distance(one, right) <= TOLERANCE for one, right in zip(actual, expected, strict=True))

    for per_peer in (1 << 30, 3 * 9 * 32 * 4, 1):  # graphs are kept; inputs are; nothing is
        limit(swarm, max_bytes=1 << 30, max_bytes_per_peer=per_peer)
        assert same(gradients(tuned))
    assert not same(gradients(tuned, seed=12))
    limit(swarm, max_bytes=1 << 30, max_bytes_per_peer=1 << 30)
    hit = interrupted(model, lambda _, stretch, backward: backward and 0 in stretch.span, swarm.network.cut)
    assert same(gradients(tuned))
    assert hit
    tuned.eval()
    assert distance(tuned(**inputs).loss, adapted(copy.deepcopy(local), "q_proj", "down_proj")(**inputs).loss) <= 1e-5


def test_where_nobody_trains_the_blocks_are_named(swarm: MemorySwarm, model: Any) -> None:
    limit(swarm, max_bytes=0)
    route_of(model).config = TrainingConfig(patience_s=0.01)
    with pytest.raises((NoRoute, Refused)):
        gradient_of_inputs(model, batch())


def test_micro_batches_are_whole_sequences_in_order() -> None:
    assert micro_batches((5, 3, 9, 1, 1), 8) == [(5, 3), (9,), (1, 1)]
    assert micro_batches((1,) * 1025, 5000) == [(1,) * 1024, (1,)]
