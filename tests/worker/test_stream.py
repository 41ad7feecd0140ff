"""What a stream sends, and when: without a worker, from events that a test makes."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

from refengine.engine.sampling import SamplingParams
from refengine.worker.http import stream
from refengine.worker.jobs.job import Event, Job


def test_json_is_on_one_line_for_every_client() -> None:
    said = {"t": "".join(map(chr, range(0x3000))), "\u2028": ["\x85"]}
    sent = stream.sse(0, ("token", said))
    assert sent.splitlines() == sent.split("\n")[:-1]
    assert json.loads(sent.splitlines()[1].removeprefix("data: ")) == said


def test_events_of_which_nothing_is_sent_are_silence() -> None:
    worker: Any = SimpleNamespace(disconnected=lambda *_: None, options=SimpleNamespace(heartbeat_sec=0.1))
    sent: list[str] = []

    async def receive() -> Any:
        await asyncio.sleep(60)

    async def send(message: Any) -> None:
        sent.append(message.get("body", b"").decode())

    def render(_: int, event: Event) -> str:
        return event[1]["t"]

    async def run() -> None:
        job = Job("j", lambda: [5], SamplingParams(), {})
        sending = asyncio.create_task(stream.EventStream(worker, [job], render)({"type": "http"}, receive, send))
        for i in range(20):
            job.emit("token", {"t": "said" if i == 10 else ""})
            await asyncio.sleep(0.03)
        job.close("eos")
        await sending

    asyncio.run(run())
    said = sent.index("said")
    assert stream.HEARTBEAT in sent[:said]
    assert stream.HEARTBEAT in sent[said:]
