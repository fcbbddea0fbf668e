"""The design's plainest reading: Flask and boto3, an SSM and an SQS call for each request."""

from __future__ import annotations

import os
from typing import Any

import boto3
from botocore.exceptions import BotoCoreError, ClientError
from flask import Flask, request
from rules import ApiError, check_data, check_token, message, success, token_of


def create_app() -> Flask:
    ssm = boto3.client("ssm", region_name=os.environ["AWS_REGION"])
    sqs = boto3.client("sqs", region_name=os.environ["AWS_REGION"])
    queue_url, parameter = os.environ["SQS_QUEUE_URL"], os.environ["TOKEN_SSM_PARAMETER"]
    app = Flask(__name__)

    @app.post("/process")
    def process() -> dict[str, Any]:
        body: Any = request.get_json(silent=True)
        given = token_of(body)
        known = ssm.get_parameter(Name=parameter, WithDecryption=True)
        check_token(given, known["Parameter"]["Value"])
        check_data(body.get("data"))
        sent = sqs.send_message(
            QueueUrl=queue_url, **message(body["data"], request.headers.get("X-Request-Id"))
        )
        return success(sent["MessageId"])

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"status": "healthy"}

    @app.errorhandler(ApiError)
    def api_error(error: ApiError) -> tuple[dict[str, Any], int]:
        return error.body, error.status

    @app.errorhandler(BotoCoreError)
    @app.errorhandler(ClientError)
    def unavailable(_: Exception) -> tuple[dict[str, Any], int]:
        return ApiError(503, "queue_unavailable", "Try again.").body, 503

    return app
