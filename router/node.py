"""A node: one memory service and one compute service, driven by this router."""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from quire.errors import QuireError
from quire.serving import StartupError
from router.chat_template import ChatTemplate
from router.clients import ComputeClient, MemoryClient
from router.intake import Intake, IntakeLimits
from router.ordered_stream import StreamLost
from router.scheduler import Scheduler, SchedulerLimits
from router.step_loop import StepLoop
from router.tally import Tally
from router.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from quire.settings import RouterSettings
    from router.clients import ServedModel, SessionTerms
    from router.request import Request

_CONNECT_WAIT_S = 0.1
_DRAIN_POLL_S = 0.02
_TELL_EVERY_S = 5.0

_logger = structlog.get_logger()


class _Waiting:
    """Says why there is no engine yet, now and then: an operator should not need a debugger for that."""

    def __init__(self) -> None:
        self._started = self._told = time.monotonic()

    def tell(self, reason: str) -> None:
        """Log `reason`, unless that was done a moment ago."""
        now = time.monotonic()
        if now - self._told >= _TELL_EVERY_S:
            self._told = now
            _logger.info("waiting_for_engine", reason=reason, seconds=round(now - self._started))


class Node:
    """Everything that the servicer needs, once both services answered."""

    def __init__(
        self,
        settings: RouterSettings,
        memory: MemoryClient,
        compute: ComputeClient,
        model: ServedModel,
        terms: SessionTerms,
        tally: Tally,
    ) -> None:
        self.model = model
        self.served_model_name = settings.served_model_name or model.folder.name
        self.tokenizer = load_tokenizer(model.folder)
        self.chat_template = ChatTemplate.load(model.folder)
        self.intake = Intake(_intake_limits(settings, model, terms), self.tokenizer)
        self.is_draining = False
        self.tally = tally
        self.terms = terms
        self.scheduler = Scheduler(_scheduler_limits(settings, terms), tally)
        self._memory = memory
        self._compute = compute
        self._loop = StepLoop(
            self.scheduler, memory, compute, tally, self._check_terms, settings.steps_in_flight
        )

    def _check_terms(self, model: ServedModel, terms: SessionTerms) -> None:
        """What came back is what requests were checked and tokenized for; raises StartupError."""
        before = (self.model.kind, self.terms.block_size, self.terms.num_blocks)
        after = (model.kind, terms.block_size, terms.num_blocks)
        if before != after:
            message = f"the engine came back with other settings: {after} instead of {before}"
            raise StartupError(f"{message}; this router ends, another one takes them up")

    @classmethod
    async def connect(cls, settings: RouterSettings) -> Node:
        """Wait until both services answer, then open the session and the stream of steps."""
        memory = MemoryClient(
            settings.memory_address, f"router-{secrets.token_hex(4)}", settings.max_num_seqs
        )
        compute = ComputeClient(settings.compute_address)
        waiting = _Waiting()
        while True:
            try:
                model = await compute.get_model()
                terms = await memory.open_session(model)
                await compute.open_steps(memory.session_id, terms.generation, model.pool_id)
            except (QuireError, StreamLost) as error:
                waiting.tell(str(error))
                await asyncio.sleep(_CONNECT_WAIT_S)
            else:
                return cls(settings, memory, compute, model, terms, Tally())

    @property
    def is_connected(self) -> asyncio.Event:
        """Set while both streams stand."""
        return self._loop.is_connected

    async def run(self) -> None:
        """Run steps until cancelled."""
        await self._loop.run()

    def add(self, request: Request, received_at: float) -> None:
        """Let `request` wait for its turn; raises RequestIdInUse or QueueFull."""
        self.scheduler.add(request)
        self.tally.accepted(request, received_at)
        self._loop.wake()

    def find(self, tenant: str, request_id: str) -> Request:
        """The live request of `tenant` with this id; raises RequestNotFound."""
        return self.scheduler.requests.get(tenant, request_id)

    def abort(self, request: Request) -> None:
        """End `request` if it is live."""
        self.scheduler.abort(request)
        self._loop.wake()

    async def drain(self, grace_s: float) -> None:
        """Take no more requests, let the live ones end for `grace_s` seconds, then cancel them."""
        self.is_draining = True
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._until_idle()
        for request in self.scheduler.requests:
            self.abort(request)

    async def _until_idle(self) -> None:
        while self.scheduler.requests:  # noqa: ASYNC110 -- only at shutdown; an event would cost every step
            await asyncio.sleep(_DRAIN_POLL_S)

    async def close(self) -> None:
        """End both streams; memory releases what is still held."""
        with suppress(QuireError, StreamLost):
            await self._compute.close()
            await self._memory.close()


def _intake_limits(
    settings: RouterSettings, model: ServedModel, terms: SessionTerms
) -> IntakeLimits:
    return IntakeLimits(
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        eos_token_ids=model.eos_token_ids,
        block_size=terms.block_size,
        num_blocks=terms.num_blocks,
        max_num_seqs=settings.max_num_seqs,
    )


def _scheduler_limits(settings: RouterSettings, terms: SessionTerms) -> SchedulerLimits:
    return SchedulerLimits(
        block_size=terms.block_size,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        watermark_blocks=int(settings.watermark * terms.num_blocks),
        queue_limit=settings.queue_limit,
    )
