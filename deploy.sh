#!/usr/bin/env bash
# Deploy the service, from this checkout to a serving ALB. See --help.
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: ./deploy.sh ECR_REGISTRY AWS_ACCOUNT_ID [options]

  ./deploy.sh 111122223333.dkr.ecr.us-west-1.amazonaws.com 111122223333

Deploys infra/email-processor.yaml, makes the token parameter if there is none, builds and pushes an
image tagged by the commit, applies k8s/ and waits until it runs, or else goes back to what ran before.
Run it again at any time: only what differs is changed, and an option that is left out keeps its value
(but --context, --platform, --timeout and --check).

Instead of deploying:
  --dry-run               check everything and say what would be done; nothing is changed
  --render                print the manifests as they would be applied, for kubectl apply -f -
  --delete                remove all that was made here, but no queue

Options (with the value of the first run):
  --region REGION         the region (AWS_REGION, else us-west-1)
  --environment NAME      a further deployment in the account, with a cluster of its own
  --cluster NAME          the EKS cluster (dev-CP-EKS-CLUSTER)
  --context NAME          reach the cluster through this context of your kubeconfig
  --queue-name NAME       the SQS queue (dev-CP-queue)
  --create-queue          make it, with a dead-letter queue (by default it must exist)
  --certificate-arn ARN   serve HTTPS with this ACM certificate; none goes back to HTTP (HTTP)
  --token-parameter NAME  the SSM parameter that holds the token, or several, separated by commas
                          (/email-service/api-token; /email-service/NAME/api-token with --environment)
  --parameter KEY=VALUE   AlarmEmail, RateLimit, TokenKeyArn or DeadLetterQueueName, as the template
                          describes them. May be given several times
  --platform PLATFORM     what the nodes run (linux/amd64)
  --timeout SECONDS       how long to wait for the ALB, its first answer, and each removal (300)
  --check URL             run ./test.sh against URL when the new pods serve, and undo the roll-out if
                          it fails; alb stands for the ALB's own host, for HTTP alone

API_TOKEN holds the token, if the parameter has to be made. Without it you are asked. If you answer
nothing, or there is no terminal at the first run, a random one is made.

Exit status: 0 when the service runs, 1 for a failure, 2 for a wrong argument, 130 when interrupted.
HELP
}

# --- Helpers ----------------------------------------------------------------------------------------

die() { echo "deploy.sh: $1" >&2; exit "${2:-1}"; }
say() { printf '      %s\n' "$1"; }
problem() { problems+=("$1"); }
kube() { kubectl --kubeconfig "$work/kubeconfig" --namespace "$name" "$@"; }
# Version 1 of the CLI ignores AWS_ENDPOINT_URL for SQS.
sqs() { aws sqs ${AWS_ENDPOINT_URL:+--endpoint-url "$AWS_ENDPOINT_URL"} "$@"; }
# The last line that a tool complained with; run it with 2>"$work/error" before.
complaint() { grep -v '^[[:space:]]*$' "$work/error" | tail -n 1 || true; }
# Runs a command, or ends the run with this text and the command's complaint.
must() { "${@:2}" 2>"$work/error" || die "$1 ($(complaint)). Run this again."; }
# Says what it is given line by line; sed would keep it until there is much of it.
indent() { while IFS= read -r line; do say "$line"; done; }

step() {
  number=$((number + 1))
  printf '[%d/%d] %d:%02d %s\n' "$number" "$steps" $((SECONDS / 60)) $((SECONDS % 60)) "$1"
}

# Sets answer to what a command prints, or notes a problem: this text, and the command's complaint.
ask() {
  answer=$("${@:2}" 2>"$work/error") || {
    problem "$1 ($(complaint))."
    return 1
  }
}

# Runs a tool that has much to say; its last lines are shown only when it fails.
quietly() {
  "$@" >"$work/log" 2>&1 || {
    tail -n 20 "$work/log" >&2
    return 1
  }
}

wait_until() {
  local end=$((SECONDS + timeout))
  until "$@" 2>"$work/error"; do
    [ "$SECONDS" -lt "$end" ] || return 1
    sleep 5
  done
}

# A value of the stack, or of what runs in the cluster. Emulators of AWS print a list in brackets.
value_of() {
  awk -F '\t' -v key="$1" '$1 == key { gsub(/[]\[ \047]/, "", $2); print $2 }' <<<"$stack_values"$'\n'"$running"
}

# --- Arguments --------------------------------------------------------------------------------------

