# The service's image. It runs as UID 1000 with a read-only root file system and without any
# capability; it writes to /tmp and /dev/shm only.

FROM python:3.13-slim AS packages

WORKDIR /build
# The environment gets no pip of its own; the base's installs into it.
RUN python -m venv --without-pip /opt/venv
COPY requirements.txt ./
RUN pip --python /opt/venv/bin/python install --no-cache-dir --no-compile --require-hashes \
    -r requirements.txt

# botocore describes some 400 services in 25 MB. The service calls ssm and sqs, and its service
# account's role is assumed through sts; the files beside the folders (endpoints, partitions,
# retries) serve all of them. The clients made here fail the build if a release needs more.
# boto3's own data are the resource interface, which is not used.
WORKDIR /opt/venv/lib/python3.13/site-packages
RUN find botocore/data -mindepth 1 -maxdepth 1 -type d \
        ! -name ssm ! -name sqs ! -name sts -exec rm -r {} + \
    && rm -r boto3/data boto3/examples \
    && /opt/venv/bin/python -B -c 'import boto3; \
        [boto3.client(name, region_name="us-west-1") for name in ("ssm", "sqs", "sts")]' \
    # Nothing can be compiled later on a read-only file system. Not checking the source's time
    # against the bytecode's saves a look at each file.
    && /opt/venv/bin/python -m compileall -q --invalidation-mode unchecked-hash . \
    # With the time of the build in it, a layer would differ from build to build.
    && find /opt -exec touch --no-dereference --date=@0 {} +
# The modes of a checkout depend on its owner's umask.
COPY --chmod=0644 app.py gunicorn.conf.py openapi.yaml tracing.py worker.py /srv/email-processor/
RUN find /srv -exec touch --date=@0 {} +


FROM python:3.13-slim

ENV PATH=/opt/venv/bin:$PATH \
    # Without an entry in /etc/passwd the home would be /, where nothing can be written.
    HOME=/tmp
COPY --from=packages /opt /opt
COPY --from=packages /srv /srv
WORKDIR /srv/email-processor
# Loads all that a start loads: a broken image fails here, and what the official base has no
# bytecode of, its standard library, is compiled as far as it is used.
RUN touch /dev/shm/begin \
    && SQS_QUEUE_URL=https://sqs.us-west-1.amazonaws.com/000000000000/check \
    OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318 \
    gunicorn --check-config \
    && find / -xdev -newer /dev/shm/begin -exec touch --no-dereference --date=@0 {} +

# The metrics' folder by name: it is emptied at each start, also after a kill that left it behind.
ENV PYTHONDONTWRITEBYTECODE=1 \
    PROMETHEUS_MULTIPROC_DIR=/dev/shm/email-processor
# The build's identity: the commit, its date, and the repository's URL. With SOURCE_DATE_EPOCH, the
# commit's date in seconds, each build of a commit gives the same image.
ARG COMMIT=unknown
ARG CREATED
ARG SOURCE
ENV COMMIT=$COMMIT
LABEL org.opencontainers.image.revision=$COMMIT \
    org.opencontainers.image.created=$CREATED \
    org.opencontainers.image.source=$SOURCE
# By number, so that Kubernetes can tell that it is not root.
USER 1000:1000
EXPOSE 8080
# Kubernetes' probes look after the health: Docker's own check would be ignored there.
# checkov:skip=CKV_DOCKER_2: Kubernetes' probes take HEALTHCHECK's place
CMD ["gunicorn"]
