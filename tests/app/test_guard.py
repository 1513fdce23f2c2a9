"""Web page: which requests it refuses, and what it drops."""

import asyncio
import json
import socket
import time
from types import SimpleNamespace

import pytest

from dalle.app import guard, ui
from dalle.app.guard import Guard
from dalle.commands.app import AppArgs
from tests.app.test_ui import LOCAL, generate, httpx, results, upload

pytestmark = pytest.mark.filterwarnings("ignore::Warning:gradio")
SHARED = "https://our1.gradio.live"


def problem(headers, path="queue/join", method="POST", server="127.0.0.1", share_url=None, **options):
    """What a guard says of a request with these headers."""
    blocks = SimpleNamespace(share_url=share_url)
    headers = {"Host": "localhost:7860", "Content-Length": "9"} | headers
    scope = {
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "method": method,
        "path": path if path[:1] == "/" else f"/gradio_api/{path}",
        "server": (server, 7860),
        "app": SimpleNamespace(get_blocks=lambda: blocks),
    }
    return Guard(None, AppArgs(**options)).problem(scope)


@pytest.mark.parametrize(
    ("host", "options"),
    [
        ("127.0.0.1:7860", {}),
        ("LOCALHOST", {}),
        ("localhost.:80", {}),
        ("[::1]", {"server": "::1"}),
        ("[::1]:7860", {"server": "::1"}),
        ("10.0.0.7:7860", {"server": "10.0.0.7", "host": "0.0.0.0"}),
        ("10.0.0.7:7860", {"server": "::ffff:10.0.0.7", "host": "::"}),
        ("our1.gradio.live", {"share_url": SHARED}),
        ("demo.example", {"allowed_hosts": ("Demo.example",)}),
    ],
)
def test_names_of_the_server(host, options):
    assert problem({"Host": host}, **options) is None
    assert problem({"Host": host, "Origin": f"https://{host}"}, **options) is None


@pytest.mark.parametrize(
    ("host", "options"),
    [
        ("", {}),
        ("evil.example", {}),
        ("127.0.0.1.evil.example:7860", {}),
        ("localhost@evil.example", {}),
        ("127.0.0.1:7860:1", {}),
        ("[::1", {"server": "::1"}),
        ("box:7860", {"server": "10.0.0.7", "host": "0.0.0.0"}),
        ("other.gradio.live", {"share_url": SHARED}),
        ("our1.gradio.live", {}),
        ("sub.demo.example", {"allowed_hosts": ("demo.example",)}),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_names_of_others_are_refused(host, options, method):
    forwarded = {"X-Forwarded-Host": "localhost:7860", "Forwarded": "host=localhost:7860"}
    assert "--allowed-hosts" in problem({"Host": host, **forwarded}, method=method, **options)


@pytest.mark.parametrize(
    "origin",
    ["null", "http://evil.example", "http://localhost", "http://localhost:8000", "x//localhost:7860"],
)
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_requests_of_other_pages_are_refused(origin, method):
    assert "another page" in problem({"Origin": origin}, method=method)


def test_an_allowed_name_before_a_proxy():
    origin = {"Origin": "https://demo.example"}
    assert problem(origin, allowed_hosts=("demo.example",)) is None
    assert "another page" in problem({"Origin": "https://x.example"}, allowed_hosts=("demo.example",))
    for name in ("", "https://demo.example", "demo.example:80"):
        with pytest.raises(ValueError, match="allowed_hosts"):
            AppArgs(allowed_hosts=(name,))


@pytest.mark.parametrize("path", ["run/generate", "call/x", "call/v2/x", "api/predict", "component_server"])
def test_posts_that_the_page_does_not_use_are_refused(path):
    assert "not a request of this page" in problem({}, path)
    assert problem({}, path, "GET") is None


@pytest.mark.parametrize(
    "headers", [{"Content-Length": str(2**30)}, {"Content-Length": "-1"}, {"Transfer-Encoding": "chunked"}]
)
def test_posts_of_unknown_or_large_size_are_refused(headers):
    assert "too large" in problem(headers)


def test_uploads_of_a_visitor_and_of_all_are_counted_from_their_start():
    async def run(visitors: list[str], files: int) -> list[int]:
        statuses, started = [], asyncio.Event()

        async def app(scope, receive, send):
            await started.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": json.dumps(["file"] * files).encode()})

        async def send(message):
            statuses.append(message.get("status"))

        one = Guard(app, AppArgs())
        jobs = [one.upload({"type": "http", "client": (name, 1)}, None, send) for name in visitors]
        jobs = [asyncio.ensure_future(job) for job in jobs]
        await asyncio.sleep(0)
        started.set()
        await asyncio.gather(*jobs)
        await one.upload({"type": "http", "client": (visitors[0], 1)}, None, send)
        return [status for status in statuses if status]

    many = asyncio.run(run(["10.0.0.1"] * 30 + ["10.0.0.2"], 1))
    assert (many.count(200), many.count(403)) == (guard.UPLOADS + 1, 11)
    others = asyncio.run(run([f"10.0.1.{i}" for i in range(150)], 1))
    assert others.count(200) == guard.ALL_UPLOADS
    assert asyncio.run(run(["10.0.0.1"], 50)) == [200, 403]
    assert asyncio.run(run(["10.0.0.1"] * guard.UPLOADS, 0))[-1] == 200


def test_a_request_without_host_and_a_websocket(server):
    address = server.url.split("/")[2].split(":")
    for lines in ("GET / HTTP/1.0", "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade"):
        with socket.create_connection(address, timeout=20) as connection:
            connection.sendall(f"{lines}\r\n\r\n".encode())
            assert b" 403 " in connection.recv(100)
    assert httpx.get(server.url, headers={"Host": "evil.example"}, **LOCAL).status_code == 403
    upload(server, bytes(300_000), status=403)


def join(server, prompt: str, session: str) -> int:
    number = next(i for i, one in server.blocks.fns.items() if one.name == "generate")
    request = {"data": [prompt, 3, 2, 512, 1, 0, 1, 1, None, 2], "fn_index": number, "session_hash": session}
    return httpx.post(f"{server.url}gradio_api/queue/join", json=request, **LOCAL).status_code


def wait_until_done(server) -> None:
    deadline = time.monotonic() + 20
    while server.blocks._queue.event_ids_to_events:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_visitor_has_a_share_and_abandoned_work_is_dropped(server, prompt, positions_sampled, monkeypatch):
    monkeypatch.setattr(ui, "PATIENCE", 60)
    assert [join(server, prompt, f"gone{i}") for i in range(6)] == [200] * guard.JOBS + [503] * 2
    monkeypatch.setattr(ui, "PATIENCE", 0.2)
    wait_until_done(server)
    assert positions_sampled == []
    assert results(generate(server, prompt))[0].startswith("The best 2 of 5")


def test_a_visitor_who_stops_reading_is_dropped(server, prompt, positions_sampled, monkeypatch):
    unread = iter([False])
    monkeypatch.setattr(ui, "is_unread", lambda request: next(unread, True))
    monkeypatch.setattr(ui, "SLOWEST", 0)
    assert join(server, prompt, "slow") == 200
    wait_until_done(server)
    assert len(positions_sampled) < 5
