"""Tenants on real processes: who is let in, and that nobody sees, stops or outgrows anybody else."""

from __future__ import annotations

import hashlib
import json
import subprocess
from typing import TYPE_CHECKING

import pytest
from processes import QUIRE, Quire, assert_pool_is_idle, running_quire
from scraping import scrape

from protos.router.v1 import router_pb2 as pb
from quire import demo_model
from quire.client import Client, PoolController, PoolInspector
from quire.errors import QuotaExceeded, RequestIdInUse, RequestNotFound, Unauthenticated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FLAGS = ("--memory-budget", "4MiB", "--max-model-len", "1024")
GATEWAY_KEY = "x-quire-tenant"
TOKENS = {"alice": "alices-own-secret", "bob": "bobs-own-secret"}
GUESS = "a-guess"
PROMPT = list(range(300, 348))  # three blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tenants")


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[Quire]:
    """Services that two tenants share, told apart by their tokens."""
    file = folder / "tenants.yaml"
    digests = {name: [hashlib.sha256(found.encode()).hexdigest()] for name, found in TOKENS.items()}
    file.write_text(json.dumps(digests))
    flags = (*FLAGS, "--tenants", str(file), "--log-format", "json", "--log-level", "debug")
    with running_quire(demo_model.path(), *flags, log=folder / "log") as found:
        yield found


def client_of(quire: Quire, tenant: str) -> Client:
    return Client(quire.addresses["router"], token=TOKENS[tenant])


def num_cached(client: Client, prompt: list[int]) -> int:
    answer = client.complete(prompt, max_tokens=1)
    return answer.completions[0].finished.usage.num_cached_tokens


CALLS: dict[str, Callable[[Client], object]] = {
    "Generate": lambda client: list(client.generate(PROMPT, max_tokens=1)),
    "Complete": lambda client: client.complete(PROMPT, max_tokens=1),
    "Abort": lambda client: client.abort("nobody"),
    "Tokenize": lambda client: client.tokenize("import os"),
    "Detokenize": lambda client: client.detokenize([300]),
    "GetModel": lambda client: client.get_model(),
}


@pytest.mark.parametrize("method", sorted(CALLS))
def test_every_call_brings_one_known_token(shared: Quire, method: str) -> None:
    """Without one, with a wrong one, with two: UNAUTHENTICATED, whatever is asked; with a known one it is answered."""
    address = shared.addresses["router"]
    doubled = (("authorization", f"Bearer {TOKENS['alice']}"),)
    clients = [
        Client(address),
        Client(address, token=GUESS),
        Client(address, token=TOKENS["alice"], metadata=doubled),
        Client(address, metadata=((GATEWAY_KEY, "alice"), ("quire-tenant", "alice"))),
    ]
    for client in clients:
        with client, pytest.raises(Unauthenticated) as caught:
            CALLS[method](client)
        assert caught.value.code == "UNAUTHENTICATED"
    with client_of(shared, "alice") as client:
        if method == "Abort":
            with pytest.raises(RequestNotFound):
                CALLS[method](client)
        else:
            assert CALLS[method](client) is not None


def test_the_command_line_brings_the_token(shared: Quire, monkeypatch: pytest.MonkeyPatch) -> None:
    """`quire generate` takes it from QUIRE_TOKEN; without it the refusal is one line."""
    command = [
        QUIRE,
        "generate",
        "--router-address",
        shared.addresses["router"],
        "--max-tokens",
        "3",
    ]

    def generate() -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, "import"], capture_output=True, text=True, check=False)

    refused = generate()
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "authorization: Bearer TOKEN" in refused.stderr
    monkeypatch.setenv("QUIRE_TOKEN", TOKENS["alice"])
    answered = generate()
    assert (answered.returncode, answered.stderr) == (0, "")
    assert answered.stdout.strip()


def test_nobody_sees_or_stops_anothers_request(shared: Quire) -> None:
    """Both may use one id at once; what a tenant aborts is its own, and another's is as unknown as one that never was."""
    options = {"max_tokens": 900, "ignore_eos": True, "request_id": "same"}
    with client_of(shared, "alice") as alice, client_of(shared, "bob") as bob:
        of_alice = alice.generate(PROMPT, **options)  # type: ignore[arg-type]
        next(of_alice)
        with pytest.raises(RequestNotFound) as unknown:
            bob.abort("nobody")
        with pytest.raises(RequestNotFound) as hers:
            bob.abort("same")
        assert hers.value.message == unknown.value.message.replace("nobody", "same")
        of_bob = bob.generate(PROMPT, **options)  # type: ignore[arg-type]
        next(of_bob)
        with pytest.raises(RequestIdInUse):
            bob.complete(PROMPT, request_id="same", max_tokens=1)
        bob.abort("same")
        list(of_bob)
        assert of_bob.finished[0].finish_reason == pb.FINISH_REASON_CANCELLED
        next(of_alice)
        assert not of_alice.finished
        alice.abort("same")
        list(of_alice)
    assert_pool_is_idle(shared)


def test_memory_knows_whose_a_sequence_is(shared: Quire) -> None:
    """Two tenants' requests of one id are two sequences, each listed with its tenant and an id of its own."""
    options = {"max_tokens": 900, "ignore_eos": True, "request_id": "seen"}
    with (
        client_of(shared, "alice") as alice,
        client_of(shared, "bob") as bob,
        PoolInspector(shared.addresses["memory"]) as inspector,
        alice.generate(PROMPT, **options) as of_alice,  # type: ignore[arg-type]
        bob.generate(PROMPT, **options) as of_bob,  # type: ignore[arg-type]
    ):
        next(of_alice)
        next(of_bob)
        found = {
            (seen.tenant, seen.request_id, seen.sequence_id) for seen in inspector.list_sequences()
        }
        assert found == {("alice", "seen", "seen/0@alice"), ("bob", "seen", "seen/0@bob")}
    assert_pool_is_idle(shared)


