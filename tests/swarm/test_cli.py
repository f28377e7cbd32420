from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

import peers.host
from peers.errors import InsecureIdentity, MissingExtra
from peers.host.config import PeerConfig
from peers.host.events import Event
from peers.model.progress import Progress
from routing.errors import CallerError, NoRoute
from routing.health import models
from routing.identity import SigningKey
from routing.ids import BlockSpan, BlockSpans, ModelId
from routing.invites import Invite, parse
from routing.records import Announcement, HostedAdapter, PeerState
from routing.router import Router
from routing.routes import RouteRequest
from swarm import extras
from swarm.cli import dashboard, gateway, node, output, route, signals, simulate, status, top
from swarm.cli import status as status_view
from swarm.cli.app import app, spread
from swarm.cli.options import bytes_of
from swarm.errors import UnusableFile
from swarm.health import View, is_named
from swarm.simulation.world import SimulationConfig
from swarm.web.server import is_exposed

ADDRESS = "/ip4/127.0.0.1/tcp/4001/p2p/" + SigningKey.from_seed(bytes(32)).peer_id
INVITE = Invite(network="hive", bootstraps=(ADDRESS,)).to_link()
COMMANDS = ("bootstrap", "join", "generate", "chat", "gateway", "status", "dashboard", "top", "demo")