read_arguments() {
  local arguments=() option
  while [ $# -gt 0 ]; do
    case $1 in
      -h | --help) usage; exit ;;
      --dry-run | --render | --delete)
        [ "$mode" = deploy ] || die "Only one of --dry-run, --render and --delete can be done at once; see --help." 2
        mode=${1#--}
        ;;
      --create-queue) create_queue=true ;;
      --region | --environment | --cluster | --context | --queue-name | --certificate-arn | \
        --token-parameter | --parameter | --platform | --timeout | --check)
        [[ ${2-} == [!-]* ]] || die "$1 needs a value; see --help." 2
        option=${1#--}
        printf -v "${option//-/_}" %s "$2"
        [ "$option" != parameter ] || parameters+=("$2")
        shift
        ;;
      -*) die "Unknown option '$1'; see --help." 2 ;;
      *) arguments+=("$1") ;;
    esac
    shift
  done
  [ ${#arguments[@]} -eq 2 ] || die "ECR_REGISTRY and AWS_ACCOUNT_ID are needed, and nothing more; see --help." 2
  registry=${arguments[0]} account=${arguments[1]} token_parameter=${token_parameter//[[:space:]]/}
}

# Refuses a value that would end in a manifest or a command as something else. AWS and docker refuse
# other wrong ones themselves.
check_value() {
  [[ $2 =~ ^($3)$ ]] || die "$1 '$2' is not $4; see --help." 2
}

check_arguments() {
  local each names='(/[A-Za-z0-9_.-]+)+'
  check_value ECR_REGISTRY "$registry" '[a-z0-9.-]+(:[0-9]+)?' "a registry's host name"
  check_value AWS_ACCOUNT_ID "$account" '[0-9]{12}' "an account's 12 digits"
  check_value --region "$region" '[a-z]{2}(-[a-z]+)+-[0-9]+' "a region such as us-west-1"
  check_value --environment "$environment" '([a-z0-9]+(-[a-z0-9]+)*)?' "small letters, digits and hyphens"
  check_value --queue-name "$queue_name" '([A-Za-z0-9_-]{1,80}|[A-Za-z0-9_-]{1,75}\.fifo)?' "a queue's name"
  check_value --certificate-arn "$certificate_arn" "(none|arn:[a-z-]+:acm:$region:[0-9]{12}:certificate/[A-Za-z0-9-]+)?" \
    "the ARN of an ACM certificate in $region, or none"
  check_value --token-parameter "$token_parameter" "($names(,$names)*)?" \
    "a parameter's name such as /email-service/api-token, or several, separated by commas"
  check_value --timeout "$timeout" '[1-9][0-9]{0,4}' "a number of seconds"
  check_value --check "$check" '(alb|https?://[^[:space:]]+)?' "a URL, or alb"
  # The template checks the value, but the AWS CLI passes over a key that the template does not have.
  for each in ${parameters[@]+"${parameters[@]}"}; do
    check_value --parameter "$each" '(AlarmEmail|RateLimit|TokenKeyArn|DeadLetterQueueName)=.*' \
      "AlarmEmail, RateLimit, TokenKeyArn or DeadLetterQueueName with = and a value"
  done
  [[ $create_queue = false || $queue_name != *.fifo ]] || die "--create-queue makes standard queues only, not $queue_name." 2
}

# --- Checks, before anything is changed -------------------------------------------------------------

check_tools() {
  local tool
  for tool in aws kubectl $([ "$mode" = delete ] || echo docker git) ${check:+curl}; do
    command -v "$tool" >/dev/null || problem "$tool is missing: install it."
  done
  [ "$mode" != delete ] || return 0
  ! command -v docker >/dev/null || ask "docker does not reach its engine: start it" docker info || true
  ! command -v git >/dev/null || check_checkout || true
  [[ ! $registry =~ ^([0-9]{12})\.dkr\.ecr\.([a-z0-9-]+)\.amazonaws\.com ]] ||
    [ "${BASH_REMATCH[1]}.${BASH_REMATCH[2]}" = "$account.$region" ] ||
    problem "The registry $registry is not the one of account $account in $region: correct ECR_REGISTRY, AWS_ACCOUNT_ID or --region."
}

check_checkout() { ask "$PWD is no git checkout: deploy from a clone" tag_of_image && tag=$answer; }

check_credentials() {
  command -v aws >/dev/null || return 1
  ask "AWS does not say whose the credentials are: run aws sso login or aws configure, or set AWS_PROFILE; if it was not reached, check the network and AWS_ENDPOINT_URL" \
    aws sts get-caller-identity --query '[Account, Arn]' --output text || return 1
  partition=${answer#*arn:} partition=${partition%%:*} answer=${answer%%[[:space:]]*}
  [ "$answer" = "$account" ] || {
    problem "The AWS credentials are of account $answer, not $account: set AWS_PROFILE, or correct AWS_ACCOUNT_ID."
    return 1
  }
}

# Sets stack_status to the stack's state, "" if there is none, and stack_values to lines of names and
# values: the parameters of the last run, and the outputs. Sets cluster, too, unless it is given.
read_stack() {
  stack_values=$(aws cloudformation describe-stacks --stack-name "$stack" --output text --query 'Stacks[0].[
    [[StackStatus]], Parameters[].[ParameterKey, ParameterValue], Outputs[].[OutputKey, OutputValue]][]') ||
    grep -q 'does not exist' "$work/error" || return 1
  stack_status=${stack_values%%$'\n'*}
  # All that a first deployment leaves which was refused at once.
  [ "$stack_status" != REVIEW_IN_PROGRESS ] || stack_status=""
  cluster=${cluster:-$(value_of ClusterName)}
}

check_stack() {
  local state="The stack $stack is in state $stack_status"
  case $mode:$stack_status in
    *_IN_PROGRESS) problem "$state: wait until the other deployment has ended, and run this again." ;;
    delete:*) ;;
    *:UPDATE_ROLLBACK_FAILED)
      problem "$state: run aws cloudformation continue-update-rollback --region $region --stack-name $stack, and this again."
      ;;
    *:ROLLBACK_* | *:DELETE_FAILED)
      problem "$state: see why in its events, run ./deploy.sh --delete with the same arguments, and deploy again."
      ;;
  esac
}

