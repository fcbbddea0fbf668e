"""The cost of the framework itself: parse the JSON and return a constant, without AWS."""

from __future__ import annotations

from flask import Flask, request
from rules import success

app = Flask(__name__)


@app.post("/process")
def process() -> dict[str, str]:
    request.get_json()
    return success("0" * 36)


@app.get("/health")
def health() -> dict[str, str]:
    return {"status": "healthy"}
