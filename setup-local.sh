#!/usr/bin/env bash
# Make the virtual environment, install everything, and serve or test. See --help.
set -euo pipefail

die() {
  echo "setup-local.sh: $1" >&2
  exit "${2:-1}"
}

case "$*" in
  "" | run | test | "test --all") ;;
  -h | --help)
    echo "Usage: ./setup-local.sh [run | test [--all]]

  (nothing)    make the virtual environment venv and install everything into it
  run          then serve on port 8080 (or PORT) with an embedded AWS
  test         then run the quick tests in parallel, with branch coverage
  test --all   then run the slow tests too

PYTHON names the Python to use, 3.11 to 3.14. The default is the first of these on the PATH."
    exit
    ;;
  *) die "Unknown arguments '$*'. Use run, test, test --all or nothing; see --help." 2 ;;
esac

unset PYTHONHOME PYTHONPATH # they would override the environment's packages
candidates=(python3 python3.14 python3.13 python3.12 python3.11 python)
[ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
unfit=""
for candidate in "${candidates[@]}"; do
  about='import sys; print("%d.%d" % sys.version_info[:2], sys.executable, end="")'
  found=$("$candidate" -c "$about" 2>/dev/null) || continue
  case $found in 3.11\ * | 3.12\ * | 3.13\ * | 3.14\ *) break ;; esac
  unfit="$unfit $candidate is ${found%% *}." found=""
done
[ -n "$found" ] ||
  die "Python 3.11 to 3.14 is needed.${unfit:-${PYTHON:+ $PYTHON does not run.}} Install one, or set PYTHON to its path."
version=${found%% *} python=${found#* }

CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
bin=venv/bin
[ ! -d venv/Scripts ] || bin=venv/Scripts # Windows
# Written last, so that an interrupted installation is repeated. It holds the folder, because the
# commands in the environment do.
made_from="$PWD $version $(cksum <requirements-dev.txt)"
if [ -x "$bin/python" ] && [ "$(cat venv/made-from 2>/dev/null)" = "$made_from" ]; then
  echo "[1/2] use venv, Python $version"
else
  echo "[1/2] make venv, Python $version, and install requirements-dev.txt"
  rm -f venv/made-from
  "$python" -m venv --clear venv ||
    die "'$python -m venv --clear venv' failed. On Debian and Ubuntu: apt install python3-venv."
  [ ! -d venv/Scripts ] || bin=venv/Scripts
  # uv takes seconds, pip a minute. pip is the fallback where only pip knows the index.
  sed -n '/^uv==/,/[^\\]$/p' requirements-dev.txt >venv/uv.txt
  export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0 PIP_RETRIES="${PIP_RETRIES:-2}"
  pip=("$bin/python" -m pip --quiet install --require-hashes --requirement)
  { "${pip[@]}" venv/uv.txt &&
    "$bin/uv" --quiet pip sync --python "$bin/python" --require-hashes requirements-dev.txt; } ||
    "${pip[@]}" requirements-dev.txt ||
    die "The packages cannot be installed; the lines above say why."
  echo "$made_from" >venv/made-from
fi

case ${1:-} in
  "") echo "[2/2] ready: ./setup-local.sh run serves, ./setup-local.sh test tests" ;;
  run)
    echo "[2/2] serve: $bin/python app.py"
    exec "$bin/python" app.py
    ;;
  test)
    echo "[2/2] test: the quick tests${2:+, then the slow ones}"
    COVERAGE_FILE=$(mktemp -d)/coverage # separate: another run may be in progress
    export COVERAGE_FILE
    trap 'rm -rf "${COVERAGE_FILE%/*}"' EXIT
    # Not loadfile: Schemathesis's tests share a name, and it would run only one of them.
    pytest=("$bin/python" -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal)
    "${pytest[@]}" -m "not slow" --cov=app --cov-branch --cov-fail-under=98
    [ -z "${2:-}" ] || "${pytest[@]}" -m slow
    ;;
esac