check_cluster() {
  answer=$(aws eks describe-cluster --name "$cluster" --query 'cluster.[status,identity.oidc.issuer]' \
    --output text 2>"$work/error") || {
    # The stack's own cluster may be gone already when it is deleted; any other name is a mistake.
    if [ "$mode:$cluster" != "delete:$(value_of ClusterName)" ] || ! grep -q ResourceNotFound "$work/error"; then
      problem "There is no cluster $cluster in $region: correct --cluster or --region ($(complaint))."
    fi
    return 1
  }
  issuer=${answer##*[[:space:]]} issuer=${issuer#https://}
  [[ $answer == ACTIVE[[:space:]]* ]] ||
    problem "The cluster $cluster is in state ${answer%%[[:space:]]*}: wait until it is ACTIVE."
  [ "$mode" != delete ] || return 0
  ask "AWS does not list the OIDC providers" aws iam list-open-id-connect-providers \
    --query 'OpenIDConnectProviderList[].Arn' --output text || return 0
  [[ $issuer != None && $'\t'$answer$'\t' == *":oidc-provider/$issuer"$'\t'* ]] ||
    problem "The cluster's OIDC provider is not registered in IAM: run eksctl utils associate-iam-oidc-provider --region $region --cluster $cluster --approve."
}

# Prints lines of what runs now. The kubeconfig is for this run alone; your own is only read.
read_cluster() {
  if [ -n "$context" ]; then
    kubectl config view --raw --flatten --minify --context "$context" >"$work/kubeconfig"
  else
    aws eks update-kubeconfig --name "$cluster" --kubeconfig "$work/kubeconfig" >/dev/null
  fi || return 1
  kube get ingressclass/alb "serviceaccount/$name-sa" "ingress/$name-ingress" "configmap/$name-config" "deployment/$name" \
    --ignore-not-found --output 'jsonpath={range .items[*]}{"running"}{.kind}{"\t"}{.spec.controller}{.metadata.annotations.eks\.amazonaws\.com/role-arn}{.metadata.annotations.alb\.ingress\.kubernetes\.io/certificate-arn}{.data.sqs_queue_url}{.spec.template.spec.containers[0].env[?(@.name=="TOKEN_SSM_PARAMETER")].value}{"\n"}{"paused\t"}{.spec.paused}{"\n"}{end}'
}

# The controller must be there, and nothing of another deployment, which would be replaced or deleted.
check_objects() {
  local owner
  command -v kubectl >/dev/null || return 0
  ask "kubectl does not reach the cluster $cluster: check the network, --cluster and --context, and that your role has access (aws eks list-access-entries --cluster-name $cluster)" \
    read_cluster || return 0
  running=$answer
  owner=$(value_of runningServiceAccount)
  if [[ ${owner:-:iam::$account:role/$role} != *":iam::$account:role/$role" ]]; then
    problem "The cluster $cluster belongs to another deployment, with the role $owner: correct --cluster or --environment."
  elif [ "$mode:$stack_status" = delete: ] && [ -n "$environment" ] &&
    [ -n "$(kube get namespace "$name" --ignore-not-found --output name)" ]; then
    problem "There is no stack $stack, so the namespace $name of $cluster may be another's: correct --environment or --cluster."
  fi
  [ "$mode" != delete ] || return 0
  # The class stands for the controller: EKS Auto Mode's own has no Deployment.
  [[ $(value_of runningIngressClass) =~ ^(ingress\.k8s\.aws|eks\.amazonaws\.com)/alb$ ]] ||
    problem "The cluster has no IngressClass alb of a load balancer controller: install the AWS Load Balancer Controller, which brings it; for EKS Auto Mode make it as SETUP.md says."
  [[ $(value_of paused) != *true* ]] ||
    problem "The Deployment is paused, so nothing would roll out: run kubectl --namespace $name rollout resume deployment/$name."
}

# Options that were not given: as what runs now, else as the stack, else as in --help. After a run that
# failed, the stack may be of another queue, and have more tokens, than what runs.
complete_options() {
  queue=$(value_of runningConfigMap)
  queue=${queue_name:-${queue##*/}} queue=${queue:-$(value_of QueueName)} queue=${queue:-dev-CP-queue}
  tokens=${token_parameter:-$(value_of runningDeployment)}
  tokens=${tokens:-$(value_of TokenParameterArns | sed 's/arn:[^,]*:parameter//g')}
  tokens=${tokens:-/email-service/${environment:+$environment/}api-token}
  certificate_arn=${certificate_arn:-$(value_of runningIngress)}
  [ "$certificate_arn" != none ] || certificate_arn=""
  [ "$queue" != "$(value_of QueueName)" ] || ours=$(value_of CreateQueue) dead_letters=$(value_of DeadLetterQueueName)
}

check_certificate() {
  [ -n "$certificate_arn" ] || return 0
  [ "$check" != alb ] ||
    problem "--check alb does for HTTP alone, and the certificate is the domain's: give --check https://DOMAIN."
  ask "AWS does not show the certificate $certificate_arn: correct --certificate-arn" aws acm describe-certificate \
    --certificate-arn "$certificate_arn" --query Certificate.Status --output text || return 0
  [ "$answer" = ISSUED ] || problem "The certificate $certificate_arn is not ISSUED but $answer: wait until it is validated."
}

check_queue() {
  local url
  if url=$(sqs get-queue-url --queue-name "$queue" --query QueueUrl --output text 2>"$work/error"); then
    [ "$create_queue" = false ] || [ "$ours" = true ] ||
      problem "The queue $queue exists already: leave out --create-queue, or give another --queue-name."
    if [ "$ours" = true ] || [[ $dead_letters ]] || [[ ${parameters[*]-} == *DeadLetterQueueName=* ]]; then return; fi
    ask "AWS does not show the queue $queue" sqs get-queue-attributes --queue-url "$url" \
      --attribute-names RedrivePolicy --query Attributes.RedrivePolicy --output text || return 0
    dead_letters=$(sed -nE 's/.*"arn:[^"]*:([^":]+)".*/\1/p' <<<"$answer")
    [[ $dead_letters ]] ||
      say "note: the queue $queue has no dead-letter queue, so the alarm DeadLetterQueueNotEmpty watches nothing"
  elif ! grep -qiE 'NonExistentQueue|does not exist' "$work/error"; then
    problem "AWS does not show the queue $queue ($(complaint))."
  elif [ "$create_queue" = false ]; then
    problem "There is no queue $queue in $region: add --create-queue, or correct --queue-name."
  fi
}

# Sets token_found to the first of the parameters that exists, "" if none does.
check_token() {
  local parameter
  for parameter in ${tokens//,/ }; do
    if aws ssm get-parameter --name "$parameter" --query Parameter.Type >/dev/null 2>"$work/error"; then
      token_found=${token_found:-$parameter}
    elif grep -q ParameterNotFound "$work/error"; then
      say "note: there is no token parameter $parameter"
    else
      problem "AWS does not show the token parameter $parameter ($(complaint))."
      return 0
    fi
  done
  # A random token in place of a mistyped name would cut off every client of a service that runs.
  [[ -n $token_found${API_TOKEN:+given} || -z $stack_status || -t 0 ]] ||
    problem "There is no token parameter ${tokens%%,*}: correct --token-parameter, or give its value in API_TOKEN."
}

preflight() {
  step "check tools, credentials and cluster"
  check_tools
  if check_credentials; then
    read_stack 2>"$work/error" || problem "AWS does not show the stack $stack ($(complaint))."
    cluster=${cluster:-dev-CP-EKS-CLUSTER}
    check_stack
    if check_cluster; then check_objects; fi
    complete_options
    if [ "$mode" != delete ]; then
      check_token
      check_queue
      check_certificate
      stack_options
    fi
  fi
  [ ${#problems[@]} -eq 0 ] || {
    printf '      - %s\n' "${problems[@]}" >&2
    die "${#problems[@]} problem(s), listed above; nothing was changed. Solve them and run this again."
  }
}

# --- Stack ------------------------------------------------------------------------------------------

# Parameters that are not named keep their value.
deploy_stack() {
  aws cloudformation deploy --stack-name "$stack" --template-file infra/email-processor.yaml --tags "service=$name" \
    --capabilities CAPABILITY_NAMED_IAM --no-fail-on-empty-changeset --parameter-overrides "$@" >"$work/log" 2>&1 || {
    grep -v '^[[:space:]]*$' "$work/log" | tail -n 5 >&2
    aws cloudformation describe-stack-events --stack-name "$stack" --output text \
      --query "StackEvents[?ends_with(ResourceStatus, 'FAILED')].[LogicalResourceId, ResourceStatusReason]" \
      2>/dev/null | head -n 10 >&2 || true
    die "The stack $stack was not deployed, for the reasons above. Correct them and run this again."
  }
}

# The items of two lists, separated by commas, each once.
join() { tr , '\n' <<<"$1,$2" | awk 'NF && !seen[$0]++' | paste -s -d , -; }

# Sets token_arns and queue_arn to what the new pods need, and parameters to what the stack gets. Old
# pods run beside the new ones, so the role keeps what it may use until the last step.
stack_options() {
  local arn=arn:$partition:ssm:$region:$account:parameter
  token_arns=$arn${tokens//,/,$arn} queue_arn=arn:$partition:sqs:$region:$account:$queue
  [ "$ours" != true ] || create_queue=true
  parameters=("ClusterName=$cluster" "OidcProvider=$issuer" "EnvironmentName=$environment"
    "QueueName=$queue" "CreateQueue=$create_queue" "DeadLetterQueueName=$dead_letters"
    "QueueArns=$(join "$(value_of QueueArns)" "$queue_arn")"
    "TokenParameterArns=$(join "$(value_of TokenParameterArns)" "$token_arns")"
    ${parameters[@]+"${parameters[@]}"})
}

# --- Token ------------------------------------------------------------------------------------------

# The value of a new parameter. It stays in this subshell and in a pipe: arguments, exported variables
# and the shell's trace can be seen by others.
token() (
  { set +x; } 2>/dev/null
  given=${API_TOKEN:-}
  if [ -z "$given" ] && [ -t 0 ]; then
    read -rsp "      Token for $token_found (nothing: make one up): " given
    echo >&2
  fi
  token=${given#"${given%%[![:space:]]*}"} token=${token%"${token##*[![:space:]]}"}
  [ "$token" = "$given" ] || echo "deploy.sh: warning: white space around the token is left out." >&2
  [ -n "$token" ] || token=$(head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n')
  printf %s "$token"
)

make_token() {
  local key
  [ -z "$token_found" ] || {
    say "keep $token_found"
    return
  }
  token_found=${tokens%%,*} key=$(value_of TokenKeyArn)
  token | AWS_CLI_FILE_ENCODING=UTF-8 must "AWS does not make the token parameter $token_found" \
    aws ssm put-parameter --name "$token_found" --type SecureString --value file:///dev/stdin \
    --tags "Key=made-by-stack,Value=$stack" ${key:+--key-id "$key"} >/dev/null
  say "made $token_found; clients need its value: aws ssm get-parameter --with-decryption --region $region --name $token_found"
}

# --- Image ------------------------------------------------------------------------------------------

# Prints the image's tag: the commit, for a changed checkout with what the image is made of, and the
# platform if it is not the usual one, because the repository's tags are immutable.
tag_of_image() {
  local tag files=(.dockerignore Dockerfile app.py gunicorn.conf.py openapi.yaml requirements.txt)
  tag=$(git rev-parse --short=12 HEAD) || return 1
  [ -z "$(git --no-optional-locks status --porcelain)" ] ||
    tag+=-dirty-$(cat "${files[@]}" | git hash-object --stdin | cut -c 1-12)
  [ "$platform" = linux/amd64 ] || tag+=-${platform##*/}
  echo "$tag"
}

# Sets image to the repository with the tag's digest: docker knows it here, ECR that of an image from elsewhere.
find_digest() {
  image=$(docker image inspect --format '{{range .RepoDigests}}{{println .}}{{end}}' "$repository:$tag" |
    grep -F "$repository@sha256:" | head -n 1) && return
  image=$(aws ecr describe-images --repository-name "${repository#*/}" --image-ids "imageTag=$tag" \
    --query 'imageDetails[0].imageDigest' --output text) && [[ $image == sha256:* ]] && image=$repository@$image
}

push_image() {
  # The login of another registry is yours.
  [[ $registry != *.dkr.ecr.* ]] || must "AWS gives no password for $registry" aws ecr get-login-password |
    quietly docker login --username AWS --password-stdin "$registry" ||
    die "docker does not log in to $registry, for the reasons above. Correct them and run this again."
  if docker pull --quiet --platform "$platform" "$repository:$tag" >/dev/null 2>&1 && find_digest; then
    say "keep $repository:$tag, which the registry has"
    return
  fi
  quietly docker build --platform "$platform" --tag "$repository:$tag" . ||
    die "The image was not built, for the reasons above. Correct them and run this again."
  if ! quietly docker push "$repository:$tag" || ! find_digest; then
    die "The image was not pushed to $repository, for the reasons above. Correct them and run this again."
  fi
  say "pushed $image"
}

# --- Manifests --------------------------------------------------------------------------------------

# Sets manifests to k8s/ with all that differs between accounts, and before and after to its parts. The
# Deployment is the last and is applied alone: the ALB's readiness gate goes only into pods that come
# after Service and Ingress, and what is refused stops the run before a roll-out has begun.
render() {
  local alb=alb.ingress.kubernetes.io annotations="" separator=$'\n---\n' queue_url checksum web_acl
  queue_url=https://sqs.$region.amazonaws.com
  [[ $region != cn-* ]] || queue_url+=.cn
  queue_url+=/$account/$queue web_acl=$(value_of WebAclArn)
  [ -z "$certificate_arn" ] || annotations="$alb/certificate-arn: '$certificate_arn', $alb/ssl-redirect: '443',
        $alb/listen-ports: '[{\"HTTP\": 80}, {\"HTTPS\": 443}]', $alb/ssl-policy: ELBSecurityPolicy-TLS13-1-2-Res-2021-06,"
  [ -z "$web_acl" ] || annotations+=" $alb/wafv2-acl-arn: '$web_acl'"
  # Pods read the ConfigMap only when they start, so a change of it has to be a change of theirs.
  checksum=$(git hash-object --stdin <<<"$queue_url $region")
  cp -R k8s "$work/k8s"
  cat >"$work/kustomization.yaml" <<END
sortOptions: {order: fifo}
resources: [k8s]
patches:
  - patch: |
      {apiVersion: v1, kind: ConfigMap, metadata: {name: $name-config, namespace: $name},
        data: {sqs_queue_url: '$queue_url', aws_region: '$region'}}
  - patch: |
      {apiVersion: v1, kind: ServiceAccount, metadata: {name: $name-sa, namespace: $name,
        annotations: {eks.amazonaws.com/role-arn: 'arn:$partition:iam::$account:role/$role'}}}
  - patch: |
      {apiVersion: networking.k8s.io/v1, kind: Ingress, metadata: {name: $name-ingress, namespace: $name,
        annotations: {$annotations}}}
  - patch: |
      {apiVersion: apps/v1, kind: Deployment, metadata: {name: $name, namespace: $name}, spec: {template: {
        metadata: {annotations: {checksum/config: '$checksum'}}, spec: {containers: [{name: $name,
        image: '$image', env: [{name: TOKEN_SSM_PARAMETER, value: '$tokens'}]}]}}}}
END
  must "kubectl does not build the manifests of k8s/; restore them with git checkout k8s" \
    kubectl kustomize "$work" >"$work/manifests"
  manifests=$(<"$work/manifests")
  before=${manifests%"$separator"*} after=${manifests##*"$separator"}
}

apply() {
  quietly kube apply -f - <<<"$1" || stop "The manifests were not all applied, for the reasons above"
  grep -v ' unchanged$' "$work/log" | indent || true
}

# Keeps what runs in files, empty ones if nothing does.
read_objects() {
  kube get "configmap/$name-config" --ignore-not-found --output json >"$work/configmap" &&
    kube get "deployment/$name" --ignore-not-found --output json >"$work/deployment"
}

apply_manifests() {
  local i
  render
  must "kubectl does not show what runs" read_objects
  # What apply prints does not tell: it calls a PodDisruptionBudget "configured" each time.
  if kube diff -f - <<<"$manifests" >/dev/null 2>&1; then
    say "nothing to change"
    return
  fi
  undo=yes
  apply "$before"
  # The gate needs the controller's TargetGroupBinding, a few seconds after the Ingress. Going on without
  # it costs no more than the gate of the first pods.
  for ((i = 0; i < 30; i++)); do
    [ -z "$(kube get targetgroupbindings --output name 2>&1)" ] || break
    sleep 2
  done
  apply "$after"
  # The autoscaler would bring the second pod only after the roll-out of the first.
  [ -s "$work/deployment" ] || quietly kube scale "deployment/$name" \
    --replicas "$(kube get "hpa/$name-hpa" --output 'jsonpath={.spec.minReplicas}')" || true
}

# --- Roll-out ---------------------------------------------------------------------------------------

# It ends when for progressDeadlineSeconds nothing has gone on. A limit to the whole would undo the
# healthy roll-out of many pods.
rollout() { kube rollout status "deployment/$name" 2>&1 | indent; }

# The autoscaler's events would crowd out those of the pods.
show_reasons() {
  local newest
  kube get pods --output wide
  kube get events --field-selector type!=Normal,involvedObject.kind!=HorizontalPodAutoscaler \
    --sort-by .lastTimestamp | tail -n 15
  newest=$(kube get pods --sort-by .metadata.creationTimestamp --output name | tail -n 1)
  kube logs "$newest" --all-containers --tail 20
  kube logs "$newest" --all-containers --tail 20 --previous
}

# Puts an object back as it was read, whole: kubectl rollout undo knows the pods' template alone. --raw,
# because else kubectl would note all of it as applied, and the next apply take the number of pods away.
put_back() {
  [ ! -s "$work/$1" ] || kube patch --local -f "$work/$1" --type merge --patch "$3" --output json 2>/dev/null |
    quietly kube replace --raw "$2" -f -
}

go_back() {
  local api="namespaces/$name" anew='"metadata": {"resourceVersion": null}' replicas
  put_back configmap "/api/v1/$api/configmaps/$name-config" "{$anew}" || true
  # The autoscaler may have changed their number since.
  replicas=$(kube get "deployment/$name" --output 'jsonpath={.spec.replicas}') &&
    put_back deployment "/apis/apps/v1/$api/deployments/$name" "{$anew, \"spec\": {\"replicas\": $replicas}}"
}

# Ends the run, after going back to what ran before if anything was applied.
stop() {
  local failed=$1 status=${2:-1}
  trap '' INT TERM HUP # a second Ctrl-C must not leave half of it
  [ "$undo" = yes ] || die "$failed. Run this again." "$status"
  grep -q '"NewReplicaSetAvailable"' "$work/deployment" ||
    die "$failed. No roll-out has succeeded before, so there is nothing to go back to. Correct it and run this again." "$status"
  if go_back && trap - INT TERM HUP && rollout; then
    die "$failed, and the deployment was undone: what ran before serves again. Correct it and run this again." "$status"
  fi
  die "$failed, and so did going back to what ran before. See kubectl --namespace $name describe deployment $name." "$status"
}

# --- ALB --------------------------------------------------------------------------------------------

has_alb() {
  host=$(kube get ingress "$name-ingress" --output 'jsonpath={.status.loadBalancer.ingress[0].hostname}') && [ -n "$host" ]
}

# Tries the service from outside. A new ALB and its name need some minutes.
try_service() {
  local url=${check%/}
  [ -n "$host" ] || return 1
  [ "$check" != alb ] || url=http://$host
  # -q: a .curlrc might change what is sent.
  wait_until curl -q --silent --show-error --fail --max-time 10 --output /dev/null "$url/health" || {
    echo "$url/health does not answer after $timeout s ($(complaint))." >&2
    return 1
  }
  TOKEN_SSM_PARAMETER=$token_found ./test.sh "$url" 2>&1 | indent
}

# The alarms on the ALB name it, so they are made when it is known. The role keeps what new pods need.
finish_stack() {
  local balancer="" group=""
  parameters=("QueueArns=$queue_arn" "TokenParameterArns=$token_arns")
  [ -z "$host" ] || balancer=$(aws elbv2 describe-load-balancers --output text \
    --query "LoadBalancers[?DNSName=='$host'].LoadBalancerArn") || balancer=""
  [ -z "$balancer" ] || group=$(aws elbv2 describe-target-groups --load-balancer-arn "$balancer" --output text \
    --query 'TargetGroups[0].TargetGroupArn') || group=""
  if [[ $group == arn:* ]]; then
    parameters+=("LoadBalancerFullName=${balancer#*:loadbalancer/}" "TargetGroupFullName=${group##*:}")
  elif [ -n "$host" ]; then
    echo "deploy.sh: warning: AWS does not show the load balancer $host yet, so its alarms are not made. Run this again in a minute." >&2
  fi
  deploy_stack "${parameters[@]}"
}

# --- What can be done -------------------------------------------------------------------------------

deploy() {
  preflight
  step "deploy the stack $stack"
  deploy_stack "${parameters[@]}"
  must "AWS does not show the stack $stack" read_stack
  step "make the token parameter, if there is none"
  make_token
  step "build and push the image $repository:$tag"
  push_image
  step "apply the manifests of k8s/ to $cluster"
  apply_manifests
  step "wait for the roll-out"
  rollout || {
    show_reasons >&2 || true
    stop "The roll-out failed, for the reasons above"
  }
  [ -n "$check" ] || undo=no
  step "wait for the ALB"
  wait_until has_alb || {
    kube get events --field-selector "involvedObject.name=$name-ingress" --sort-by .lastTimestamp >&2 || true
    echo "There is no ALB after $timeout s." >&2
  }
  if [ -n "$check" ]; then
    step "check the service at $check"
    try_service || stop "The check failed, for the reasons above"
    undo=no
  fi
  step "make the alarms of the ALB, and take away the rights of what ran before"
  finish_stack
  [ -n "$host" ] ||
    die "The service runs, but has no ALB. See kubectl --namespace $name describe ingress $name-ingress and the controller's log, and run this again."
  if [ -n "$certificate_arn" ]; then
    say "point the certificate's domain at this host with a CNAME or alias record; clients use the domain"
  fi
  echo "Deployed in $SECONDS s: http${certificate_arn:+s}://$host"
}

dry_run() {
  preflight
  cat <<END
Would deploy the stack $stack (${stack_status:-there is none yet}) with ${parameters[*]};
$([ -n "$token_found" ] && echo keep || echo make) the token parameter ${token_found:-${tokens%%,*}};
build and push $repository:$tag, unless the registry has it;
apply to $cluster, with ${certificate_arn:-no certificate}, what --render prints;
wait for the roll-out and the ALB${check:+, check the service at $check}, and undo the roll-out if it fails;
make the alarms of the ALB, and take away the rights of what ran before.
Nothing was changed.
END
}

# Standard output is for the manifests alone. What AWS and the cluster cannot say yet is taken from the
# names of a first run; but in place of real ones, those would lead the service elsewhere.
print_manifests() {
  check_checkout || die "${problems[0]}"
  if command -v aws >/dev/null; then
    check_credentials || die "${problems[0]}"
    must "AWS does not show the stack $stack" read_stack
  fi
  cluster=${cluster:-dev-CP-EKS-CLUSTER}
  running=$(read_cluster 2>"$work/error") || [ -n "$certificate_arn" ] || [ -z "$stack_status" ] ||
    die "The cluster $cluster does not tell its certificate, without which tokens might travel in clear text ($(complaint)). Correct --cluster or --context, or give --certificate-arn (none for HTTP)."
  [ -n "$stack_status$running" ] ||
    echo "deploy.sh: note: neither the stack $stack nor the cluster can be asked, so names are those of a first run." >&2
  complete_options
  find_digest 2>/dev/null || {
    image=$repository:$tag
    echo "deploy.sh: note: neither docker here nor ECR knows a digest of the image, so it is named by its tag; deploy it first." >&2
  }
  render
  echo "$manifests"
}

delete_all() {
  local queues parameter made url
  preflight
  step "delete the Ingress, with its ALB, and the namespace $name"
  # The controller must remove the ALB before the namespace, with which its finalizer would wait.
  if [ -z "$issuer" ]; then
    say "there is no cluster $cluster any more; see whether it has left an ALB behind"
  elif ! { quietly kube delete ingress "$name-ingress" --ignore-not-found --timeout "${timeout}s" &&
    quietly kube delete namespace "$name" --ignore-not-found --timeout "${timeout}s"; }; then
    die "Not all was deleted from the cluster, for the reasons above. See the log of the load balancer controller, and run this again."
  fi
  step "delete the token parameter, if it was made here"
  for parameter in ${tokens//,/ }; do
    made=$(aws ssm list-tags-for-resource --resource-type Parameter --resource-id "$parameter" \
      --query "TagList[?Key=='made-by-stack'].Value" --output text 2>/dev/null) || made=""
    [ "$made" = "$stack" ] || continue
    must "AWS does not delete the token parameter $parameter" aws ssm delete-parameter --name "$parameter"
    say "deleted $parameter"
  done
  step "delete the stack $stack"
  [ -n "$stack_status" ] || {
    say "there is none"
    return
  }
  queues=$(aws cloudformation describe-stack-resources --stack-name "$stack" --output text \
    --query "StackResources[?ResourceType=='AWS::SQS::Queue'].PhysicalResourceId" 2>/dev/null) || queues=""
  must "AWS does not delete the stack $stack" aws cloudformation delete-stack --stack-name "$stack"
  must "The stack $stack is not deleted; see aws cloudformation describe-stack-events --region $region --stack-name $stack" \
    aws cloudformation wait stack-delete-complete --stack-name "$stack"
  for url in $queues; do
    say "kept $url with its messages; to delete it: aws sqs delete-queue --region $region --queue-url $url"
  done
}

mode=deploy region=${AWS_REGION:-us-west-1} environment="" cluster="" context="" queue_name="" create_queue=false
certificate_arn="" token_parameter="" parameters=() platform=linux/amd64 timeout=300 check=""
read_arguments "$@"
check_arguments

name=email-processor # of the stack, the repository, the namespace and what is in it
# As infra/email-processor.yaml names them.
stack=$name${environment:+-$environment} role=$name-role${environment:+-$environment} repository=$registry/$stack
number=0 steps=8 problems=() stack_status="" stack_values="" running="" partition=aws issuer=""
queue="" ours="" dead_letters="" token_found="" undo=no
case $mode in
  deploy) [ -z "$check" ] || steps=9 ;;
  delete) steps=4 ;;
  *) steps=1 ;;
esac

# Only the shell itself needs it, not every tool that is started.
export -n API_TOKEN
export AWS_REGION=$region AWS_DEFAULT_REGION=$region AWS_PAGER=""
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'stop Interrupted 130' INT TERM HUP

case $mode in
  deploy) deploy ;;
  dry-run) dry_run ;;
  render) print_manifests ;;
  delete)
    delete_all
    echo "Deleted."
    ;;
esac
