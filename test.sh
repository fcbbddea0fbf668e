#!/usr/bin/env bash
# Check a live service: /health, and eight requests to /process. See --help.
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: ./test.sh [URL]

Checks the service at URL (default http://localhost:8080): /health, and eight requests to /process.
One of these is valid, so it puts a message into the queue, with the subject "test.sh: please ignore"
and the attribute RequestId test-sh-....

The token comes from API_TOKEN, else from SSM through the AWS CLI. The service that
./setup-local.sh run starts takes the example token:

  API_TOKEN='$DJISA<$#45ex3RtYr' ./test.sh

Environment:
  API_TOKEN            the token
  TOKEN_SSM_PARAMETER  else the parameter that holds it; of several, separated by commas, the first
                       (default /email-service/api-token)
  AWS_REGION           the parameter's region (default us-west-1)

Exit status: 0 when all checks have passed, 1 when a check has failed, 2 for a wrong argument.
HELP
}

die() { echo "test.sh: $1" >&2 && exit "${2:-1}"; }

# Sets token. It stays in this shell and in pipes: other users can see arguments and exported variables
# of processes.
find_token() {
  local name region
  token=${API_TOKEN:-}
  unset API_TOKEN
  [ -z "$token" ] || return 0
  name=${TOKEN_SSM_PARAMETER:-/email-service/api-token} name=${name%%,*} name=${name//[[:space:]]/}
  region=${AWS_REGION:-us-west-1}
  command -v aws >/dev/null ||
    die "No token: set API_TOKEN (for a local service see --help), or install the AWS CLI, which reads it from SSM."
  local command=(aws ssm get-parameter --with-decryption --name "$name" --region "$region"
    --query Parameter.Value --output text)
  export AWS_PAGER=""
  # A second call gets the error: standard error in the first one would add warnings to the token.
  token=$("${command[@]}" 2>/dev/null) && [ -n "$token" ] || {
    local reason
    reason=$("${command[@]}" 2>&1 >/dev/null) || true
    die "No token: the AWS CLI does not get $name in $region (${reason##*$'\n'}). Check its credentials, TOKEN_SSM_PARAMETER and AWS_REGION, or set API_TOKEN."
  }
}

# Prints the text as a JSON string, byte by byte: bytes outside ASCII stay unchanged.
json_string() {
  local LC_ALL=C text=$1 out="" char i
  for ((i = 0; i < ${#text}; i++)); do
    char=${text:i:1}
    case $char in
      [\"\\]) out+=\\$char ;;
      [[:cntrl:]]) out+=$(printf '\\u%04x' "'$char") ;;
      *) out+=$char ;;
    esac
  done
  printf '"%s"' "$out"
}

# Runs curl. Sets outcome to the status with error code, message_id or healthy. Without a response, outcome
# is "" and reason is curl's error. The response is never shown: it might repeat the token.
send() {
  local response error='"error": *"([a-z_]+)"'
  # -q: a .curlrc might change what is sent and printed.
  response=$(curl -q --silent --show-error --globoff --max-time 30 \
    --write-out '\n%{http_code}' "$@" 2>&1) || {
    outcome="" reason=${response##*curl: } reason=${reason%%$'\n'*}
    return 0
  }
  outcome=${response##*$'\n'}
  if [[ $response =~ $error ]]; then
    outcome+=" ${BASH_REMATCH[1]}"
  elif [[ $response =~ \"status\":\ *\"success\" && $response =~ \"message_id\":\ *\"[^\"]+\" ]]; then
    outcome+=" message_id"
  elif [[ $response =~ \"status\":\ *\"healthy\" ]]; then
    outcome+=" healthy"
  fi
}

# Compares outcome with the expected one, for the check of this name.
check() {
  number=$((number + 1))
  if [ "$outcome" = "$2" ]; then
    echo "ok    $number/9 $1: $outcome"
  else
    failed=$((failed + 1))
    echo "FAIL  $number/9 $1: expected $2, got ${outcome:-"no response: $reason"}"
  fi
}

# Posts a body, for the check of this name.
post() {
  send --header 'Content-Type: application/json' --header "X-Request-Id: $request_id" --data-binary @- "$url/process" < <(printf '%s' "$3")
  check "$1" "$2"
}

case ${1:-} in
  -h | --help) usage && exit ;;
esac
[ $# -le 1 ] || die "Too many arguments; see --help." 2
url=${1:-http://localhost:8080}
[[ $url =~ ^https?://[^/[:space:]]+[^[:space:]]*$ ]] ||
  die "'$url' is not a URL such as http://localhost:8080; see --help." 2
url=${url%/}
command -v curl >/dev/null || die "curl is missing. Install it (apt install curl, or brew install curl)."
# A proxy cannot know what localhost is here.
no_proxy=${no_proxy:-${NO_PROXY:-}},localhost,127.0.0.1,::1
export no_proxy

request_id=test-sh-$$-$RANDOM # to find the message and its log lines
token="" outcome="" reason="" number=0 failed=0 hint=""
find_token

send "$url/health"
[ -n "$outcome" ] ||
  die "No response from $url: $reason. Start the service with ./setup-local.sh run, or give its URL."
check "health" "200 healthy"

good='"email_subject": "test.sh: please ignore", "email_sender": "John doe"'
time='"email_timestream": "1693561101"'
content='"email_content": "Just want to say... Happy new year!!!"'
auth="\"token\": $(json_string "$token")"

post "valid message" "200 message_id" "{\"data\": {$good, $time, $content}, $auth}"
[ "$outcome" != "401 invalid_token" ] || hint=" The service does not know this token: check API_TOKEN and TOKEN_SSM_PARAMETER."
post "missing token" "401 token_required" "{\"data\": {$good, $time, $content}}"
post "invalid token" "401 invalid_token" \
  "{\"data\": {$good, $time, $content}, \"token\": \"not a token of this service\"}"
post "missing field" "400 invalid_data" "{\"data\": {$good, $time}, $auth}"
post "empty field" "400 invalid_data" "{\"data\": {$good, $time, \"email_content\": \"\"}, $auth}"
post "malformed timestamp" "400 invalid_timestamp" \
  "{\"data\": {$good, \"email_timestream\": \"yesterday\", $content}, $auth}"
post "timestamp out of range" "400 invalid_timestamp" \
  "{\"data\": {$good, \"email_timestream\": \"4102444801\", $content}, $auth}"
post "invalid JSON" "400 invalid_json" "{\"data\": {$good, $time, $content}, $auth"

[ "$failed" -eq 0 ] || die "$failed of 9 checks failed at $url.$hint"
echo "All 9 checks passed at $url."