def swarm(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "swarm", *arguments]
    return subprocess.run(command, input="", capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run a command in this process, which keeps its own logging."""
    monkeypatch.setattr(output, "configure_logging", lambda verbose: None)
    return lambda *arguments: CliRunner().invoke(app, arguments, prog_name="swarm")


# --- help and options ---


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str, run: Callable[..., Result]) -> None:
    done = run(command, "--help")
    assert done.exit_code == 0
    assert f"Example:  swarm {command}" in done.stdout


def test_help_and_argument_errors_come_without_loading_torch() -> None:
    probe = "import sys, swarm.cli.app, swarm.network\nprint({'torch', 'transformers', 'hivemind'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("join",),
        ("join", "m", "--new-swarm", "--no-such-option"),
        ("join", "m", "--new-swarm", "--dtype", "float8"),
        ("join", "m", "--new-swarm", "--blocks", "0:1", "--num-blocks", "1"),
        ("join", "m", "--new-swarm", "--max-memory", "lots"),
        ("join", "m", "--new-swarm", "--max-bandwidth", "fast"),
        ("join", "m", "--new-swarm", "--nice", "20"),
        ("join", "m", "--new-swarm", "--threads", "1000000000000"),
        ("join", "m", "--new-swarm", "--initial-peers", ADDRESS),
        ("generate", "m", "--top-p", "2"),
        ("generate", "m", "--temperature", "inf"),
        ("generate", "m", "--seed", str(10**30)),
        ("gateway", "m", "--rate-limit", "inf"),
        ("simulate", "--minutes", "inf"),
        ("gateway",),
        ("gateway", "m", "--port", "70000"),
        ("dashboard", "--port", "70000"),
    ],
)
def test_a_mistyped_command_is_a_usage_error(arguments: tuple[str, ...], run: Callable[..., Result]) -> None:
    done = run(*arguments)
    assert done.exit_code == 2
    assert "Usage: swarm" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (("join", "m"), "no way into a network was given", "--new-swarm"),
        (("generate", "m", "-p", "hi"), "no way into a network was given", "--invite"),
        (("status", "--initial-peers", "127.0.0.1:4001"), "is not an address of this network", "/ip4/"),
        (("status", "--initial-peers", "/ip4/1.2.3.4/tcp/1"), "does not end in /p2p/", "/ip4/"),
        (("chat", "m", "--invite", "swarm://AAAA"), "the invite is damaged", "copy the whole link"),
        (("chat", "m", "--invite", "https://example.org"), "is not an invite", "swarm://"),
        (("join", "m", "--initial-peers", ADDRESS, "--invite", "swarm://AAAA"), "both an invite and", "already"),
        (("join", "m", "--new-swarm", "--blocks", "9:3"), "blocks 9:3 are not a range", "A:B"),
        (("join", "m", "--new-swarm", "--listen", "everywhere"), "is not an address of this network", "/ip4/"),
        (("join", "m", "--new-swarm", "--network", "My Network"), "is not a network name", "lower-case"),
        (("join", "m", "--new-swarm", "--schedule", "at night"), "'at night' is no time of day", "22:00-08:00"),
        (("bootstrap", "--network", "My Network"), "is not a network name", "lower-case"),
        (("generate", "m", "--initial-peers", ADDRESS, "--network", "A"), "is not a network name", "lower-case"),
        (("generate", "m", "--initial-peers", ADDRESS), "the prompt is empty", "--prompt"),
        (("generate", "m", "--initial-peers", ADDRESS, "-p", "\udcff"), "the prompt is no text in UTF-8", "iconv"),
        (("status", "--invite", INVITE, "--network", "other"), "the invite is to network 'hive'", "leave out"),
    ],
)
def test_an_error_is_one_line_and_a_hint(
    arguments: tuple[str, ...], error: str, hint: str, run: Callable[..., Result]
) -> None:
    done = run(*arguments)
    assert done.exit_code == 1
    assert done.stdout == ""
    first, second = done.stderr.splitlines()
    assert first.startswith("error: ")
    assert error in first
    assert second.startswith("hint: ")
    assert hint in second


def test_a_process_says_so_too_and_shows_no_traceback() -> None:
    done = swarm("status", "--invite", "swarm://AAAA")
    expected = "error: the invite is damaged: its checksum does not match\nhint: copy the whole link\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


def test_debug_shows_the_traceback() -> None:
    done = swarm("join", "m", "--new-swarm", "--blocks", "9:3", "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "InvalidSpan: blocks 9:3 are not a range" in done.stderr


@pytest.mark.parametrize(
    ("typed", "parsed"),
    [
        ("join m --initial-peers /ip4/a /dns/b --json", "join m --initial-peers /ip4/a --initial-peers /dns/b --json"),
        ("join --initial-peers /ip4/a /ip6/b model", "join --initial-peers /ip4/a --initial-peers /ip6/b model"),
        ("join --initial-peers /ip4/a model /ip4/b", "join --initial-peers /ip4/a model /ip4/b"),
        ("join --listen /ip4/a --announce /ip4/b /ip4/c", "join --listen /ip4/a --announce /ip4/b --announce /ip4/c"),
        ("join --initial-peers /ip4/a --name /ip4/b", "join --initial-peers /ip4/a --name /ip4/b"),
        ("join --listen=/ip4/a /ip4/b m", "join --listen=/ip4/a --listen /ip4/b m"),
        ("join /ip4/model --initial-peers /ip4/a", "join /ip4/model --initial-peers /ip4/a"),
    ],
)
def test_several_addresses_may_follow_one_option(typed: str, parsed: str) -> None:
    assert spread(typed.split()) == parsed.split()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4GB", 4 * 10**9), ("512MiB", 512 << 20), ("6g", 6 * 10**9), ("1000", 1000), ("1.5 GB", 1_500_000_000)],
)
def test_memory_is_read_with_its_unit(text: str, expected: int) -> None:
    assert bytes_of(text, "--max-memory") == expected


def test_a_bandwidth_may_be_written_per_second(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Result]) -> None:
    configs: list[PeerConfig] = []
    monkeypatch.setattr(node, "join", lambda config, as_json: configs.append(config))
    monkeypatch.setattr(node, "claim_identity", lambda path, role: Path("unused.key"))
    wishes = ("--nice", "5", "--schedule", "22:00-08:00,12:00-13:00", "--pause-on-load", "40")
    for text in ("2MB/s", "2MB", "2000000"):
        assert run("join", "m", "--new-swarm", "--max-bandwidth", text, *wishes).exit_code == 0
    for config in configs:
        assert (config.max_bytes_per_s, config.nice, config.pause_on_load_percent) == (2_000_000, 5, 40.0)
        assert str(config.schedule) == "22:00-08:00,12:00-13:00"


def test_several_spans_and_shared_prefixes_reach_the_peer(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., Result]
) -> None:
    configs: list[PeerConfig] = []
    monkeypatch.setattr(node, "join", lambda config, as_json: configs.append(config))
    monkeypatch.setattr(node, "claim_identity", lambda path, role: Path("unused.key"))
    for arguments in (("--blocks", "8:12,0:4"), ("--share-prefixes",)):
        assert run("join", "m", "--new-swarm", *arguments).exit_code == 0
    assert [(str(config.blocks), config.share_prefixes) for config in configs] == [
        ("0:4,8:12", "owner"),
        ("None", "network"),
    ]


def test_adapters_reach_the_peer_and_the_gateway_by_name(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., Result]
) -> None:
    configs: list[Any] = []
    monkeypatch.setattr(node, "join", lambda config, as_json: configs.append(config))
    monkeypatch.setattr(gateway, "run", lambda config, as_json: configs.append(config))
    monkeypatch.setattr(node, "claim_identity", lambda path, role: Path("unused.key"))
    both = ("--adapter", "poet=some/folder", "--adapter", "pirate=org/hub-id")
    assert run("join", "m", "--new-swarm", *both).exit_code == 0
    assert run("gateway", "m", "--initial-peers", ADDRESS, "--adapter", "poet").exit_code == 0
    assert [config.adapters for config in configs] == [
        (("poet", "some/folder"), ("pirate", "org/hub-id")),
        ("poet",),
    ]
    for wrong in ("poet", "=folder", "poet="):
        assert run("join", "m", "--new-swarm", "--adapter", wrong).exit_code == 2
    for wrong in (("two words=a",), ("poet=a", "poet=b")):
        assert run("join", "m", "--new-swarm", *(part for each in wrong for part in ("--adapter", each))).exit_code == 1
    assert len(configs) == 2


def test_what_serves_http_listens_here_only_and_lets_nobody_else_in_unless_asked(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., Result], tmp_path: Path
) -> None:
    configs: list[Any] = []
    for view in (gateway, dashboard):
        monkeypatch.setattr(view, "run", lambda config, as_json: configs.append(config))
    entry, history = ("--initial-peers", ADDRESS), ("--history", str(tmp_path / "history"))
    for arguments in (("gateway", "m", *entry), ("dashboard", *entry, *history)):
        for asked in ((), ("--host", "0.0.0.0")):
            assert run(*arguments, *asked).exit_code == 0
    assert [config.host for config in configs] == ["127.0.0.1", "0.0.0.0"] * 2
    assert [is_exposed(config.host) for config in configs] == [False, True] * 2
    assert (configs[0].cors_origins, configs[0].accounts, configs[0].port) == ((), (), 8000)


@pytest.mark.parametrize("arguments", [("status",), ("top", "--once"), ("route", "m"), ("dashboard",)])
def test_who_waits_for_a_network_sees_at_once_that_it_is_looked_for(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, run: Callable[..., Result], tmp_path: Path
) -> None:
    """And programs see results only."""
    for view in (status, top, route, dashboard):
        monkeypatch.setattr(view, "run" if view is dashboard else arguments[0], lambda *_, **__: None, raising=False)
    entry = ("--initial-peers", ADDRESS, *(("--history", str(tmp_path / "h")) if arguments == ("dashboard",) else ()))
    done = run(*arguments, *entry)
    assert (done.exit_code, done.stdout) == (0, "")
    assert "network 'hive'" in done.stderr
    if arguments[0] != "top":
        assert run(*arguments, *entry, "--json").stderr == ""


SHORT = SimulationConfig(peers=10, users=2, clients=1, blocks=4, minutes=0.2)


@pytest.mark.parametrize(("name", "magic"), [("curves.png", b"\x89PNG\r\n"), ("curves.HTML", b"<!doctype html>")])
def test_a_simulation_is_drawn_as_its_files_name_says(name: str, magic: bytes, tmp_path: Path) -> None:
    simulate.simulate(SHORT, plot=tmp_path / name, as_json=True)
    assert (tmp_path / name).read_bytes().startswith(magic)


def test_a_plot_that_cannot_be_drawn_is_refused_before_anything_is_simulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulate, "run", None)
    with pytest.raises(CallerError, match="neither a picture nor a page"):
        simulate.simulate(SHORT, plot=tmp_path / "curves.pdf", as_json=True)
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(MissingExtra, match="matplotlib is not installed"):
        simulate.simulate(SHORT, plot=tmp_path / "curves.png", as_json=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "B", "GB", "-1GB", "0", "nan", "inf", "1PB", "12 apples"])
def test_what_is_no_amount_of_memory_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        bytes_of(text, "--max-memory")


@pytest.mark.parametrize("option", ["--max-memory", "--max-bandwidth", "--journal-disk"])
def test_a_size_that_cannot_be_read_is_told_with_its_option(option: str, run: Callable[..., Result]) -> None:
    done = run("join", "m", "--new-swarm", option, "lots", "--listen", "/ip4/127.0.0.1/tcp/0")
    assert done.exit_code == 2
    assert f"'{option}': 'lots' is no size" in " ".join(done.stderr.split())


# --- errors, events, bars ---


def test_an_error_that_a_task_group_wrapped_is_found() -> None:
    error = NoRoute("blocks 3:4 are missing")
    assert output.error_in(ExceptionGroup("serve", [ExceptionGroup("inner", [error])])) is error
    assert output.error_in(ExceptionGroup("serve", [error, ValueError("a defect")])) is None


def test_a_file_that_cannot_be_used_is_an_error_in_words_and_any_other_failure_a_defect(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    assert str(output.error_in(ExceptionGroup("serve", [full]))) == "No space left on device"
    with pytest.raises(OSError, match="Is a directory") as caught:
        tmp_path.read_bytes()
    known = output.error_in(caught.value)
    assert isinstance(known, UnusableFile)
    assert (str(known), "HIVESWARM_CACHE" in known.hint) == (f"{tmp_path}: Is a directory", True)
    assert output.error_in(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")) is None


def test_a_file_that_cannot_be_used_is_said_in_two_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "configure_logging", lambda verbose: None)
    with pytest.raises(typer.Exit) as caught, output.command(verbose=0, debug=False):
        tmp_path.read_bytes()
    assert caught.value.exit_code == 1
    assert re.fullmatch(f"error: {tmp_path}: Is a directory\nhint: .*\n", capsys.readouterr().err)


def test_a_closed_reader_ends_a_command_quietly() -> None:
    program = "from swarm.cli.output import command; import sys, typer\n"
    program += "with command(verbose=0, debug=False):\n  while True: sys.stdout.write('x' * 9999)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert "BrokenPipe" not in errors


def test_every_event_of_a_node_has_words() -> None:
    modules = "".join(module.read_text() for folder in peers.host.__path__ for module in Path(folder).glob("*.py"))
    kinds = set(re.findall(r'Event\(\s*"(\w+)"', modules))
    examples = {
        "connected": {"peer_id": "12D3KooA"},
        "loading": {"model": "m", "spans": [[0, 10]], "dtype": "float32", "quantization": "none"},
        "ready": {
            "addresses": [ADDRESS],
            "invite": "swarm://x",
            "model": "m",
            "spans": [[0, 4], [8, 12]],
            "device": "cpu",
            "cache_tokens": 4096,
            "decode_ms_per_block": 1.25,
            "prefill_ms_per_block": 0.125,
            "token_budget": 256,
            "forward_mib": 20,
            "probed": "now",
            "probe_disturbed": True,
        },
        "metrics": {"url": "http://127.0.0.1:9100/metrics"},
        "reachable": {"addresses": [ADDRESS]},
        "unreachable": {"problems": {ADDRESS: "no answer"}, "hint": "forward the port"},
        "reachability_unknown": {"reason": "nobody answers", "hint": "wait"},
        "unannounced": {"reason": "clock skew", "hint": "set the clock"},
        "announced": {},
        "clock_wrong": {"skew_s": -300.0, "hint": "set the clock"},
        "clock_right": {},
        "paused": {"reason": "schedule", "schedule": "22:00-08:00", "resumes_at": "22:00"},
        "gave_back": {"mib": 12345},
        "not_loaded": {"reason": "no room", "hint": "close something", "again_s": 30.0},
        "resumed": {},
        "moving": {"spans": [[4, 8]], "heals": True},
        "moved": {"spans": [[4, 8]]},
        "draining": {},
        "stopped": {},
    }
    assert kinds == set(examples)
    words = {kind: node.describe(Event(kind, dict(fields))) for kind, fields in examples.items()}
    assert "blocks 0:4,8:12 of m" in words["ready"]
    assert "swarm://x" in words["ready"]
    assert "up to 256 tokens a forward, 20 MiB (measured now" in words["ready"]
    unknown = node.describe(Event("ready", examples["ready"] | {"forward_mib": 0}))
    assert "up to 256 tokens a forward (measured now" in unknown
    assert "no answer" in words["unreachable"]
    assert "forward the port" in words["unreachable"]
    assert "nobody answers" in words["reachability_unknown"]
    assert "clock skew" in words["unannounced"]
    assert "300 s behind" in words["clock_wrong"]
    assert words["moving"] == "moving to blocks 4:8, where blocks are missing"
    assert words["moved"] == "serving blocks 4:8"
    assert "outside 22:00-08:00; back at 22:00" in words["paused"]
    assert "gave 12,345 MiB" in words["gave_back"]
    assert "no room" in words["not_loaded"]
    assert "close something; this peer tries again every 30 s" in words["not_loaded"]
    load = {"reason": "load", "load_percent": 83, "of": "a GPU", "limit_percent": 50.0, "resume_percent": 37.5}
    assert "use 83 % of a GPU, the limit is 50 %" in node.describe(Event("paused", dict(load)))


def test_json_events_are_one_object_per_line(capsys: pytest.CaptureFixture[str]) -> None:
    write = output.event_writer(as_json=True, describe=node.describe)
    write(Event("ready", {"span": [0, 10]}))
    write(Event("stopped"))
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"event": "ready", "span": [0, 10]},
        {"event": "stopped"},
    ]


def test_bars_are_drawn_on_a_terminal_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    with output.Bars() as bars:
        progress: Progress = bars
        progress.start("downloading", 100)
        progress.advance(40)
        progress.start("converting", 50)  # the first one ended without saying so
        progress.done()
    assert "downloading" in terminal.getvalue()
    assert terminal.getvalue().count("\x1b[?25h") == terminal.getvalue().count("\x1b[?25l") > 0  # the cursor is back


# --- identities ---


@pytest.fixture
def locks() -> Iterator[None]:
    yield
    while node._locks:
        os.close(node._locks.pop())


@pytest.mark.usefixtures("locks")
def test_nodes_of_one_user_get_identities_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    names = [node.claim_identity(None, role).name for role in ("peer", "peer", "bootstrap", "peer")]
    assert names == ["peer.key", "peer-2.key", "bootstrap.key", "peer-3.key"]


@pytest.mark.usefixtures("locks")
def test_an_identity_in_use_is_refused(tmp_path: Path) -> None:
    node.claim_identity(tmp_path / "mine.key", "peer")
    with pytest.raises(InsecureIdentity, match="in use"):
        node.claim_identity(tmp_path / "mine.key", "peer")


def test_an_identity_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InsecureIdentity, match="cannot be used"):
        node.claim_identity(tmp_path / "file" / "mine.key", "peer")
    with pytest.raises(InsecureIdentity, match="is no file"):
        node.claim_identity(Path(), "peer")


def test_a_ready_node_gives_an_invite_to_itself() -> None:
    invite = parse(node._invite("hive", {"addresses": [ADDRESS]}))
    assert (invite.network, invite.bootstraps) == ("hive", (ADDRESS,))


# --- signals ---

NODE = """
import asyncio, sys
from swarm.cli import output, signals
signals.end_at_once()
{parent}
with output.command(verbose=0, debug=False):
    stop = asyncio.Event()
    ready = False
    async def main():
        global ready
        print("starting", flush=True)
        if {starts}:
            ready = True
            print("ready", flush=True)
            await stop.wait()
            print("draining", flush=True)
            if {hangs}:
                await asyncio.sleep(600)
        else:
            await asyncio.to_thread(lambda: __import__("time").sleep(600))
    def ask():
        stop.set()
        return ready
    signals.run(main(), stop=ask)
print("stopped", flush=True)
"""


def start(program: str, until: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    while (line := process.stdout.readline()).strip() != until:
        assert line, "it ended early"
    return process


def end(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_drains(number: signal.Signals) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("under nohup a terminal that hangs up ends nobody, nor a swarm's node")
    process = start(NODE.format(parent="", starts=True, hangs=False), until="ready")
    process.send_signal(number)
    assert end(process) == (0, "draining\nstopped\n", "")


def test_the_second_signal_ends_at_once() -> None:
    process = start(NODE.format(parent="", starts=True, hangs=True), until="ready")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "draining\n"
    process.send_signal(signal.SIGINT)
    assert end(process) == (130, "", "")


def test_a_signal_during_the_start_does_not_wait_for_threads() -> None:
    process = start(NODE.format(parent="", starts=False, hangs=False), until="starting")
    process.send_signal(signal.SIGINT)
    assert end(process) == (130, "", "")


def test_ctrl_c_stops_what_can_be_stopped_and_nothing_after_it() -> None:
    with signals.interruptible():
        for _ in range(2):
            with pytest.raises(signals.Interrupted), signals.stoppable():
                signal.raise_signal(signal.SIGINT)
            with signals.stoppable():
                pass
            signal.raise_signal(signal.SIGINT)  # it came as the answer had ended: the conversation goes on


def test_the_end_of_the_parent_is_a_signal() -> None:
    process = start(NODE.format(parent="signals.end_with_parent()", starts=True, hangs=False), until="ready")
    assert process.stdin is not None
    process.stdin.close()
    process.stdin = None
    assert end(process) == (0, "draining\nstopped\n", "")


def test_an_interrupted_command_unwinds_and_says_nothing() -> None:
    program = "from swarm.cli import output, signals; import time\n"
    program += "with output.command(verbose=0, debug=False), signals.interruptible():\n"
    program += "  try:\n    print('working', flush=True); time.sleep(600)\n  finally:\n    print('freed', flush=True)"
    process = start(program, until="working")
    process.send_signal(signal.SIGINT)
    assert end(process) == (130, "freed\n", "")


def test_ctrl_c_during_imports_leaves_no_traceback() -> None:
    program = "from swarm.cli import signals; signals.end_at_once()\n"
    program += "print('importing', flush=True); import time; time.sleep(600)"
    process = start(program, until="importing")
    process.send_signal(signal.SIGINT)
    assert end(process) == (130, "", "")


# --- status ---


def announcement(seed: int, span: BlockSpan, **changes: object) -> Announcement:
    peer_id = SigningKey.from_seed(bytes([seed]) * 32).peer_id
    fields: dict[str, object] = {
        "peer_id": peer_id,
        "model": ModelId(bytes([7]) * 32),
        "model_name": "tiny",
        "num_blocks": 6,
        "spans": BlockSpans.of(span),
        "state": PeerState.ONLINE,
        "dtype": "float32",
        "version": "0.1.0",
        "protocol": 1,
        "addresses": (f"/ip4/192.0.2.1/tcp/4001/p2p/{peer_id}",),
        "decode_s_per_block": 0.001,
        "prefill_s_per_token_block": 0.0001,
        "cache_tokens": 1024,
        "free_tokens": 512,
        "sequence": 1,
        "expires_at_s": 120.0,
    }
    return Announcement(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def view() -> View:
    router = Router()
    alice = announcement(1, BlockSpan(0, 2), name="alice", uplink_bytes_per_s=2**20)
    bob = announcement(2, BlockSpan(1, 4), state=PeerState.DRAINING)
    carol = announcement(3, BlockSpan(4, 6), adapters=(HostedAdapter("poet", bytes(16)),))
    dora = announcement(4, BlockSpan(1, 4), state=PeerState.PAUSED)
    router.on_announcements([alice, bob, carol, dora], 100.0)
    return View(network="hive", models=models(router.snapshot(100.0)), rtt_s={alice.peer_id: 0.0125})


def test_status_names_holders_and_gaps(view: View) -> None:
    plain = json.loads(json.dumps(status_view.as_plain(view)))
    (model,) = plain["models"]
    assert model["gaps"] == [[2, 4]]
    assert not model["healthy"]
    assert [len(holders) for holders in model["blocks"]] == [1, 1, 0, 0, 1, 1]
    peers = {peer["peer_id"]: peer for peer in model["peers"]}
    alice, bob, dora = (peers[SigningKey.from_seed(bytes([seed]) * 32).peer_id] for seed in (1, 2, 4))
    assert dora["state"] == "paused"
    assert (alice["name"], alice["span"], alice["latency_ms"], alice["version"]) == ("alice", [0, 2], 12.5, "0.1.0")
    assert (bob["state"], bob["latency_ms"]) == ("draining", None)
    assert (alice["uplink_bytes_per_s"], bob["uplink_bytes_per_s"]) == (2**20, None)
    hosted = [adapter for peer in model["peers"] for adapter in peer["adapters"]]
    assert hosted == [{"name": "poet", "digest": "00" * 16}]


def test_status_is_a_table_for_people(view: View, capsys: pytest.CaptureFixture[str]) -> None:
    status_view.show(view)
    printed = capsys.readouterr().out
    for expected in (
        "nobody serves blocks 2:4",
        "2:4 ",
        "nobody",
        "alice (…",
        "12.5 ms",
        "no answer",
        "draining",
        "paused",
        "adapter poet@000000000000 · 1 peer · INCOMPLETE: nobody hosts it for blocks 0:4",
    ):
        assert expected in printed
    for peer in view.models[0].peers:
        assert peer.peer_id in printed


def test_a_route_is_explained_with_the_uplinks_that_peers_announce(capsys: pytest.CaptureFixture[str]) -> None:
    router = Router()
    said = [announcement(1, BlockSpan(0, 6), uplink_bytes_per_s=2**20), announcement(2, BlockSpan(0, 6))]
    router.on_announcements(said, 100.0)
    found = router.explain(RouteRequest(model=said[0].model, num_blocks=6, bytes_per_token=1000), 100.0)
    (options,) = route.as_plain(found, explain=True)["candidates"]
    assert [option["uplink_mbit_per_s"] for option in options] == [None, 8.4]
    route.show(found, explain=True)
    assert "100 assumed, 8.4 out" in capsys.readouterr().out


def test_a_route_is_explained_with_those_who_hold_a_part_of_a_hop(capsys: pytest.CaptureFixture[str]) -> None:
    router = Router()
    holders = [announcement(n, BlockSpan(0, 4), name=f"part-{n}") for n in range(2, 12)]
    said = [announcement(1, BlockSpan(0, 6)), *holders]
    router.on_announcements(said, 100.0)
    found = router.explain(RouteRequest(model=said[0].model, num_blocks=6, bytes_per_token=1000), 100.0)
    (parts,) = json.loads(json.dumps(route.as_plain(found, explain=True)))["parts"]
    assert len(parts) == 10
    assert all((part["covers"], part["spans"]) == ("0:4", "0:4") for part in parts)
    assert parts[0]["route_ms"] >= route.as_plain(found, explain=True)["cost_ms"]
    route.show(found, explain=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert "or some of them by part-" in printed
    assert printed.count(" [0:4] (") == route.MAX_OPTIONS
    assert ", and 2 more" in printed


def test_a_model_is_named_by_its_name_or_the_beginning_of_its_id(view: View) -> None:
    (health,) = view.models
    assert is_named(health, "tiny")
    assert is_named(health, "0707")
    assert not is_named(health, "07")
    assert not is_named(health, "tin")
