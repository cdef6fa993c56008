"""`quire control`: how tenants share the pool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from quire.cli.memory import address_of, prompt_of, reporting_memory_errors, tokens_of
from quire.cli.output import cell_of, make_console, print_json, say
from quire.cli.subcommands import Subcommand, WrongUsage, run_subcommand
from quire.client import PoolController
from quire.inspection_settings import (
    ControlSettings,
    FlushSettings,
    PublishSettings,
    QuotaSettings,
    ReleaseSettings,
    RetainSettings,
    WithdrawSettings,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from google.protobuf.message import Message

    from quire import client

    Judged: TypeAlias = (
        client.RetainAnswer
        | client.ReleaseAnswer
        | client.FlushAnswer
        | client.PublishAnswer
        | client.WithdrawAnswer
    )

AnswerT = TypeVar("AnswerT", bound="Message")
JudgedT = TypeVar("JudgedT", bound="Judged")
_REJECTED = "rejected"


def control(argv: Sequence[str]) -> int:
    """Carry out one wish; the process's exit status, 1 when it was rejected."""
    about = "Change how tenants share the pool. Serving needs none of it, and none of it can wedge the pool."
    return run_subcommand("quire control", about, _SUBCOMMANDS, argv)


def _ask(
    settings: ControlSettings | QuotaSettings,
    wish: Callable[[PoolController], AnswerT],
    tell: Callable[[AnswerT], str],
    status: Callable[[AnswerT], int],
) -> int:
    with (
        reporting_memory_errors(settings) as outcome,
        PoolController(address_of(settings), timeout_s=settings.timeout_s) as controller,
    ):
        answer = wish(controller)
        if settings.output == "json":
            print_json([answer])
        else:
            say(make_console(), tell(answer))
        outcome.status = status(answer)
    return outcome.status


def _wish(
    settings: ControlSettings,
    wish: Callable[[PoolController], JudgedT],
    facts: Callable[[JudgedT], str] = lambda _: "",
) -> int:
    def tell(answer: JudgedT) -> str:
        """The verdict, why it is not better, and what holds now."""
        verdict = cell_of(answer, "verdict")
        told = "" if verdict == _REJECTED else facts(answer)
        return "; ".join(filter(None, [verdict, told, answer.reason]))

    return _ask(settings, wish, tell, lambda answer: int(cell_of(answer, "verdict") == _REJECTED))


def _quota(settings: QuotaSettings) -> int:
    is_given = settings.soft is not None or settings.hard is not None
    if is_given == settings.none:
        message = "give --soft, --hard or both; or --none, which takes both away"
        raise WrongUsage(message)
    return _ask(
        settings,
        lambda controller: controller.set_quota(
            settings.tenant, soft_blocks=settings.soft, hard_blocks=settings.hard
        ),
        _quota_in_words,
        lambda _: 0,
    )


def _quota_in_words(answer: client.QuotaAnswer) -> str:
    found = answer.tenant
    soft, hard = (
        cell_of(found, column).replace("-", "none")
        for column in ("soft_quota_blocks", "hard_quota_blocks")
    )
    name = found.tenant or "the tenant of all who have none"
    return f"{name}: soft quota {soft}, hard quota {hard}, holds {found.num_blocks} blocks"


def _retain(settings: RetainSettings) -> int:
    token_ids = tokens_of(settings)
    if (settings.sequence is None) == (token_ids is None):
        message = "name what is retained with --sequence, --text or --tokens, one of them"
        raise WrongUsage(message)
    return _wish(
        settings,
        lambda controller: controller.retain(
            sequence_id=settings.sequence,
            token_ids=token_ids,
            priority=settings.priority,
            time_to_live_s=settings.ttl_s,
            tenant=settings.tenant,
        ),
        _retention_in_words,
    )


def _retention_in_words(answer: client.RetainAnswer) -> str:
    is_bounded = answer.HasField("expire_time")
    ends = cell_of(answer, "expire_time") if is_bounded else "with its release"
    return f"retention {answer.retention_id} of {answer.num_blocks} blocks, ends {ends}"


def _release(settings: ReleaseSettings) -> int:
    return _wish(
        settings,
        lambda controller: controller.release(settings.retention_id, tenant=settings.tenant),
    )


def _flush(settings: FlushSettings) -> int:
    token_ids = tokens_of(settings)
    if (token_ids is not None) == settings.all:
        message = "say what is forgotten with --text or --tokens, or --all of the tenant"
        raise WrongUsage(message)
    return _wish(
        settings,
        lambda controller: controller.flush(token_ids or (), tenant=settings.tenant),
        lambda answer: (
            f"{answer.num_freed_blocks} blocks are free now, {answer.num_used_blocks} in use are forgotten"
        ),
    )


def _publish(settings: PublishSettings) -> int:
    token_ids = prompt_of(settings)
    return _wish(
        settings,
        lambda controller: controller.publish_prefix(token_ids, tenant=settings.tenant),
        lambda answer: f"prefix {answer.prefix_id} of {answer.num_tokens} tokens is shared",
    )


def _withdraw(settings: WithdrawSettings) -> int:
    return _wish(
        settings,
        lambda controller: controller.withdraw_prefix(settings.prefix_id, tenant=settings.tenant),
    )


_SUBCOMMANDS: dict[str, Subcommand[Any]] = {
    "quota": Subcommand(QuotaSettings, _quota, takes="[TENANT]"),
    "retain": Subcommand(RetainSettings, _retain),
    "release": Subcommand(ReleaseSettings, _release, takes="ID"),
    "flush": Subcommand(FlushSettings, _flush),
    "publish": Subcommand(PublishSettings, _publish),
    "withdraw": Subcommand(WithdrawSettings, _withdraw, takes="ID"),
}
