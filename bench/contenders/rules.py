"""What both Python contenders check and send: the same work as email-processor does."""

from __future__ import annotations

import hmac
import json
import uuid
from datetime import UTC, datetime
from typing import Any

FIELDS = ("email_subject", "email_sender", "email_timestream", "email_content")


class ApiError(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"status": "error", "error": code, "message": message}


def token_of(body: Any) -> str:
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_json", "The request is not a JSON object.")
    token = body.get("token")
    if not token:
        raise ApiError(401, "token_required", 'The request needs a "token".')
    return str(token)


def check_token(given: str, known: str) -> None:
    if not hmac.compare_digest(given.encode("utf-8", "replace"), known.encode()):
        raise ApiError(401, "invalid_token", "Invalid token.")


def check_data(data: Any) -> None:
    if not isinstance(data, dict):
        raise ApiError(400, "invalid_data", '"data" is missing or not an object.')
    for name in FIELDS:
        value = data.get(name)
        if name == "email_timestream" and type(value) is int:
            continue
        if not isinstance(value, str) or not value.strip():
            raise ApiError(400, "invalid_data", f"{name} is missing, empty or not a string.")
    timestamp = data["email_timestream"]
    if isinstance(timestamp, str):
        digits = timestamp.isascii() and timestamp.isdigit() and len(timestamp) <= 20
        timestamp = int(timestamp) if digits else -1
    if not 946684800 <= timestamp <= 4102444800:
        raise ApiError(400, "invalid_timestamp", "email_timestream is not a valid timestamp.")


def message(data: dict[str, Any], request_id: str | None) -> dict[str, Any]:
    """The arguments of SendMessage, without the queue."""
    attributes = {
        "ContentType": "application/json",
        "ProcessedAt": datetime.now(UTC).isoformat(),
        "RequestId": request_id or str(uuid.uuid4()),
    }
    return {
        "MessageBody": json.dumps(data),
        "MessageAttributes": {
            name: {"DataType": "String", "StringValue": value} for name, value in attributes.items()
        },
    }


def success(message_id: str) -> dict[str, str]:
    return {
        "status": "success",
        "message": "Email data processed and queued",
        "message_id": message_id,
    }
