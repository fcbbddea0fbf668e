# The service's image. It runs as UID 1000 with a read-only root file system and without any
# capability; it writes to /tmp and /dev/shm only.

FROM python:3.13-slim AS packages

WORKDIR /build
# The environment has no pip: the base image's pip installs into it.
RUN python -m venv --without-pip /opt/venv
COPY requirements.txt ./
RUN pip --python /opt/venv/bin/python install --no-cache-dir --no-compile --require-hashes \
    -r requirements.txt

# botocore has descriptions of some 400 AWS services, 25 MB. Keep those of ssm, sqs and sts (for the
# role of the service account), and the files beside the folders (endpoints, partitions, retries).
# The build creates these clients, and fails if they need more files. boto3's own data describe its
# resource interface, which the service does not use.
WORKDIR /opt/venv/lib/python3.13/site-packages
RUN find botocore/data -mindepth 1 -maxdepth 1 -type d \
        ! -name ssm ! -name sqs ! -name sts -exec rm -r {} + \
    && rm -r boto3/data boto3/examples \
    && /opt/venv/bin/python -B -c 'import boto3; \
        [boto3.client(name, region_name="us-west-1") for name in ("ssm", "sqs", "sts")]' \
    # On a read-only file system, Python cannot compile later. Unchecked bytecode saves a stat call
    # for each source file.
    && /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash . \
    # Times of the build would make each build of the same commit differ.
    && find /opt -exec touch --no-dereference --date=@0 {} +
# File modes of a checkout depend on the umask.
COPY --chmod=0644 app.py gunicorn.conf.py openapi.yaml tracing.py worker.py /srv/email-processor/
RUN find /srv -exec touch --date=@0 {} +


FROM python:3.13-slim

ENV PATH=/opt/venv/bin:$PATH \
    # Without an entry in /etc/passwd, the home would be /, which is not writable.
    HOME=/tmp
COPY --from=packages /opt /opt
COPY --from=packages /srv /srv
WORKDIR /srv/email-processor
# Import the modules of a start. A broken image fails the build, and Python compiles the modules of the
# standard library, for which the base image has no bytecode.
RUN touch /dev/shm/begin \
    && SQS_QUEUE_URL=https://sqs.us-west-1.amazonaws.com/000000000000/check \
    OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318 \
    gunicorn --check-config \
    && find / -xdev -newer /dev/shm/begin -exec touch --no-dereference --date=@0 {} +

# The folder of the metrics has a fixed name, so that each start empties it, also after a kill.
ENV PYTHONDONTWRITEBYTECODE=1 \
    PROMETHEUS_MULTIPROC_DIR=/dev/shm/email-processor
# The commit, its date, and the URL of the repository. With SOURCE_DATE_EPOCH, the commit's date in
# seconds, each build of a commit gives the same image.
ARG COMMIT=unknown
ARG CREATED
ARG SOURCE
ENV COMMIT=$COMMIT
LABEL org.opencontainers.image.revision=$COMMIT \
    org.opencontainers.image.created=$CREATED \
    org.opencontainers.image.source=$SOURCE
# A number, so that Kubernetes can verify that it is not root.
USER 1000:1000
EXPOSE 8080
# checkov:skip=CKV_DOCKER_2: Kubernetes ignores HEALTHCHECK and has its own probes
CMD ["gunicorn"]