def test_a_prefix_is_its_tenants_own(shared: Quire) -> None:
    """What one tenant computed hits for itself and for nobody else."""
    prompt = list(range(400, 440))
    with client_of(shared, "alice") as alice, client_of(shared, "bob") as bob:
        assert num_cached(alice, prompt) == 0
        assert num_cached(bob, prompt) == 0
        assert num_cached(alice, prompt) >= 32


def test_a_quota_ends_only_its_own_tenants_request(shared: Quire) -> None:
    """More than bob's hard quota is RESOURCE_EXHAUSTED for bob, at admission or later; alice is served the same."""
    with (
        client_of(shared, "alice") as alice,
        client_of(shared, "bob") as bob,
        PoolController(shared.addresses["memory"]) as controller,
    ):
        controller.set_quota("bob", soft_blocks=None, hard_blocks=4)
        try:
            for prompt, max_tokens in ((list(range(500, 600)), 1), ([700], 200)):
                with pytest.raises(QuotaExceeded) as caught:
                    bob.complete(prompt, max_tokens=max_tokens, ignore_eos=True)
                assert caught.value.code == "RESOURCE_EXHAUSTED"
                assert caught.value.metadata == {"tenant": "bob"}
                answer = alice.complete(prompt, max_tokens=max_tokens, ignore_eos=True)
                assert len(answer.completions[0].token_ids) == max_tokens
            assert len(bob.complete([700], max_tokens=20, ignore_eos=True).completions) == 1
        finally:
            controller.set_quota("bob", soft_blocks=None, hard_blocks=None)
    assert_pool_is_idle(shared)


def test_the_log_names_tenants_and_no_token(shared: Quire, folder: Path) -> None:
    """Each record of a request says whose it is; what a caller proved it with is nowhere, known or not."""
    with client_of(shared, "bob") as bob:
        bob.complete(PROMPT, request_id="logged", max_tokens=1)
    with (
        Client(shared.addresses["router"], token=GUESS) as nobody,
        pytest.raises(Unauthenticated),
    ):
        nobody.complete(PROMPT, request_id="unknown", max_tokens=1)
    text = (folder / "log").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    of_bob = [found for found in records if found.get("request_id") == "logged"]
    assert {found["event"] for found in of_bob} >= {"accepted", "finished"}
    assert {found["tenant"] for found in of_bob} == {"bob"}
    (rejected,) = [found for found in records if found.get("request_id") == "unknown"]
    assert (rejected["event"], rejected["reason"]) == ("rejected", "UNAUTHENTICATED")
    assert "tenant" not in rejected
    for secret in (*TOKENS.values(), GUESS):
        assert secret not in text
        assert hashlib.sha256(secret.encode()).hexdigest() not in text


def test_refused_calls_are_counted_without_names(shared: Quire) -> None:
    """Refusals are one number; no metric has a label for tenants, of whom there may be many."""
    address = shared.addresses["router_metrics"]
    before = scrape(address)["quire_requests_rejected_total/UNAUTHENTICATED"]
    with Client(shared.addresses["router"]) as nobody, pytest.raises(Unauthenticated):
        nobody.complete(PROMPT, max_tokens=1)
    after = scrape(address)
    assert after["quire_requests_rejected_total/UNAUTHENTICATED"] == before + 1
    assert not [key for key in after.values if any(name in key for name in TOKENS)]


def test_a_gateway_names_the_tenant() -> None:
    """Its metadata decides; a call without it belongs to the tenant of all who have none; two names are refused."""
    with running_quire(demo_model.path(), *FLAGS, "--tenant-metadata", GATEWAY_KEY) as quire:
        address = quire.addresses["router"]
        with (
            Client(address, metadata=((GATEWAY_KEY, "alice"),)) as alice,
            Client(address) as anybody,
            Client(address, metadata=((GATEWAY_KEY, "alice"), (GATEWAY_KEY, "bob"))) as both,
        ):
            assert num_cached(alice, PROMPT) == 0
            assert num_cached(anybody, PROMPT) == 0
            assert num_cached(anybody, PROMPT) >= 32
            assert num_cached(alice, PROMPT) >= 32
            with pytest.raises(Unauthenticated):
                both.complete(PROMPT, max_tokens=1)


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ("{}", ("--tenant-metadata", GATEWAY_KEY), "give only one of them"),
        ("alice: [her-token]", (), "alice 0: Value error, not a SHA-256 digest"),
        ("alice: [", (), "in line 1"),
    ],
)
def test_a_router_that_cannot_tell_tenants_apart_does_not_start(
    tmp_path: Path, text: str, flags: tuple[str, ...], expected: str
) -> None:
    """One line says what is wrong, before anything listens; what may be a token is not repeated."""
    file = tmp_path / "tenants.yaml"
    file.write_text(text)
    command = [QUIRE, "router", "--listen", f"unix:{tmp_path}/r", "--metrics-listen", "off"]
    ended = subprocess.run(
        [*command, "--tenants", str(file), *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert expected in ended.stderr
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert "her-token" not in ended.stderr
