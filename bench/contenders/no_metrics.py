"""email-processor with metrics that count nothing, to measure the cost of counting."""

from prometheus_client import Counter, Gauge, Histogram

for metric in (Counter, Gauge, Histogram):
    for name in {"inc", "dec", "set", "observe", "set_to_current_time"} & vars(metric).keys():
        setattr(metric, name, lambda *_: None)

from app import create_app  # noqa: E402, F401 - Gunicorn takes it from here
