#!/usr/bin/env bash
# Make the virtual environment, install everything, and serve or test. See --help.
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: ./setup-local.sh [run|test]

  (nothing)  make the virtual environment .venv and install everything into it
  run        that, and serve on port 8080 with an embedded AWS
  test       that, and run every test, with branch coverage

.venv is made anew whenever requirements-dev.txt has changed; otherwise it is used as it is.

Environment:
  PYTHON     the Python to use, 3.11 or newer; else the first such of
             python3, python3.13, python3.12, python3.11
  PORT       the port that run listens on (default 8080)

Exit status: 0, 1 for a failure, 2 for a wrong argument; with test, that of the tests.
HELP
}

die() {
  echo "setup-local.sh: $1" >&2
  exit "${2:-1}"
}

step() {
  number=$((number + 1))
  echo "[$number/$steps] $1"
}

# Prints a Python's version and home, the same ones for a virtual environment made with it.
# Status 1: older than 3.11. Status 3: without the modules that make environments.
probe() {
  "$1" -c '
import sys
print("%d.%d.%d in %s" % (sys.version_info[:3] + (getattr(sys, "base_prefix", sys.prefix),)))
if sys.version_info < (3, 11):
    sys.exit(1)
try:
    import ensurepip, venv
except ImportError:
    sys.exit(3)
' 2>/dev/null
}

# Sets python and version.
find_python() {
  local candidate status old="" bare="" candidates=(python3 python3.13 python3.12 python3.11)
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    status=0
    version=$(probe "$candidate") || status=$?
    case $status in
      0)
        python=$candidate
        return
        ;;
      1) [ -z "$version" ] || old=${old:-"$candidate is Python ${version%% *}"} ;;
      3) bare=${bare:-"$candidate (Python ${version%% *})"} ;;
    esac
  done
  if [ -n "$bare" ]; then
    die "$bare lacks the modules venv and ensurepip. Install them (on Debian and Ubuntu: apt install python3-venv) or set PYTHON to another Python."
  elif [ -n "$old" ]; then
    die "$old, but 3.11 or newer is needed. Install one (python.org, or the system's packages) or set PYTHON to its path."
  elif [ -n "${PYTHON:-}" ]; then
    die "PYTHON=$PYTHON does not run. Set it to the path of a Python 3.11 or newer, or unset it."
  fi
  die "There is no python3 on the PATH. Install Python 3.11 or newer (python.org, or the system's packages) or set PYTHON to its path."
}

# What .venv must have been made from; written into it last, so an interrupted run leaves none.
# The folder counts because the commands in .venv/bin hold its absolute path.
wanted() {
  echo "$PWD"
  cat requirements-dev.txt
}

is_ready() {
  local made_from wanted_from
  [ -f .venv/made-from ] || return 1
  made_from=$(<.venv/made-from)
  wanted_from=$(wanted)
  [ "$made_from" = "$wanted_from" ] || return 1
  version=$(probe .venv/bin/python) || return 1
  [ -z "${PYTHON:-}" ] || [ "$version" = "$(probe "$PYTHON")" ]
}

# One line on why pip failed, from its log.
explain_pip() {
  local log last
  log=$(<"$1")
  last=${log##*ERROR: }
  case $log in
    *"No space left on device"*)
      die "The disk is full. Make room (700 MB are needed) and run this again." ;;
    *"DO NOT MATCH THE HASHES"*)
      die "A downloaded package is not the one pinned in requirements-dev.txt (see $1). Find out what changes downloads, a proxy or PIP_INDEX_URL, before you run this again." ;;
    *CERTIFICATE_VERIFY_FAILED*)
      die "pip does not trust the package index's certificate (see $1). Behind a proxy that makes its own, set PIP_CERT to its CA file, and run this again." ;;
    *"onnection broken"* | *"establish a new connection"* | *"timed out"* | *"onnection aborted"* | \
      *"(from versions: none)"*)
      die "No network: pip cannot reach the package index (see $1). Check the connection, HTTPS_PROXY and PIP_INDEX_URL, and run this again." ;;
  esac
  die "pip cannot install the packages: ${last%%$'\n'*} (see $1)."
}

make_venv() {
  local log=.venv/install.log
  # Neither may lead Python past the environment.
  unset PYTHONHOME PYTHONPATH
  [ -d .venv ] && [ ! -L .venv ] || rm -f .venv 2>/dev/null || true
  mkdir -p .venv 2>/dev/null && [ -w .venv ] ||
    die "Cannot write to $PWD/.venv. Make it and its folder writable, or use a copy of the project."
  rm -f .venv/made-from
  "$python" -m venv --clear .venv >/dev/null 2>&1 ||
    die "'$python -m venv --clear .venv' failed; run it to see why. On Debian and Ubuntu, apt install python3-venv."
  step "install the packages of requirements-dev.txt (up to a minute; log: $log)"
  # Without a network pip should give up soon; whoever has set these knows better.
  PIP_RETRIES=${PIP_RETRIES:-2} PIP_DEFAULT_TIMEOUT=${PIP_DEFAULT_TIMEOUT:-10} PIP_USER=0 \
    .venv/bin/python -m pip install --disable-pip-version-check --no-input --require-hashes \
    -r requirements-dev.txt >"$log" 2>&1 || explain_pip "$log"
  wanted >.venv/made-from
}

case ${1:-} in
  -h | --help)
    usage
    exit
    ;;
  "" | run | test) ;;
  *) die "Unknown argument '$1'. Use run, test or nothing; see --help." 2 ;;
esac
[ $# -le 1 ] || die "Too many arguments. Use run, test or nothing; see --help." 2
mode=${1:-}
number=0 steps=3 python="" version=""

case ${PYTHON:-} in
  /*) ;;
  */*) PYTHON=$PWD/$PYTHON ;; # meant from here, not from the project's folder
esac
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
[ -r requirements-dev.txt ] || die "requirements-dev.txt is missing. Restore it: git checkout requirements-dev.txt"

if is_ready; then
  step "use .venv, Python $version"
  step "skip the packages: requirements-dev.txt has not changed"
else
  find_python
  step "make .venv with Python $version"
  make_venv
fi

case $mode in
  "")
    step "ready: ./setup-local.sh run serves, ./setup-local.sh test tests"
    ;;
  run)
    step "serve: .venv/bin/python app.py"
    exec .venv/bin/python app.py
    ;;
  test)
    step "test: .venv/bin/coverage run -m pytest"
    status=0
    .venv/bin/coverage erase
    .venv/bin/coverage run -m pytest || status=$?
    report_status=0
    { .venv/bin/coverage combine --quiet && .venv/bin/coverage report; } || report_status=$?
    [ "$status" -ne 0 ] || status=$report_status
    exit "$status"
    ;;
esac
