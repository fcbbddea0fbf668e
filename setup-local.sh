#!/usr/bin/env bash
# Make the virtual environment, install everything, and serve or test. See --help.
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: ./setup-local.sh [run | test [--all]]

  (nothing)    make the virtual environment venv and install everything into it
  run          that, and serve on port 8080 with an embedded AWS
  test         that, and run the quick tests in parallel, with branch coverage
  test --all   that, and run the slow tests too

venv is made anew when requirements-dev.txt or the Python has changed.

Environment:
  PYTHON     the Python to use, 3.11 to 3.14; else the first such on the PATH
  PORT       the port that run listens on (default 8080)

Exit status: 0, 1 for a failure, 2 for a wrong argument; with test, that of the tests.
HELP
}

die() {
  echo "setup-local.sh: $1" >&2
  exit "${2:-1}"
}

case "$*" in
  -h | --help)
    usage
    exit
    ;;
  "" | run | test | "test --all") ;;
  *) die "Unknown arguments '$*'. Use run, test, test --all or nothing; see --help." 2 ;;
esac

case ${PYTHON:-} in
  /*) ;;
  */*) PYTHON=$PWD/$PYTHON ;; # meant from here, not from the project's folder
esac
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
unset PYTHONHOME PYTHONPATH # neither may lead Python past the environment

found=""
for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11 python}; do
  version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
  case $version in 3.11 | 3.12 | 3.13 | 3.14) break ;; esac
  found="$found $python is $version." version=""
done
[ -n "${version:-}" ] ||
  die "Python 3.11 to 3.14 is needed.${found:- None was found.} Install one, or set PYTHON to its path."

# Written last, so that an interrupted installation leaves none. The folder counts because the
# commands in the environment hold its path.
made_from="$PWD $python $version $(cksum <requirements-dev.txt)"
if [ "$(cat venv/made-from 2>/dev/null)" = "$made_from" ]; then
  echo "[1/2] use venv, Python $version"
else
  echo "[1/2] make venv, Python $version, and install requirements-dev.txt"
  rm -f venv/made-from
  "$python" -m venv --clear venv ||
    die "'$python -m venv --clear venv' failed. On Debian and Ubuntu: apt install python3-venv."
fi
bin=venv/bin
[ -d "$bin" ] || bin=venv/Scripts # Windows
if [ ! -e venv/made-from ]; then
  # uv installs in seconds what takes pip a minute. Where only pip knows the index, pip does it.
  sed -n '/^uv==/,/[^\\]$/p' requirements-dev.txt >venv/uv.txt
  export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_USER=0 PIP_RETRIES=${PIP_RETRIES:-2}
  pip=("$bin/python" -m pip --quiet install --require-hashes --requirement)
  { "${pip[@]}" venv/uv.txt &&
    "$bin/uv" --quiet pip sync --python "$bin/python" --require-hashes requirements-dev.txt; } ||
    "${pip[@]}" requirements-dev.txt ||
    die "The packages cannot be installed; the lines above say why."
  echo "$made_from" >venv/made-from
fi

case ${1:-} in
  "")
    echo "[2/2] ready: ./setup-local.sh run serves, ./setup-local.sh test tests"
    ;;
  run)
    echo "[2/2] serve: $bin/python app.py"
    exec "$bin/python" app.py
    ;;
  test)
    pytest=("$bin/python" -m pytest -n auto --maxprocesses 4)
    echo "[2/2] test: the quick tests${2:+, then the slow ones}"
    "${pytest[@]}" -m "not slow" --cov=app --cov-branch --cov-fail-under=98
    [ -z "${2:-}" ] || "${pytest[@]}" -m slow
    ;;
esac
