#!/usr/bin/env bash
# Deploy the service, from this checkout to a serving ALB. See --help.
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: ./deploy.sh ECR_REGISTRY AWS_ACCOUNT_ID [options]

Deploys infra/email-processor.yaml, makes the token parameter if there is none, builds and pushes an
image tagged by the commit, applies k8s/ and waits until the new release serves. If a step of the
rollout fails, the earlier release is restored. A second run applies only the changes. An omitted
cluster, queue, certificate, token parameter or --parameter keeps its value.

Instead of deploying:
  --dry-run                check everything and print the changes; nothing is changed
  --render                 print the manifests, for kubectl apply -f -
  --delete                 remove everything that this script made, except queues

Options (in parentheses the value of the first run):
  --region REGION          AWS region (AWS_REGION, else us-west-1)
  --environment NAME       a second deployment in the account, with a separate cluster and token
  --cluster NAME           EKS cluster (dev-CP-EKS-CLUSTER)
  --context NAME           reach the cluster through this context of your kubeconfig
  --queue-name NAME        SQS queue (dev-CP-queue)
  --create-queue           make the queue, with a dead-letter queue
  --certificate-arn ARN    serve HTTPS with this ACM certificate; none: serve HTTP again
  --token-parameter NAMES  SSM parameters of the tokens, separated by commas (/email-service/api-token)
  --parameter KEY=VALUE    AlarmEmail, RateLimit, TokenKeyArn or DeadLetterQueueName of the template
  --platform PLATFORM      platform of the nodes (linux/amd64)
  --timeout SECONDS        how long to wait for the ALB, its first response, and each removal (300)
  --check URL              run ./test.sh URL, and undo the rollout if it fails; alb: the ALB's host, by HTTP

API_TOKEN is the value of a new token parameter. Without it, a first run makes a random token.

Exit status: 0 when the service runs, 1 for a failure, 2 for a wrong argument, 130 when interrupted.
HELP
}

# --- Helpers ----------------------------------------------------------------------------------------

# Ends the run with a reason and an exit status. finish prints the reason.
die() { failure=$1 && exit "${2:-1}"; }
say() { printf '      %s\n' "$1"; }
# Indents lines and drops repeated ones. sed and uniq would delay them in a buffer.
indent() {
  local line last=""
  while IFS= read -r line; do
    [ "$line" = "$last" ] || say "$line"
    last=$line
  done
}
kube() { kubectl ${context:+--context "$context"} --namespace "$name" "$@"; }
# Prints a field of an object in the cluster, or nothing if the object or the field is missing.
live() { kube get "$1" --ignore-not-found --output "jsonpath={$2}"; }
# Prints a parameter or an output of the stack. Emulators of AWS print lists in brackets.
value_of() { awk -F '\t' -v key="$1" '$1 == key { gsub(/[]\[ \047]/, "", $2); print $2 }' <<<"$stack_values"; }

step() {
  number=$((number + 1)) doing=$1
  printf '[%d/%d] %d:%02d %s\n' "$number" "$steps" $((SECONDS / 60)) $((SECONDS % 60)) "$1"
}

problem() { problems+=("$1"); }
# Prints the last line that a command has written to $work/error.
last_error() { grep -v '^[[:space:]]*$' "$work/error" | tail -n 1 || true; }
# Sets response to a command's output. If the command fails, records the first argument as a problem.
ask() { response=$("${@:2}" 2>"$work/error") || { problem "$1 ($(last_error))." && return 1; }; }
# Runs a verbose command, and shows the end of its output only if it fails.
quietly() { "$@" >"$work/log" 2>&1 || { tail -n 20 "$work/log" >&2 && return 1; }; }

