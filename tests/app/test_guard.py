"""Web page: which requests it refuses, and what it drops."""

import time

import pytest

from dalle.app import ui
from tests.app.test_ui import LOCAL, generate, httpx, results, upload

pytestmark = pytest.mark.filterwarnings("ignore::Warning:gradio")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:80"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:7860"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
def test_names_of_others_and_posts_of_other_pages_are_refused(server, headers, status):
    body = {"session_hash": "s", "fn_index": 0, "event_id": "e"}
    reply = httpx.post(f"{server.url}gradio_api/cancel", json=body, headers=headers, **LOCAL)
    assert reply.status_code == status
    if "Host" in headers:
        assert httpx.get(server.url, headers=headers, **LOCAL).status_code == status


def test_uploads_have_a_quota(server, monkeypatch):
    upload(server, bytes(300_000), status=403)
    monkeypatch.setattr(ui, "UPLOADS", 0)
    upload(server, b"small", status=403)


def test_a_visitor_has_a_share_and_abandoned_work_is_dropped(server, prompt, positions_sampled, monkeypatch):
    monkeypatch.setattr(ui, "PATIENCE", 60)
    number = next(i for i, one in server.blocks.fns.items() if one.name == "generate")
    values = [prompt, 3, 2, 512, 1, 0, 1, 1, None, 2]
    statuses = []
    for i in range(6):
        request = {"data": values, "fn_index": number, "session_hash": f"gone{i}"}
        statuses.append(httpx.post(f"{server.url}gradio_api/queue/join", json=request, **LOCAL).status_code)
    assert statuses == [200] * ui.JOBS + [403] * 2
    monkeypatch.setattr(ui, "PATIENCE", 0.2)
    deadline = time.monotonic() + 20
    while server.blocks._queue.event_ids_to_events:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert positions_sampled == []
    assert results(generate(server, prompt))[0].startswith("The best 2 of 5")
