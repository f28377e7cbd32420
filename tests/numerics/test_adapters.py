"""Generation through peers with a private adapter says what the local model says with it, and nobody else notices.

One process, memory transport, real engines, handlers and drivers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import Tensor

from peers.errors import ProtocolError
from peers.model.lora import AdapterFolder, open_adapter
from peers.wire.messages import PREFIX_POSITIONS
from routing.errors import CallerError, NoRoute
from swarm.errors import UnsupportedAdapter, UnsupportedCache, UnsupportedGradient
from swarm.session.core import SessionConfig
from tests.helpers.families import FAMILIES, NUM_BLOCKS, VOCABULARY, save_checkpoint
from tests.helpers.memory_swarm import MemorySwarm, impatient
from tests.numerics.test_gradients import PROMPTS, distance, prompted
from tests.numerics.test_trouble import AtToken

pytestmark = pytest.mark.usefixtures("plain_forwards")

SPANS = [(0, 1), (1, 3), (3, NUM_BLOCKS)]
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}


def lora(*targets: str, r: int = 3, **settings: Any) -> LoraConfig:
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM, r=r, target_modules=list(targets), init_lora_weights=False, **settings
    )


def adapted(base: Any, seed: int = 3, *targets: str) -> Any:
    """With LoRA inside every block; neither A nor B is zero."""
    torch.manual_seed(seed)
    return get_peft_model(base, lora(*(targets or ("q_proj", "v_proj", "down_proj")), lora_alpha=9)).eval()


def prompt(length: int = 40, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(seed))


def ragged() -> dict[str, Tensor]:
    """Rows of 9, 6 and 4 tokens, padded on the left."""
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :3], mask[2, :5] = 0, 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def remote_of(tuned: Any) -> Any:
    return tuned.get_base_model()._remote_layers.remote


@pytest.fixture(scope="module")
def swarm(folder: Path, local: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MemorySwarm]:
    cache, config = tmp_path_factory.mktemp("cache"), SessionConfig(chunk_positions=16)
    with MemorySwarm(folder, SPANS, cache=cache, session_config=config, training=True) as swarm:
        yield swarm


def test_every_way_to_generate_equals_local_peft(local: Any, swarm: MemorySwarm) -> None:
    whole, tuned = adapted(copy.deepcopy(local)), adapted(swarm.model(guest=True))
    ids = prompt()
    plain = local.generate(ids, **GREEDY)
    expected = whole.generate(input_ids=ids, **GREEDY)
    assert not torch.equal(expected, plain), "the adapter says nothing of its own"
    assert torch.equal(tuned.generate(input_ids=ids, **GREEDY), expected)
    assert torch.equal(tuned.generate(**ragged(), **GREEDY), whole.generate(**ragged(), **GREEDY))
    for way in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"assistant_model": local}):
        settings = {**GREEDY, **way}
        assert torch.equal(tuned.generate(input_ids=ids, **settings), whole.generate(input_ids=ids, **settings))
    with torch.no_grad():
        for inputs in ({"input_ids": ids}, {"input_ids": ids, "use_cache": False}):
            assert distance(tuned(**inputs).logits, whole(**inputs).logits) <= 1e-5
    with tuned.disable_adapter():
        assert torch.equal(tuned.generate(input_ids=ids, **GREEDY), plain)
    assert swarm.eventually_settled()


def test_adapters_are_read_at_each_forward(local: Any, swarm: MemorySwarm, tmp_path: Path) -> None:
    def tuned_of(base: Any) -> Any:
        tuned = adapted(base)
        torch.manual_seed(5)
        tuned.add_adapter("other", lora("q_proj", "o_proj", r=2, lora_alpha=7))
        return tuned.eval()

    whole, tuned, ids = tuned_of(copy.deepcopy(local)), tuned_of(swarm.model(guest=True)), prompt(20)
    answers = []
    for active in ("default", "other", ["default", "other"], "default"):
        for model in (whole, tuned):
            model.base_model.set_adapter(active)
        answers.append(tuned.generate(input_ids=ids, **GREEDY))
        assert torch.equal(answers[-1], whole.generate(input_ids=ids, **GREEDY))
    assert len({tuple(answer[0].tolist()) for answer in answers}) == 3
    sent = remote_of(tuned).uploads.bytes_sent
    tuned.generate(input_ids=ids, **GREEDY)
    assert remote_of(tuned).uploads.bytes_sent == sent, "sent again, though every peer has it"
    whole.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(swarm.model(guest=True), tmp_path / "other")
    whole.base_model.set_adapter("other")
    assert torch.equal(loaded.generate(input_ids=ids, **GREEDY), whole.generate(input_ids=ids, **GREEDY))


def test_what_another_adapter_computed_is_never_gone_on_with(local: Any, swarm: MemorySwarm) -> None:
    whole, tuned, ids = adapted(copy.deepcopy(local)), adapted(swarm.model(guest=True)), prompt(20)

    def written() -> None:
        for model in (whole, tuned):
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.requires_grad:
                        weight.mul_(1.5)

    base = tuned.get_base_model()
    with base.session() as session:  # a conversation goes on, and begins anew with another adapter
        for turn in range(3):
            if turn == 2:
                written()
            ids = torch.cat([ids, prompt(3, seed=turn)], 1)
            before = remote_of(tuned).traffic.results
            answer = tuned.generate(input_ids=ids, **GREEDY)
            assert torch.equal(answer, whole.generate(input_ids=ids, **GREEDY))
            assert session.length == answer.shape[1] - 1
            chunks = -(-len(ids[0]) // 16)
            assert (remote_of(tuned).traffic.results - before >= 11 + chunks) == (turn != 1)
            ids = answer
    with torch.no_grad():
        cache = tuned(input_ids=ids, use_cache=True).past_key_values
        written()
        with pytest.raises(UnsupportedCache, match="not the one"):
            tuned(input_ids=ids[:, :1], past_key_values=cache)
        with tuned.disable_adapter(), pytest.raises(UnsupportedCache):
            tuned(input_ids=ids[:, :1], past_key_values=cache)
        cache.crop(-cache.get_seq_length())
        again = tuned(input_ids=ids, past_key_values=cache)
        assert distance(again.logits, whole(input_ids=ids).logits) <= 1e-5
        cache.close()
        for weight in tuned.parameters():
            if weight.requires_grad:
                weight.fill_(float("nan"))
    with pytest.raises(CallerError, match="not finite"):
        tuned.generate(input_ids=ids, **GREEDY)
    dropping = get_peft_model(swarm.model(guest=True), lora("q_proj", lora_dropout=0.5)).train()
    with pytest.raises(UnsupportedAdapter, match="lora_dropout"):
        dropping.generate(input_ids=ids, **GREEDY)
    assert swarm.eventually_settled()


def test_several_clients_and_none_share_peers(local: Any, swarm: MemorySwarm) -> None:
    """Each says what its own local model says, and what peers keep of a prompt is of one adapter alone."""
    ids = prompt(2 * PREFIX_POSITIONS + 5)
    plain = swarm.model(guest=True)
    models = [adapted(swarm.model(guest=True), seed) for seed in (1, 2)]
    wholes = [adapted(copy.deepcopy(local), seed) for seed in (1, 2)]
    with ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(model.generate, input_ids=ids, **GREEDY) for model in (plain, *models)]
        answers = [each.result() for each in asked]
    for answer, whole in zip(answers, (local, *wholes), strict=True):
        assert torch.equal(answer, whole.generate(input_ids=ids, **GREEDY))
    remote = remote_of(models[0])
    assert torch.equal(models[0].generate(input_ids=ids, **GREEDY), answers[1])
    assert remote.traffic.prefix_positions == 2 * PREFIX_POSITIONS
    with models[0].disable_adapter():
        assert torch.equal(models[0].generate(input_ids=ids, **GREEDY), answers[0])
    assert remote.traffic.prefix_positions == 2 * PREFIX_POSITIONS


def test_an_adapter_that_a_peer_dropped_is_sent_again_in_the_middle(local: Any, swarm: MemorySwarm) -> None:
    tuned, whole, ids = adapted(swarm.model(guest=True)), adapted(copy.deepcopy(local)), prompt()

    async def drop() -> None:
        for peer in swarm.peers:
            peer.handler.adapters.clear()

    again = AtToken(5, lambda: swarm.thread.call(drop()))
    answer = tuned.generate(input_ids=ids, stopping_criteria=[again], **GREEDY)
    assert torch.equal(answer, whole.generate(input_ids=ids, **GREEDY))
    traffic = remote_of(tuned).traffic
    assert traffic.failures["unknown_adapter"]
    assert not traffic.failures["lost"]


@pytest.fixture
def doubled(folder: Path, local: Any, tmp_path: Path) -> Iterator[MemorySwarm]:
    """Two peers for each hop."""
    with MemorySwarm(folder, SPANS * 2, cache=tmp_path, session_config=SessionConfig(standby_lag=4)) as swarm:
        yield swarm


def test_a_peer_that_dies_and_one_that_leaves_are_replaced_by_others_that_are_sent_the_adapter(
    local: Any, doubled: MemorySwarm
) -> None:
    tuned, whole, ids = adapted(doubled.model()), adapted(copy.deepcopy(local)), prompt()
    remote, used = remote_of(tuned), list[Any]()

    def route() -> list[Any]:
        return [hop.peer_id for hop in remote.route.hops]

    def die() -> None:
        used.append(route())
        doubled.kill_peer(route()[1])

    def leave() -> None:
        used.append(route())
        leaving.append(doubled.drain_peer(route()[0]))

    leaving: list[Any] = []
    acts = [AtToken(4, die), AtToken(8, leave)]
    answer = tuned.generate(input_ids=ids, stopping_criteria=acts, **GREEDY)
    assert torch.equal(answer, whole.generate(input_ids=ids, **GREEDY))
    leaving[0].result(timeout=60.0)
    assert [before != after for before, after in zip(used[0], used[1], strict=True)] == [False, True, False]
    assert [before != after for before, after in zip(used[1], route(), strict=True)] == [True, False, False]
    assert remote.traffic.replayed_positions, "the hop before it had what the new one needed"
    values = sum(weight.numel() for name, weight in tuned.named_parameters() if "lora" in name)
    assert remote.uploads.bytes_sent < 2.5 * 4 * values, "each peer once, and its part only"


@pytest.mark.parametrize("method", ["lora", "prefix tuning"])
def test_a_standby_is_sent_the_adapter_and_takes_over(local: Any, doubled: MemorySwarm, method: str) -> None:
    tuned, whole = (
        adapted(base) if method == "lora" else prompted(base, method).eval()
        for base in (doubled.model(), copy.deepcopy(local))
    )
    ids, remote = prompt(), remote_of(tuned)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def filled() -> bool:
        held = [len(session.core.standby_hops) for session in remote._sessions.by_id.values()]
        ready = [s.held for session in remote._sessions.by_id.values() for s in session.core._standbys if s.open]
        return held == [len(SPANS)] and len(ready) == len(SPANS) and min(ready) >= ids.shape[1]

    def die() -> None:
        doubled.eventually(filled)
        doubled.kill_peer(remote.route.hops[1].peer_id)

    with tuned.get_base_model().session(resilience="standby"):
        answer = tuned.generate(**inputs, stopping_criteria=[AtToken(8, die)], **GREEDY)
    assert torch.equal(answer, whole.generate(**inputs, **GREEDY))
    assert remote.traffic.switches
    assert not remote.traffic.failures["unknown_adapter"]


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # by PEFT, of its own doing
@pytest.mark.parametrize("method", PROMPTS)
def test_prompts_and_prefixes_generate_what_local_peft_does(local: Any, swarm: MemorySwarm, method: str) -> None:
    whole, tuned = (prompted(base, method).eval() for base in (copy.deepcopy(local), swarm.model(guest=True)))
    inputs = {"input_ids": prompt(), "attention_mask": torch.ones_like(prompt())}
    expected = whole.generate(**inputs, **GREEDY)
    assert not torch.equal(expected, local.generate(**inputs, **GREEDY)), "it says nothing of its own"
    assert torch.equal(tuned.generate(**inputs, **GREEDY), expected)
    settings = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(tuned.generate(**inputs, **settings), whole.generate(**inputs, **settings))
    if method.startswith("prefix"):
        assert torch.equal(tuned.generate(**ragged(), **GREEDY), whole.generate(**ragged(), **GREEDY))
    else:  # each row says what it says alone: a local model leaves its padding's positions between prompt and tokens
        together, right = ragged(), ragged()
        for name, value in right.items():
            right[name] = torch.stack([row.roll(-pad) for row, pad in zip(value, (0, 3, 5), strict=True)])
        answers = [tuned.generate(**padded, **GREEDY)[:, -12:] for padded in (together, right)]
        for row, pad in enumerate((0, 3, 5)):
            one = {name: value[row : row + 1, pad:] for name, value in together.items()}
            for answer in answers:
                assert torch.equal(answer[row : row + 1], whole.generate(**one, **GREEDY)[:, -12:])
    with tuned.disable_adapter():
        assert torch.equal(tuned.generate(**inputs, **GREEDY), local.generate(**inputs, **GREEDY))
    with tuned.get_base_model().session() as session:
        ids = inputs["input_ids"]
        for turn in range(3):  # the last one goes back to its first token
            ids = torch.cat([ids, prompt(3, seed=turn)], 1) if turn < 2 else torch.cat([ids[:, :1], prompt(5)], 1)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            answer = tuned.generate(**inputs, **GREEDY)
            assert torch.equal(answer, whole.generate(**inputs, **GREEDY))
            virtual = 0 if method.startswith("prefix") else 3
            assert session.length == answer.shape[1] - 1 + virtual
            ids = answer
    assert swarm.eventually_settled()


@pytest.mark.parametrize(
    ("family", "device"), [("gemma3", "cpu"), ("gpt2", "cpu"), ("phi3-longrope", "cpu"), ("llama", "cpu,cpu")]
)
def test_a_prefix_stands_before_a_session_whatever_its_layers_see(family: str, device: str, tmp_path: Path) -> None:
    local = save_checkpoint(FAMILIES[family], tmp_path / "model")
    spans = [(0, 1), (1, NUM_BLOCKS)] if device == "cpu" else [(0, NUM_BLOCKS)]
    with MemorySwarm(tmp_path / "model", spans, cache=tmp_path / "cache", device=device) as swarm:
        whole, tuned = (prompted(base, "prefix tuning").eval() for base in (copy.deepcopy(local), swarm.model()))
        long = prompt(100) if family == "gemma3" else prompt(20)  # more than its window and what can be gone back
        with tuned.get_base_model().session():
            for ids in (long, long[:, :10], long):
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                assert torch.equal(tuned.generate(**inputs, **GREEDY), whole.generate(**inputs, **GREEDY))


def test_a_prefix_survives_its_peers(local: Any, doubled: MemorySwarm) -> None:
    bases = copy.deepcopy(local), doubled.model(prefix_secret=bytes(16))
    whole, tuned = (prompted(base, "prefix tuning").eval() for base in bases)
    ids, remote = prompt(2 * PREFIX_POSITIONS + 5), remote_of(tuned)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    leaving: list[Any] = []
    acts = [
        AtToken(3, doubled.forget_sessions),
        AtToken(6, lambda: doubled.kill_peer(remote.route.hops[1].peer_id)),
        AtToken(9, lambda: leaving.append(doubled.drain_peer(remote.route.hops[0].peer_id))),
    ]
    expected = whole.generate(**inputs, **GREEDY)
    assert torch.equal(tuned.generate(**inputs, stopping_criteria=acts, **GREEDY), expected)
    leaving[0].result(timeout=60.0)
    assert torch.equal(tuned.generate(**inputs, **GREEDY), expected)
    assert remote.traffic.prefix_positions == 0, "what follows a prefix is kept for nobody"


def test_attention_that_is_a_models_own_generates_behind_no_prefix(tmp_path: Path) -> None:
    save_checkpoint(FAMILIES["bloom"], tmp_path / "model")
    with MemorySwarm(tmp_path / "model", [(0, NUM_BLOCKS)], cache=tmp_path / "cache") as swarm:
        tuned = prompted(swarm.model(), "prefix tuning").eval()
        with pytest.raises(ProtocolError, match="whose attention is their own"):
            tuned.generate(input_ids=prompt(5), attention_mask=torch.ones(1, 5), **GREEDY)


def saved(base: Any, folder: Path, seed: int) -> tuple[Any, AdapterFolder]:
    """The local model with an adapter, and that adapter as a peer reads it."""
    whole = adapted(copy.deepcopy(base), seed)
    whole.save_pretrained(folder)
    return whole, open_adapter(str(folder))


def test_an_adapter_that_peers_host_is_used_by_its_name(local: Any, folder: Path, tmp_path: Path) -> None:
    whole, pirate = saved(local, tmp_path / "pirate", 3)
    other, poet = saved(local, tmp_path / "poet", 4)
    ids = prompt()
    with MemorySwarm(folder, SPANS, cache=tmp_path) as swarm:
        plain = swarm.model()
        hosts = [swarm.add_peer(*span, pirate=pirate, poet=poet) for span in SPANS]
        names = {peer.links.transport.peer_id for peer in hosts}
        for model, expected in (
            (swarm.model(guest=True, adapter="pirate"), whole),
            (swarm.model(guest=True, adapter=f"poet@{poet.digest.hex()[:8]}"), other),
            (plain, local),
        ):
            assert torch.equal(model.generate(ids, **GREEDY), expected.generate(input_ids=ids, **GREEDY))
            assert expected is local or {hop.peer_id for hop in model.route.hops} == names
        mine = adapted(swarm.model(guest=True, adapter="pirate"))
        with pytest.raises(CallerError, match="at the same time"):
            mine.generate(input_ids=ids, **GREEDY)
        embeds = plain.get_input_embeddings()(ids).requires_grad_()
        with pytest.raises(UnsupportedGradient, match="adapter pirate, which they host"):
            mine.get_base_model()(inputs_embeds=embeds)
        with pytest.raises(NoRoute, match="no peer hosts adapter pilot"):
            swarm.model(guest=True, adapter="pilot").generate(ids, **GREEDY)
        swarm.drain_peer(hosts[1].links.transport.peer_id).result(timeout=60.0)
        refusal = f"with adapter pirate@{pirate.digest.hex()[:12]}: blocks 1:3 are missing"
        with impatient(), pytest.raises(NoRoute, match=refusal):
            swarm.model(guest=True, adapter="pirate").generate(ids, **GREEDY)
        swarm.add_peer(1, 3, pirate=poet)  # whoever likes may use a name
        with pytest.raises(CallerError, match="2 different adapters called pirate"):
            swarm.model(guest=True, adapter="pirate").generate(ids, **GREEDY)