# Retries a command until it succeeds, for $1 seconds after its first failure. Final errors are not retried.
wait_until() {
  local end="" final='progress deadline|changed meanwhile|NotFound|denied|forbidden|unauthorized|expired|credentials'
  until "${@:2}" 2>"$work/error"; do
    end=${end:-$((SECONDS + $1))}
    if [ "$SECONDS" -ge "$end" ] || grep -qiE "$final" "$work/error"; then
      cat "$work/error" >&2
      return 1
    fi
    sleep 3
  done
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
        # The AWS CLI ignores a parameter that the template does not have.
        [ "$option" != parameter ] || { parameters+=("$2") && check_value --parameter "$2" \
          '(AlarmEmail|RateLimit|TokenKeyArn|DeadLetterQueueName)=.*' "one of --help"; }
        shift
        ;;
      -*) die "Unknown option '$1'; see --help." 2 ;;
      *) arguments+=("$1") ;;
    esac
    shift
  done
  [ ${#arguments[@]} -eq 2 ] || die "ECR_REGISTRY and AWS_ACCOUNT_ID are needed, and no other argument; see --help." 2
  registry=${arguments[0]} account=${arguments[1]} tokens=${token_parameter//[[:space:]]/}
}

check_value() { [[ $2 =~ ^($3)$ ]] || die "$1 '$2' is not $4; see --help." 2; }

# AWS or the template rejects other wrong values before anything is changed.
check_arguments() {
  local path='(/[A-Za-z0-9_.-]+)+'
  check_value ECR_REGISTRY "$registry" '[a-z0-9.-]+(:[0-9]+)?' "a registry's host name"
  check_value AWS_ACCOUNT_ID "$account" '[0-9]{12}' "an account's 12 digits"
  check_value --region "$region" '[a-z]{2,}(-[a-z]+)+-[0-9]+' "a region such as us-west-1"
  check_value --token-parameter "$tokens" "($path(,$path)*)?" "a name such as /email-service/api-token, or several"
  check_value --timeout "$timeout" '[1-9][0-9]{0,4}' "a number of seconds"
  check_value --check "$check" '(alb|https?://[^[:space:]]+)?' "a URL, or alb"
}

# --- Checks, before anything is changed -------------------------------------------------------------

check_tools() {
  local tool
  for tool in aws kubectl $([ "$mode" = delete ] || echo docker git) ${check:+curl}; do
    command -v "$tool" >/dev/null || problem "$tool is missing: install it."
  done
  [ "$mode" != delete ] || return 0
  ask "docker does not reach its engine: start it" docker info || true
  ask "docker has no buildx: install it" docker buildx version || true
  [[ ! $registry =~ ^([0-9]{12})\.dkr\.ecr\.([a-z0-9-]+)\. || "${BASH_REMATCH[*]:1}" = "$account $region" ]] ||
    problem "The registry $registry is not that of account $account in $region: correct one of them."
}

check_credentials() {
  ask "The AWS credentials do not work: run aws sso login or aws configure, or set AWS_PROFILE" \
    aws sts get-caller-identity --query Account --output text || return 1
  [ "$response" = "$account" ] ||
    { problem "The AWS credentials are of account $response, not $account: set AWS_PROFILE." && return 1; }
}

# Prints the names and values of the stack's parameters and outputs, or nothing if there is no stack.
show_stack() {
  aws cloudformation describe-stacks --stack-name "$stack" --output text --query 'Stacks[0].[
    Parameters[].[ParameterKey, ParameterValue], Outputs[].[OutputKey, OutputValue]][]' 2>"$work/stack" ||
    grep -q 'does not exist' "$work/stack" || { cat "$work/stack" >&2 && return 1; }
}

# Reads the deployed settings. Without --context, a temporary kubeconfig leads to the cluster.
read_cluster() {
  local alb='.metadata.annotations.alb\.ingress\.kubernetes\.io'
  if [ -z "$context" ]; then
    export KUBECONFIG=$work/kubeconfig
    aws eks update-kubeconfig --name "$cluster" >/dev/null || return
  fi
  controller=$(live ingressclass/alb .spec.controller) && paused=$(live "deployment/$name" .spec.paused) &&
    replicas=$(live "deployment/$name" .spec.replicas) &&
    live_role=$(live "serviceaccount/$name-sa" '.metadata.annotations.eks\.amazonaws\.com/role-arn') &&
    live_certificate=$(live "ingress/$name-ingress" "$alb/certificate-arn") &&
    live_queue=$(live "configmap/$name-config" .data.sqs_queue_url) &&
    live_tokens=$(live "deployment/$name" \
      '.spec.template.spec.containers[0].env[?(@.name=="TOKEN_SSM_PARAMETER")].value')
}

# Another deployment's objects must not be replaced or deleted, and the cluster must be able to make an ALB.
check_cluster() {
  local own_role=:iam::$account:role/$role
  response=$(aws eks describe-cluster --name "$cluster" --query cluster.identity.oidc.issuer \
    --output text 2>"$work/error") || {
    # --delete must work after the stack's cluster was deleted. Any other missing cluster is a mistake.
    [[ $mode:$cluster = "delete:$(value_of ClusterName)" && $(last_error) == *ResourceNotFound* ]] ||
      problem "AWS does not show the cluster $cluster in $region: correct --cluster or --region ($(last_error))."
    return 0
  }
  issuer=${response#https://}
  read_cluster 2>"$work/error" ||
    { problem "kubectl does not reach the cluster $cluster: check --context and access ($(last_error))." && return; }
  [[ ${live_role:-$own_role} == *"$own_role" ]] ||
    problem "The cluster $cluster belongs to another deployment, of $live_role: correct --cluster or --environment."
  [ "$mode" != delete ] || return 0
  # EKS Auto Mode has no Deployment of the controller, but both kinds of controller have an IngressClass.
  [[ $controller =~ ^(ingress\.k8s\.aws|eks\.amazonaws\.com)/alb$ ]] ||
    problem "The cluster has no IngressClass alb: install the AWS Load Balancer Controller; for Auto Mode see SETUP.md."
  [ "$paused" != true ] ||
    problem "The Deployment is paused: run kubectl --namespace $name rollout resume deployment/$name."
  [ "$replicas" != 0 ] || say "note: $stopped"
  [[ $replicas != 0 || -z $check ]] || problem "A stopped service cannot pass --check: start it, or leave out --check."
  ask "AWS does not list the OIDC providers" aws iam list-open-id-connect-providers --output text \
    --query "OpenIDConnectProviderList[?ends_with(Arn, ':oidc-provider/$issuer')].Arn" || return 0
  [ -n "$response" ] || problem "The cluster's OIDC provider is not registered in IAM: \
run eksctl utils associate-iam-oidc-provider --region $region --cluster $cluster --approve."
}

# Order of precedence: the option, the cluster, the stack, the default. After a failed run, the stack has
# values that no pod uses.
complete_options() {
  queue=${queue_name:-${live_queue##*/}} queue=${queue:-$(value_of QueueName)} queue=${queue:-dev-CP-queue}
  queue_url=https://sqs.$region.$dns_suffix/$account/$queue
  tokens=${tokens:-$live_tokens}
  tokens=${tokens:-$(value_of TokenParameterArns | sed 's/arn:[^,]*:parameter//g')}
  tokens=${tokens:-/email-service/${environment:+$environment/}api-token}
  certificate_arn=${certificate_arn:-$live_certificate}
  [ "$certificate_arn" != none ] || certificate_arn=""
}

# Sets token_found to the first existing token parameter.
check_token() {
  local names
  read -ra names <<<"${tokens//,/ }"
  ask "AWS does not show the token parameters" aws ssm get-parameters --names "${names[@]}" \
    --query '[Parameters[0].Name, InvalidParameters]' --output text || return 0
  token_found=${response%%[[:space:]]*}
  [ "$token_found" != None ] || token_found=""
  [[ $response != *$'\n'* ]] || say "note: there is no token parameter ${response#*$'\n'}"
  # The service runs, so the name is mistyped: a new random token would lock out every client.
  [[ -n $token_found || -n ${API_TOKEN:+given} || -z $(value_of RoleArn) ]] ||
    problem "There is no token parameter ${tokens%%,*}: correct --token-parameter, or give its value in API_TOKEN."
}

# Sets dead_letters to the queue's dead-letter queue, and create_queue if the stack has made the queue.
check_queue() {
  # Version 1 of the CLI ignores AWS_ENDPOINT_URL for SQS.
  local redrive inspect=(aws sqs get-queue-attributes ${AWS_ENDPOINT_URL:+--endpoint-url "$AWS_ENDPOINT_URL"}
    --queue-url "$queue_url" --attribute-names RedrivePolicy --query Attributes.RedrivePolicy --output text)
  if [ "$queue" = "$(value_of QueueName)" ]; then
    dead_letters=$(value_of DeadLetterQueueName)
    [ "$(value_of CreateQueue)" = false ] || { create_queue=true && return; }
  fi
  if [ "$create_queue" = true ]; then
    [[ $queue != *.fifo ]] || problem "--create-queue makes standard queues only, not $queue."
    ! "${inspect[@]}" >/dev/null 2>&1 || problem "The queue $queue exists already: leave out --create-queue."
    return 0
  fi
  ask "AWS does not show the queue $queue: add --create-queue, or correct --queue-name" "${inspect[@]}" || return 0
  redrive=$(sed -nE 's/.*"arn:[^"]*:([^":]+)".*/\1/p' <<<"$response") dead_letters=${redrive:-$dead_letters}
  [ -n "$dead_letters" ] || say "note: the queue has no dead-letter queue, so DeadLetterQueueNotEmpty watches nothing"
}

check_certificate() {
  [ -n "$certificate_arn" ] || return 0
  [ "$check" != alb ] || problem "--check alb only works with HTTP: give --check https:// and the certificate's domain."
  ask "AWS does not show the certificate $certificate_arn: correct --certificate-arn" aws acm describe-certificate \
    --certificate-arn "$certificate_arn" --query Certificate.Status --output text || return 0
  [ "$response" = ISSUED ] || problem "The certificate is not ISSUED but $response: wait until it is validated."
}

preflight() {
  step "check tools, credentials and cluster"
  check_tools
  if check_credentials && ask "AWS does not show the stack $stack" show_stack; then
    stack_values=$response
    cluster=${cluster:-$(value_of ClusterName)} cluster=${cluster:-dev-CP-EKS-CLUSTER}
    check_cluster
    complete_options
    if [ "$mode" != delete ]; then
      check_token
      check_queue
      check_certificate
    fi
  fi
  [ ${#problems[@]} -eq 0 ] || {
    printf '      - %s\n' "${problems[@]}" >&2
    die "${#problems[@]} problem(s), listed above; nothing was changed. Solve them and run this again."
  }
  [ "$mode" = delete ] || find_tag
}

# Sets commit and tag. Tags are immutable, so a tag also names uncommitted changes and another platform.
find_tag() {
  commit=$(git describe --always --exclude '*' --abbrev=40 --dirty)
  tag=${commit:0:12}
  [[ $commit != *-dirty ]] || tag+=-dirty-$(git diff --no-ext-diff HEAD | git hash-object --stdin | cut -c 1-12)
  [ "$platform" = linux/amd64 ] || tag+=-${platform##*/}
}

# --- Stack, token and image -------------------------------------------------------------------------

# Prints the union of two comma-separated lists.
join() { tr , '\n' <<<"$1,$2" | awk 'NF && !seen[$0]++' | paste -s -d , -; }

# Sets the parameters of the stack. Old and new pods run side by side, so the role gets the queue and the
# tokens of both. finish_stack removes those of the old pods.
stack_parameters() {
  local arn=arn:$partition:ssm:$region:$account:parameter
  old_queues=$(value_of QueueArns) old_tokens=$(value_of TokenParameterArns)
  queue_arn=arn:$partition:sqs:$region:$account:$queue token_arns=$arn${tokens//,/,$arn}
  [[ $queue != *.fifo ]] || dead_letters=${dead_letters:-${queue%.fifo}-dlq.fifo}
  parameters=("ClusterName=$cluster" "OidcProvider=$issuer" "EnvironmentName=$environment"
    "QueueName=$queue" "CreateQueue=$create_queue" "DeadLetterQueueName=${dead_letters:-$queue-dlq}"
    "QueueArns=$(join "$old_queues" "$queue_arn")" "TokenParameterArns=$(join "$old_tokens" "$token_arns")"
    ${parameters[@]+"${parameters[@]}"})
}

# Deploys the template with these parameters. Omitted ones keep their value.
deploy_stack() {
  quietly aws cloudformation deploy --stack-name "$stack" --template-file infra/email-processor.yaml \
    --no-fail-on-empty-changeset --tags "service=$name" --capabilities CAPABILITY_NAMED_IAM \
    --parameter-overrides "$@" || {
    aws cloudformation describe-stack-events --stack-name "$stack" --output text --query "StackEvents[:40] |
      [?ends_with(ResourceStatus, 'FAILED')].[LogicalResourceId, ResourceStatusReason]" >&2 2>/dev/null || true
    ! grep -qw ROLLBACK_COMPLETE "$work/log" ||
      echo "Such a stack must be deleted first: run ./deploy.sh --delete with the same arguments." >&2
    return 1
  }
}

# Prints the token for a new parameter: API_TOKEN, or a random one. Other users can see arguments and
# exported variables, and a log may hold the shell's trace, so only a subshell and a pipe hold the token.
token() (
  { set +x; } 2>/dev/null
  token=${API_TOKEN:-}
  token=${token#"${token%%[![:space:]]*}"} token=${token%"${token##*[![:space:]]}"}
  [ -n "$token" ] || token=$(head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n')
  printf %s "$token"
)

make_token() {
  local key
  [ -z "$token_found" ] || { say "keep $token_found${API_TOKEN:+; API_TOKEN is not used}" && return; }
  token_found=${tokens%%,*} key=$(value_of TokenKeyArn)
  token | AWS_CLI_FILE_ENCODING=UTF-8 aws ssm put-parameter --name "$token_found" --type SecureString \
    --value file:///dev/stdin --tags "Key=made-by-stack,Value=$stack" ${key:+--key-id "$key"} >/dev/null
  say "made it; for clients: aws ssm get-parameter --with-decryption --region $region --name $token_found"
}

# For a registry other than ECR, the operator has to log in.
log_in() {
  [[ $registry != *.dkr.ecr.* ]] ||
    aws ecr get-login-password | quietly docker login --username AWS --password-stdin "$registry"
}

# Sets image to the digest of the tag in the registry. buildx reads the digest without a pull.
# print: buildx ignores a template that begins with {{.Manifest, and prints a table.
find_image() {
  image=$repository@$(docker buildx imagetools inspect --format '{{print .Manifest.Digest}}' "$repository:$tag" 2>/dev/null)
}

push_image() {
  log_in
  if find_image; then
    say "keep $repository:$tag, which the registry has"
  else
    # sed removes a password from the remote's URL.
    quietly docker build --platform "$platform" --build-arg "COMMIT=$commit" \
      --build-arg "CREATED=$(git show --no-patch --format=%cI HEAD)" \
      --build-arg "SOURCE_DATE_EPOCH=$(git show --no-patch --format=%ct HEAD)" \
      --build-arg "SOURCE=$(git remote get-url origin 2>/dev/null | sed 's|//[^/]*@|//|')" \
      --tag "$repository:$tag" .
    quietly docker push "$repository:$tag"
    find_image || die "The registry does not show $repository:$tag after the push. Run this again."
    say "pushed $image"
  fi
}

# --- Manifests and rollout --------------------------------------------------------------------------

# Sets manifests to k8s/ with the values of this account.
build_manifests() {
  local alb=alb.ingress.kubernetes.io annotations="" web_acl
  web_acl=$(value_of WebAclArn)
  [ -z "$certificate_arn" ] || annotations="$alb/certificate-arn: '$certificate_arn', $alb/ssl-redirect: '443',
        $alb/listen-ports: '[{\"HTTP\": 80}, {\"HTTPS\": 443}]',
        $alb/ssl-policy: ELBSecurityPolicy-TLS13-1-2-Res-2021-06,"
  [ -z "$web_acl" ] || annotations+=" $alb/wafv2-acl-arn: '$web_acl'"
  # Pods read the ConfigMap only when they start. The checksum makes a changed ConfigMap a new release.
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
        metadata: {annotations: {checksum/config: '$(git hash-object --stdin <<<"$queue_url $region")'}},
        spec: {containers: [{name: $name, image: '$image', env: [{name: TOKEN_SSM_PARAMETER, value: '$tokens'}]}]}}}}
END
  manifests=$(kubectl kustomize "$work")
}

# Prints the pod template. It identifies a release: image, token parameters, checksum of the ConfigMap.
release() { live "deployment/$name" .spec.template; }
image_of() { sed -E 's/.*"image":"([^"]*)".*/\1/' <<<"$1"; }

apply_manifests() {
  old_release=$(release)
  # The reason of the condition Progressing, and behind it the annotation of a run that has not ended.
  # Only NewReplicaSetAvailable by itself is a release that go_back can restore.
  served=$(live "deployment/$name" \
    '.status.conditions[?(@.type=="Progressing")].reason}{.metadata.annotations.unfinished')
  # apply reports a PodDisruptionBudget as "configured" each time, so only diff shows a change.
  if kube diff --server-side=false -f - <<<"$manifests" >/dev/null 2>&1; then
    undo=no said="nothing to change"
    [ "$served" = NewReplicaSetAvailable ] || said="this release is applied, but the last run did not complete it"
    say "$said"
  else
    old_config=$(patch_of "configmap/$name-config" data)
    old_deployment=$(patch_of "deployment/$name" spec)
    undo=yes
    [ -z "$served" ] || quietly kube annotate --overwrite "deployment/$name" unfinished=yes
    quietly kube apply --server-side=false -f - <<<"$manifests"
    grep -v ' unchanged$' "$work/log" | indent || true
    # A first rollout starts with all pods. The autoscaler would add the second one later.
    [ -n "$served" ] || quietly kube scale "deployment/$name" --replicas "$(live "hpa/$name-hpa" .spec.minReplicas)"
  fi
  applied=$(release)
  # kubectl does not wait for a rollout that has missed its deadline.
  if [[ $served = ProgressDeadlineExceeded* && $applied = "$old_release" ]]; then
    say "start the rollout again"
    quietly kube rollout restart "deployment/$name"
    applied=$(release)
  fi
}

# Waits for the rollout. progressDeadlineSeconds limits the time without progress. A limit of the total time
# would undo healthy rollouts of many pods.
rollout() { kube rollout status "deployment/$name" | indent; }

# Shows why the new pods do not become ready, without the many events of the autoscaler.
show_reasons() {
  local newest
  grep -q 'progress deadline' "$work/error" || return # the pods are not the reason
  kube get pods --output wide
  kube get events --field-selector type!=Normal,involvedObject.kind!=HorizontalPodAutoscaler \
    --sort-by .lastTimestamp | tail -n 15
  newest=$(kube get pods --sort-by .metadata.creationTimestamp --output name | tail -n 1)
  [ -n "$newest" ] || return 0
  live "$newest" '.status.conditions[?(@.status=="False")].message' && echo
  # A container that is ready waits for the load balancer's health check. Its log does not explain that.
  [ "$(live "$newest" '.status.containerStatuses[0].ready')" = true ] || {
    kube logs "$newest" --all-containers --tail 20
    kube logs "$newest" --all-containers --tail 20 --previous 2>/dev/null
  }
}

# Prints a JSON patch that restores an object. The alternatives restore less: rollout undo only the pod
# template, without ConfigMap; server-side apply keeps fields that the failed release has added.
patch_of() {
  local metadata content
  metadata=$(live "$1" .metadata) && content=$(live "$1" ".$2") &&
    echo "[{op: replace, path: /metadata, value: $metadata}, {op: remove, path: /metadata/resourceVersion},
      {op: replace, path: /$2, value: $content}]"
}

# Fails if another run or an operator has changed the release since this run applied it.
still_ours() {
  local now && now=$(release) || return
  [ "$now" != "${applied:-$now}" ] || return 0
  echo "The Deployment was changed meanwhile, to $(image_of "$now"). This run's release, $image, does not serve." >&2
  undo=no && return 1
}

put_back() {
  still_ours && applied="" && quietly kube patch "configmap/$name-config" --type json --patch "$old_config" &&
    # The autoscaler may have changed the number of replicas.
    replicas=$(live "deployment/$name" .spec.replicas) && quietly kube patch "deployment/$name" --type json \
    --patch "${old_deployment%]}, {op: replace, path: /spec/replicas, value: $replicas}]"
}

# Restores the earlier release, if it has served, and adds the result to failure.
go_back() {
  local reason="it is the first release: correct it and run this again"
  [ -z "$old_release" ] || reason="the release before it was not completed either: deploy a commit that worked"
  [ "$served" = NewReplicaSetAvailable ] || { failure+=" Nothing was undone, because $reason." && return; }
  echo "deploy.sh: $failure Going back to $(image_of "$old_release"), the earlier release."
  failure="Going back failed. The Deployment has"
  wait_until 60 put_back ||
    { failure+=" $(image_of "$(release 2>/dev/null || echo "probably the new release, $image")")." && return; }
  trap : INT TERM HUP # the release is restored; a signal may end the wait for its pods
  failure="The deployment was undone: the earlier release serves again."
  rollout || failure="The deployment was undone, but not all pods serve yet: see kubectl --namespace $name get pods."
}

# The exit trap: explains a failure, and undoes the release.
finish() {
  local status=$?
  set +e # continue if the terminal is closed and nothing can be printed
  trap '' INT TERM HUP PIPE # a second Ctrl-C must not interrupt the rollback
  exec >&3 2>&3 # the interrupted command's output may go into a file
  if [ "$status" -ne 0 ]; then
    [ "$status" -ne 130 ] || failure="Interrupted in the step '$doing'."
    [ -n "$failure" ] || failure="The step '$doing' failed. Correct the reasons above, and run this again." status=1
    case $undo in
      untouched) failure+=" The Deployment was not changed." ;;
      yes) go_back ;;
      kept) failure+=" The new release serves, and stays." ;;
    esac
  fi
  [ -z "$failure" ] || echo "deploy.sh: $failure"
  [ -z "$work" ] || rm -rf "$work"
  exit "$status"
}

keep_release() {
  still_ours
  undo=kept
  quietly kube annotate "deployment/$name" unfinished-
}

has_alb() { host=$(live "ingress/$name-ingress" '.status.loadBalancer.ingress[0].hostname') && [ -n "$host" ]; }

# Ends the run with this reason, after the events of the Ingress.
no_alb() {
  kube describe ingress "$name-ingress" >&2 || true
  die "$1. See the events above, and kubectl --namespace kube-system logs deployment/aws-load-balancer-controller."
}

# Checks the service from outside. A new ALB and its DNS name need some minutes.
try_service() {
  local url=${check%/}
  [ "$check" != alb ] || url=http://$host
  step "check the service at $check"
  # -q: a .curlrc might change what is sent.
  wait_until "$timeout" curl -q --silent --show-error --fail --max-time 10 --output /dev/null "$url/health" ||
    die "$url/health does not respond."
  TOKEN_SSM_PARAMETER=$token_found ./test.sh "$url" 2>&1 | indent
  keep_release
}

# needed PARAMETER NEW OLD: prints the items of NEW and of the stack's PARAMETER as one list, without the
# items of OLD, which only the old pods used.
needed() { join "$2" "$(value_of "$1" | tr , '\n' | grep -vxF "$(tr , '\n' <<<"$3")")"; }

# Adds the alarms on the ALB, and removes the permissions that only the old pods needed.
finish_stack() {
  local balancer="" group=""
  still_ours
  stack_values=$(show_stack)
  parameters=("QueueArns=$(needed QueueArns "$queue_arn" "$old_queues")"
    "TokenParameterArns=$(needed TokenParameterArns "$token_arns" "$old_tokens")")
  balancer=$(aws elbv2 describe-load-balancers --output text \
    --query "LoadBalancers[?DNSName=='$host'].LoadBalancerArn") || true
  [ -z "$balancer" ] || group=$(aws elbv2 describe-target-groups --load-balancer-arn "$balancer" --output text \
    --query 'TargetGroups[0].TargetGroupArn') || true
  if [[ $group == arn:* ]]; then
    parameters+=("LoadBalancerFullName=${balancer#*:loadbalancer/}" "TargetGroupFullName=${group##*:}")
  else
    echo "deploy.sh: warning: AWS does not show the ALB, so its alarms are not made yet. Run this again." >&2
  fi
  deploy_stack "${parameters[@]}"
}

# --- Commands ---------------------------------------------------------------------------------------

deploy() {
  preflight
  undo=untouched
  step "deploy the stack $stack"
  stack_values=$(show_stack) # another run may have changed it meanwhile
  stack_parameters
  deploy_stack "${parameters[@]}"
  stack_values=$(show_stack)
  step "make the token parameter, if there is none"
  make_token
  step "build and push the image $repository:$tag"
  push_image
  step "apply the manifests of k8s/ to $cluster"
  build_manifests
  apply_manifests
  step "wait for the rollout"
  wait_until 60 rollout || { show_reasons >&2 || true; exit 1; }
  [ -n "$check" ] || keep_release
  step "wait for the ALB"
  wait_until "$timeout" has_alb || no_alb "There is no ALB yet"
  [ -z "$check" ] || try_service
  step "make the alarms of the ALB, and remove the permissions of the old pods"
  finish_stack
  still_ours
  [ "$(live "deployment/$name" .spec.replicas)" != 0 ] || say "note: $stopped"
  echo "Deployed in $SECONDS s: http${certificate_arn:+s}://$host"
}

dry_run() {
  preflight
  stack_parameters
  cat <<END
Would deploy the stack $stack with ${parameters[*]};
$([ -n "$token_found" ] && echo keep || echo make) the token parameter ${token_found:-${tokens%%,*}};
build and push $repository:$tag, unless the registry has it;
apply k8s/ to $cluster, with ${certificate_arn:-no certificate}${check:+; check the service at $check}.
Nothing was changed.
END
}

# Prints the manifests, and notes and problems on standard error.
render() {
  if command -v aws >/dev/null; then
    preflight >/dev/null
  else
    echo "deploy.sh: note: the AWS CLI is not installed, so names are those of a first run." >&2
    complete_options
    find_tag
  fi
  { log_in && find_image; } 2>/dev/null || {
    image=$repository:$tag
    echo "deploy.sh: note: the registry shows no image of this commit; its tag is used instead. Deploy it first." >&2
  }
  build_manifests
  echo "$manifests"
}

delete() {
  local made parameter
  preflight
  step "delete the Ingress, with its ALB, and the namespace $name"
  if [ -z "$issuer" ]; then
    say "the cluster $cluster no longer exists; check whether it has left an ALB behind"
  elif [ -z "$stack_values$live_role" ]; then
    say "there is no stack $stack, so a namespace $name would belong to another deployment and is kept"
  else
    # The controller removes the ALB first. Otherwise the namespace would wait for the Ingress's finalizer.
    quietly kube delete ingress "$name-ingress" --interactive=false --ignore-not-found --timeout "${timeout}s" ||
      no_alb "The Ingress was not deleted, so the ALB may be left"
    quietly kube delete namespace "$name" --interactive=false --ignore-not-found --timeout "${timeout}s" ||
      kube describe namespace "$name" >&2 || true
    [ -z "$(live "namespace/$name" .metadata.name)" ] || die "The namespace $name is still there. Run this again."
  fi
  step "delete the token parameter, if it was made here"
  made=$(aws ssm describe-parameters --parameter-filters "Key=tag:made-by-stack,Values=$stack" \
    --query 'Parameters[].Name' --output text)
  for parameter in $made; do
    aws ssm delete-parameter --name "$parameter"
    say "deleted $parameter"
  done
  step "delete the stack $stack"
  aws cloudformation delete-stack --stack-name "$stack"
  aws cloudformation wait stack-delete-complete --stack-name "$stack"
  [ "$(value_of CreateQueue)" != true ] || for queue in "$(value_of QueueName)" "$(value_of DeadLetterQueueName)"; do
    say "kept $queue; to delete it: aws sqs delete-queue --region $region --queue-url ${queue_url%/*}/$queue"
  done
  echo "Deleted."
}

mode=deploy region=${AWS_REGION:-us-west-1} environment="" cluster="" context="" queue_name="" create_queue=false
certificate_arn="" token_parameter="" parameters=() platform=linux/amd64 timeout=300 check=""
number=0 steps=8 doing=start failure="" problems=() undo=no work=""
# Filled by the checks of AWS and the cluster.
stack_values="" issuer="" applied="" replicas="" live_role="" live_queue="" live_tokens="" live_certificate=""
dead_letters="" token_found=""
exec 3>&2 # for finish
trap finish EXIT
trap 'exit 130' INT TERM HUP PIPE
read_arguments "$@"
check_arguments
[ -z "$check" ] || steps=9
[ "$mode" != dry-run ] || steps=1
[ "$mode" != delete ] || steps=4

name=email-processor # of the stack, the repository, the namespace and its objects
# As infra/email-processor.yaml names them.
stack=$name${environment:+-$environment} role=$name-role${environment:+-$environment} repository=$registry/$stack
export -n API_TOKEN # the tools do not need it
export AWS_REGION=$region AWS_DEFAULT_REGION=$region AWS_PAGER="" KUBERC=off
unset KUBECTL_EXTERNAL_DIFF # its exit status may differ from diff's
stopped="the service is stopped: kubectl --namespace $name scale deployment/$name --replicas 2 starts it"
case $region in # as in botocore's list of partitions
  cn-*) partition=aws-cn dns_suffix=amazonaws.com.cn ;;
  eusc-*) partition=aws-eusc dns_suffix=amazonaws.eu ;;
  us-gov-*) partition=aws-us-gov dns_suffix=amazonaws.com ;;
  us-iso-*) partition=aws-iso dns_suffix=c2s.ic.gov ;;
  us-isob-*) partition=aws-iso-b dns_suffix=sc2s.sgov.gov ;;
  us-isof-*) partition=aws-iso-f dns_suffix=csp.hci.ic.gov ;;
  eu-isoe-*) partition=aws-iso-e dns_suffix=cloud.adc-e.uk ;;
  *) partition=aws dns_suffix=amazonaws.com ;;
esac
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
work=$(mktemp -d)

"${mode/-/_}" # deploy, dry_run, render or delete
