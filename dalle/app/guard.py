"""ASGI middleware of the web page: names of the server, origins, and what one visitor may use of it."""

import re
import time
from contextlib import suppress
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse

from dalle.commands.app import AppArgs
from dalle.io.text import parse_json

POSTS = ("cancel", "queue/join", "reset", "run/predict", "upload")  # of the page; Gradio has more
JOBS = 4  # of a visitor, that wait or run
UPLOADS, ALL_UPLOADS = 20, 100  # files of a visitor and of all, until they are deleted
KEPT = 3600 + 900  # seconds until an upload is deleted
HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:/@\[\]]+?)\.?)(?::\d+)?")


@dataclass
class Upload:
    """A request that uploads: one file until it is known how many."""

    visitor: str
    time: float
    files: int = 1


class Guard:
    """Answers to the server's names alone, and takes the posts of its own page as far as there is room.

    Another page can neither read nor sample, also not by DNS rebinding: a browser names its host and origin.
    A program names what it likes, so visitors are distinguished by address; behind a proxy on this computer,
    as with --share, by the address that the proxy forwards.
    """

    def __init__(self, app, args: AppArgs):
        self.app, self.args, self.uploads = app, args, []

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})
        elif scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif problem := self.problem(scope):
            await PlainTextResponse(problem, 403)(scope, receive, send)
        elif scope["path"].endswith("/upload"):
            await self.upload(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def problem(self, scope) -> str | None:
        """Why a request is refused."""
        headers, share_url = Headers(scope=scope), scope["app"].get_blocks().share_url
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        allowed = {name.lower() for name in self.args.allowed_hosts}
        allowed |= {share_url.split("/")[2]} if share_url else set()
        served = {"localhost", self.args.host.lower().strip("[]"), scope["server"][0].removeprefix("::ffff:")}
        if hostname(host) not in served | allowed:
            return "not a name of this server; --allowed-hosts adds one"
        if origin is not None:
            source = origin.lower().partition("://")[2]
            if source != host and hostname(source) not in allowed:
                return "another page may neither upload nor sample here"
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return None
        if scope["path"].removeprefix("/gradio_api/") not in POSTS:
            return "not a request of this page"
        length = headers.get("content-length", "")
        known = length.isdecimal() and "transfer-encoding" not in headers
        if not known or int(length) > self.args.max_upload + 2**16:
            return "the request is too large, or does not say how large it is"
        return None

    async def upload(self, scope, receive, send) -> None:
        """Counts an upload from its start, so that many at a time do not pass."""
        visitor, now = scope["client"][0], time.monotonic()
        self.uploads = [one for one in self.uploads if one.time > now - KEPT]
        own = sum(one.files for one in self.uploads if one.visitor == visitor)
        if own >= UPLOADS or sum(one.files for one in self.uploads) >= ALL_UPLOADS:
            problem = PlainTextResponse("there is no room for more images; try again in an hour", 403)
            await problem(scope, receive, send)
            return
        upload, reply = Upload(visitor, now), []
        self.uploads.append(upload)

        async def watched(message) -> None:
            reply.append(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            upload.files = 0
            with suppress(ValueError):
                upload.files = len(parse_json(b"".join(reply), "the reply"))


def hostname(host: str) -> str | None:
    """The name or address of a Host header, without port and final dot."""
    match = HOST.fullmatch(host)
    return match and (match[1] or match[2])


def limit_jobs(queue) -> None:
    """Refuses a job of a visitor who has `JOBS`; between count and entry nothing else runs."""
    push = queue.push

    async def limited_push(body, request, username):
        events = queue.event_ids_to_events.values()
        if sum(event.request.client.host == request.client.host for event in events) >= JOBS:
            return False, f"{JOBS} requests of yours are waiting; stop one", "queue_full"
        return await push(body, request, username)

    queue.push = limited_push
