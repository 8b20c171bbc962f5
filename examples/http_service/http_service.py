"""Classify pictures over HTTP: the bytes of a picture in, its five likeliest labels out."""

import os

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from msn_export.errors import ImageError
from msn_export.runtime import open_runner

LARGEST = 32 * 2**20  # bytes of a picture
runner = open_runner(os.environ["MODEL"])  # one for all requests: threads may share it


def classify(picture: bytes) -> list[dict[str, str | float]]:
    (guesses,) = runner.top_k(runner(picture).logits, k=5)
    return [{"label": guess.label, "score": guess.score} for guess in guesses]


async def post(request: Request) -> JSONResponse:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST:
            return JSONResponse({"error": f"a picture has at most {LARGEST} bytes"}, 413)
    try:
        return JSONResponse(await run_in_threadpool(classify, bytes(body)))
    except ImageError as error:
        return JSONResponse({"error": str(error)}, 400)


app = Starlette(routes=[Route("/", post, methods=["POST"])])
