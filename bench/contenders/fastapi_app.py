"""FastAPI and aiobotocore under uvicorn: one process, one event loop, the token cached."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from botocore.exceptions import BotoCoreError, ClientError
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from rules import ApiError, check_data, check_token, message, success, token_of

CACHE_SECONDS = 60
QUEUE_URL, PARAMETER = os.environ["SQS_QUEUE_URL"], os.environ["TOKEN_SSM_PARAMETER"]


class Token:
    def __init__(self, ssm: Any) -> None:
        self._ssm, self._lock, self._value, self._until = ssm, asyncio.Lock(), "", 0.0

    async def value(self) -> str:
        if time.monotonic() >= self._until:
            async with self._lock:
                if time.monotonic() >= self._until:
                    response = await self._ssm.get_parameter(Name=PARAMETER, WithDecryption=True)
                    self._value = response["Parameter"]["Value"]
                    self._until = time.monotonic() + CACHE_SECONDS
        return self._value


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    session, region = get_session(), os.environ["AWS_REGION"]
    config = AioConfig(max_pool_connections=128)
    async with (
        session.create_client("ssm", region_name=region) as ssm,
        session.create_client("sqs", region_name=region, config=config) as sqs,
    ):
        app.state.token, app.state.sqs = Token(ssm), sqs
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/process")
async def process(request: Request) -> JSONResponse:
    try:
        body = await request.json()
    except ValueError:
        raise ApiError(400, "invalid_json", "The request is not JSON.") from None
    given = token_of(body)
    check_token(given, await app.state.token.value())
    check_data(body.get("data"))
    sent = await app.state.sqs.send_message(
        QueueUrl=QUEUE_URL, **message(body["data"], request.headers.get("X-Request-Id"))
    )
    return JSONResponse(success(sent["MessageId"]))


@app.get("/health")
async def health() -> dict[str, str]:
    return {"status": "healthy"}


@app.exception_handler(ApiError)
async def api_error(_: Request, error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status)


@app.exception_handler(BotoCoreError)
@app.exception_handler(ClientError)
async def unavailable(_: Request, __: Exception) -> JSONResponse:
    return JSONResponse(ApiError(503, "queue_unavailable", "Try again.").body, 503)


if __name__ == "__main__":
    port = int(os.environ["PORT"])
    uvicorn.run(app, host="127.0.0.1", port=port, loop="uvloop", http="httptools")
