#!/usr/bin/env bash
# Deploy the service, from this checkout to a serving ALB. See --help.
set -euo pipefail

usage() {
  cat <<'HELP'
Usage: ./deploy.sh ECR_REGISTRY AWS_ACCOUNT_ID [options]

  ./deploy.sh 111122223333.dkr.ecr.us-west-1.amazonaws.com 111122223333

Deploys infra/email-processor.yaml, makes the token parameter if there is none, builds and pushes an
image tagged by the commit, applies k8s/ and waits until it runs, or else goes back to what ran
before. It can be run again at any time: only what differs is changed, and an option that is left
out keeps the value of the last run; --context, --platform, --timeout and --check are not kept.

Instead of deploying:
  --dry-run               check everything and say what would be done; nothing is changed
  --render                print the manifests as they would be applied, for kubectl apply -f -
                          (where the AWS command line is not installed: those of a first run)
  --delete                remove all that was made here. Queues stay, with their messages
  --delete-queues         with --delete: remove the queues that the stack made, too

Options (with the value of the first run):
  --region REGION         the region (AWS_REGION, else us-west-1)
  --environment NAME      a further deployment in the account, as the stack email-processor-NAME, with
                          a cluster of its own
  --cluster NAME          the EKS cluster (dev-CP-EKS-CLUSTER)
  --context NAME          reach the cluster through this context of your kubeconfig (by default one
                          is made for this run alone)
  --queue-name NAME       the SQS queue (dev-CP-queue)
  --create-queue          make it, with a dead-letter queue (by default it must exist)
  --dead-letter-queue NAME
                          its dead-letter queue, for the alarm (of a queue that exists, the one in its
                          redrive policy; else the queue's name with -dlq after it)
  --certificate-arn ARN   serve HTTPS with this ACM certificate; none goes back to HTTP (HTTP)
  --token-parameter NAME  the SSM parameter that holds the token, or several, separated by commas
                          (/email-service/api-token; /email-service/NAME/api-token with --environment)
  --token-key-arn ARN     the KMS key that encrypts it, unless it is AWS's own
  --rate-limit NUMBER     requests that one address may send in 5 minutes (2000)
  --alarm-email ADDRESS   where alarms go (nowhere)
  --platform PLATFORM     what the nodes run (linux/amd64)
  --timeout SECONDS       how long to wait for the ALB, for its first answer to --check, or for each
                          removal from the cluster (300); a roll-out may take any time, as long as it
                          goes on
  --check URL             run ./test.sh against URL before the rights of what ran before are taken
                          away, and undo the roll-out if it fails; alb stands for the ALB's own host,
                          which does for HTTP alone (no check)

Environment:
  API_TOKEN   the token, if the parameter has to be made. Without it you are asked, which keeps the
              token out of the environment and the shell's history; if you answer nothing, or without
              a terminal at the first run, one is made up
  AWS_*, DOCKER_*, KUBECONFIG   as for these tools

Exit status: 0 when the service runs, 1 for a failure, 2 for a wrong argument.
HELP
}

name=email-processor # of the stack, the repository, the namespace and what is in it
manifests_folder=k8s template=infra/email-processor.yaml
default_token=/email-service/api-token # the application's
# What the image is made of; the tag of a changed checkout is made from it.
image_files=(.dockerignore Dockerfile app.py gunicorn.conf.py openapi.yaml requirements.txt)

# --- Helpers ----------------------------------------------------------------------------------------

die() {
  echo "deploy.sh: $1" >&2
  exit "${2:-1}"
}

step() {
  number=$((number + 1))
  printf '[%d/%d] %d:%02d %s\n' "$number" "$steps" $((SECONDS / 60)) $((SECONDS % 60)) "$1"
}

say() {
  printf '      %s\n' "$1"
}

problem() {
  problems+=("$1")
}

# The last line that a tool complained with; run it with 2>"$work/error" before.
complaint() {
  grep -v '^[[:space:]]*$' "$work/error" | tail -n 1 || true
}

# Runs a tool that has much to say; its last lines are shown only when it fails.
quietly() {
  "$@" >"$work/log" 2>&1 || {
    tail -n 20 "$work/log" >&2
    return 1
  }
}

# Version 1 of the CLI ignores AWS_ENDPOINT_URL for SQS.
sqs() {
  aws sqs ${AWS_ENDPOINT_URL:+--endpoint-url "$AWS_ENDPOINT_URL"} "$@"
}

kube() {
  kubectl --kubeconfig "$work/kubeconfig" --namespace "$name" "$@"
}

# --- Arguments --------------------------------------------------------------------------------------

read_arguments() {
  local arguments=() option
  while [ $# -gt 0 ]; do
    option=$1
    shift
    case $option in
      -h | --help)
        usage
        exit
        ;;
      --dry-run | --render | --delete)
        [ "$mode" = deploy ] || die "Only one of --dry-run, --render and --delete can be done at once; see --help." 2
        mode=${option#--}
        continue
        ;;
      --delete-queues)
        delete_queues=yes
        continue
        ;;
      --create-queue)
        create_queue=true
        continue
        ;;
      --region | --environment | --cluster | --context | --queue-name | --dead-letter-queue | \
        --certificate-arn | --token-parameter | --token-key-arn | --rate-limit | --alarm-email | --platform | --timeout | --check)
        [ $# -gt 0 ] && [[ $1 == [!-]* ]] || die "$option needs a value; see --help." 2
        ;;
      -*) die "Unknown option '$option'; see --help." 2 ;;
      *)
        arguments+=("$option")
        continue
        ;;
    esac
    case $option in
      --region) region=$1 ;;
      --environment) environment=$1 ;;
      --cluster) cluster=$1 ;;
      --context) context=$1 ;;
      --queue-name) queue_name=$1 ;;
      --dead-letter-queue) dead_letter_queue=$1 ;;
      --certificate-arn) certificate_arn=$1 ;;
      --token-parameter) token_parameter=${1//[[:space:]]/} ;;
      --token-key-arn) token_key_arn=$1 ;;
      --rate-limit) rate_limit=$1 ;;
      --alarm-email) alarm_email=$1 ;;
      --platform) platform=$1 ;;
      --timeout) timeout=$1 ;;
      --check) check=$1 ;;
    esac
    shift
  done
  [ ${#arguments[@]} -eq 2 ] ||
    die "ECR_REGISTRY and AWS_ACCOUNT_ID are needed, and nothing more; see --help." 2
  registry=${arguments[0]} account=${arguments[1]}
}

# Refuses a value that does not look like one. All of them end in commands and manifests.
check_value() {
  [[ $2 =~ ^($3)$ ]] || die "$1 '$2' is not $4; see --help." 2
}

check_arguments() {
  local arn='arn:aws[a-z-]*' queue='([A-Za-z0-9_-]{1,80}|[A-Za-z0-9_-]{1,75}\.fifo)?'
  check_value ECR_REGISTRY "$registry" '[a-z0-9]([a-z0-9.-]*[a-z0-9])?(:[0-9]+)?' \
    "a registry's host name, such as 111122223333.dkr.ecr.us-west-1.amazonaws.com"
  check_value AWS_ACCOUNT_ID "$account" '[0-9]{12}' "an account's 12 digits"
  check_value --region "$region" '[a-z]{2}(-[a-z]+)+-[0-9]+' "a region such as us-west-1"
  check_value --environment "$environment" '([a-z0-9]+(-[a-z0-9]+)*)?' \
    "a short name of small letters, digits and hyphens"
  check_value --cluster "$cluster" '([A-Za-z0-9][A-Za-z0-9_-]{0,99})?' "a cluster's name"
  check_value --queue-name "$queue_name" "$queue" "a queue's name"
  check_value --dead-letter-queue "$dead_letter_queue" "$queue" "a queue's name"
  check_value --certificate-arn "$certificate_arn" "(none|$arn:acm:$region:[0-9]{12}:certificate/[a-zA-Z0-9-]+)?" \
    "the ARN of an ACM certificate in $region, or none"
  check_value --token-parameter "$token_parameter" '(/[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*(,/[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*)*)?' \
    "a parameter's name such as $default_token, or several, separated by commas"
  check_value --token-key-arn "$token_key_arn" "($arn:kms:[a-z0-9-]+:[0-9]{12}:key/[a-zA-Z0-9-]+)?" "the ARN of a KMS key"
  check_value --rate-limit "$rate_limit" '([1-9][0-9]{1,8})?' "a number of 10 or more"
  check_value --alarm-email "$alarm_email" '([^[:space:]@]+@[^[:space:]@]+)?' "an address"
  check_value --platform "$platform" 'linux/[a-z0-9/]+' "a platform such as linux/arm64"
  check_value --timeout "$timeout" '[1-9][0-9]{0,4}' "a number of seconds"
  check_value --check "$check" '(alb|https?://[A-Za-z0-9.-]+(:[0-9]+)?(/[^[:space:]]*)?)?' "a URL, or alb"
  [[ $check != alb || $certificate_arn != arn:* ]] ||
    die "--check alb does for HTTP alone: the certificate is the domain's; give --check https://DOMAIN." 2
  [[ $create_queue = false || $queue_name != *.fifo ]] ||
    die "--create-queue makes standard queues; make $queue_name yourself, and leave the option out." 2
  [ "$delete_queues" = no ] || [ "$mode" = delete ] || die "--delete-queues goes with --delete; see --help." 2
}

# --- Checks, before anything is changed -------------------------------------------------------------

check_tools() {
  local tool tools=(aws=https://aws.amazon.com/cli kubectl=https://kubernetes.io/docs/tasks/tools)
  [ "$mode" = delete ] || tools+=(docker=https://docs.docker.com/engine/install git=https://git-scm.com)
  [ -z "$check" ] || tools+=(curl=https://curl.se)
  for tool in "${tools[@]}"; do
    command -v "${tool%%=*}" >/dev/null || problem "${tool%%=*} is missing: install it (${tool#*=})."
  done
  [ "$mode" != delete ] || return 0
  if command -v docker >/dev/null; then
    if ! docker info >/dev/null 2>"$work/error"; then
      problem "docker does not reach its engine ($(complaint)): start it."
    elif ! docker buildx version >/dev/null 2>&1; then
      problem "docker has no buildx: install it (https://github.com/docker/buildx#installing)."
    fi
  fi
  ! command -v git >/dev/null || find_tag || problem "$PWD is no git checkout ($(complaint)): deploy from a clone."
  [ -r "$template" ] && [ -r "$manifests_folder/deployment.yaml" ] ||
    problem "$template or $manifests_folder/ is missing: restore them with git checkout $template $manifests_folder."
}

# Sets tag: the commit, for a changed checkout what the image is made of, and the platform if it is
# not the usual one, because the repository's tags are immutable.
find_tag() {
  local changes
  tag=$(git rev-parse --short=12 HEAD 2>"$work/error") || return 1
  changes=$(git --no-optional-locks status --porcelain 2>"$work/error") || return 1
  [ -z "$changes" ] ||
    tag+="-dirty-$(cat "${image_files[@]}" | git hash-object --stdin | cut -c 1-12)"
  [ "$platform" = linux/amd64 ] || tag+=-${platform##*/}
}

check_credentials() {
  command -v aws >/dev/null || return 1
  of=$(aws sts get-caller-identity --query Account --output text 2>"$work/error") || {
    problem "AWS does not say whose the credentials are ($(complaint)): run aws sso login or aws configure, or set AWS_PROFILE; if it was not reached, check the network and AWS_ENDPOINT_URL."
    return 1
  }
  [ "$of" = "$account" ] || {
    problem "The AWS credentials are of account $of, not $account: set AWS_PROFILE, or correct AWS_ACCOUNT_ID."
    return 1
  }
}

check_registry() {
  [[ $registry =~ ^([0-9]{12})\.dkr\.ecr\.([a-z0-9-]+)\.amazonaws\.com ]] || return 0
  [ "${BASH_REMATCH[1]}" = "$account" ] && [ "${BASH_REMATCH[2]}" = "$region" ] ||
    problem "The registry $registry is not the one of account $account in $region: correct ECR_REGISTRY, AWS_ACCOUNT_ID or --region."
}

# Sets stack_status to the stack's state, "" if there is none, and stack_values to lines of names and
# values: the parameters of the last run, and the outputs.
read_stack() {
  stack_status="" stack_values=""
  stack_values=$(aws cloudformation describe-stacks --stack-name "$stack" --output text --query 'Stacks[0].[
    [[StackStatus]], Parameters[].[ParameterKey, ParameterValue], Outputs[].[OutputKey, OutputValue]][]' \
    2>"$work/error") || {
    grep -q 'does not exist' "$work/error"
    return
  }
  stack_status=${stack_values%%$'\n'*}
  # All that a first deployment leaves which was refused at once.
  [ "$stack_status" != REVIEW_IN_PROGRESS ] || stack_status=""
}

value_of() {
  awk -F '\t' -v key="$1" '$1 == key { print $2 }' <<<"$stack_values"
}

check_stack() {
  read_stack || problem "AWS does not show the stack $stack ($(complaint)): get the permission cloudformation:DescribeStacks."
  case $stack_status in
    ROLLBACK_COMPLETE | ROLLBACK_FAILED | DELETE_FAILED)
      [ "$mode" = delete ] ||
        problem "The stack $stack is in state $stack_status and cannot be updated: see why in its events, run ./deploy.sh --delete with the same arguments, and deploy again."
      ;;
    UPDATE_ROLLBACK_FAILED)
      [ "$mode" = delete ] ||
        problem "The stack $stack is in state $stack_status: see why in its events, run aws cloudformation continue-update-rollback --region $region --stack-name $stack, and this again."
      ;;
    *_IN_PROGRESS)
      problem "The stack $stack is in state $stack_status: wait until the other deployment has ended, and run this again."
      ;;
  esac
}

# Options that were not given: as in the last run, else as in --help. A run that broke off while the
# queue changed leaves two: last_queue is the one that is not asked for now.
complete_options() {
  last_cluster=$(value_of ClusterName)
  cluster=${cluster:-${last_cluster:-dev-CP-EKS-CLUSTER}}
  last_queue=$(value_of FormerQueueName)
  [ -n "$last_queue" ] && [ "$last_queue" != "$queue_name" ] || last_queue=$(value_of QueueName)
  queue=${queue_name:-${last_queue:-dev-CP-queue}}
  last_tokens=$(value_of TokenParameterNames)
  tokens=${token_parameter:-${last_tokens:-/email-service/${environment:+$environment/}api-token}}
  dead_letters=$dead_letter_queue
  [ -n "$dead_letters" ] || [ "$queue" != "$(value_of QueueName)" ] || dead_letters=$(value_of DeadLetterQueueName)
  if [ "$(value_of CreateQueue)" = true ] && [ "$queue" = "$(value_of QueueName)" ]; then ours=true; fi
}

check_cluster() {
  local answer state providers
  answer=$(aws eks describe-cluster --name "$cluster" \
    --query 'cluster.[status,identity.oidc.issuer]' --output text 2>"$work/error") || {
    # The stack's own cluster may be gone already; any other name is a mistake.
    if [ "$mode" != delete ] || [ "${last_cluster:-$cluster}" != "$cluster" ] || ! grep -q ResourceNotFound "$work/error"; then
      problem "There is no cluster $cluster in $region ($(complaint)): correct --cluster or --region."
    fi
    return 1
  }
  state=${answer%%$'\t'*} issuer=${answer##*$'\t'}
  issuer=${issuer#https://}
  [ "$state" = ACTIVE ] || problem "The cluster $cluster is in state $state: wait until it is ACTIVE."
  [ "$mode" != delete ] || return 0
  providers=$(aws iam list-open-id-connect-providers \
    --query 'OpenIDConnectProviderList[].Arn' --output text 2>"$work/error") || {
    problem "AWS does not list the OIDC providers ($(complaint)): get the permission iam:ListOpenIDConnectProviders."
    return 0
  }
  [[ $issuer != None && $'\t'$providers$'\t' == *":oidc-provider/$issuer"$'\t'* ]] ||
    problem "The cluster's OIDC provider is not registered in IAM: run eksctl utils associate-iam-oidc-provider --region $region --cluster $cluster --approve."
}

# A kubeconfig for this run alone; the user's own is only read, if at all.
make_kubeconfig() {
  if [ -n "$context" ]; then
    kubectl config view --raw --flatten --minify --context "$context" >"$work/kubeconfig" 2>"$work/error"
  else
    aws eks update-kubeconfig --name "$cluster" --kubeconfig "$work/kubeconfig" >/dev/null 2>"$work/error"
  fi
}

# The controller must be there, and no paused Deployment, and nothing of another deployment, which would
# be replaced or deleted.
check_objects() {
  local found owner other
  command -v kubectl >/dev/null || return 0
  make_kubeconfig || {
    problem "No kubeconfig can be made for $cluster ($(complaint)): correct --cluster or --context."
    return 0
  }
  if ! { found=$(kube get deployments.apps,ingressclasses.networking.k8s.io --all-namespaces \
    --output 'jsonpath={range .items[*]}{.metadata.namespace}/{.metadata.name} {.spec.controller}{.spec.paused}{"\n"}{end}' 2>"$work/error") &&
    owner=$(kube get serviceaccount "$name-sa" --ignore-not-found \
      --output 'jsonpath={.metadata.annotations.eks\.amazonaws\.com/role-arn}' 2>"$work/error"); }; then
    problem "kubectl does not reach the cluster $cluster ($(complaint)): check the network, and that your role has access (aws eks list-access-entries --cluster-name $cluster)."
    return
  fi
  read_outputs
  other=${owner##*"$name-role"} other=${other#-}
  if [ -n "$owner" ] && [ "${owner#*:iam::}" != "${role_arn#*:iam::}" ]; then
    problem "The cluster $cluster belongs to ${other:+the environment }${other:-the deployment without --environment} (role $owner): give --cluster."
  elif [ "$mode" = delete ] && [ -z "$stack_status" ] && [ -n "$environment" ] &&
    [ -n "$(kube get namespace "$name" --ignore-not-found --output name)" ]; then
    problem "There is no stack $stack, so the namespace $name of $cluster may be another's: correct --environment or --cluster."
  fi
  [ "$mode" != delete ] || return 0
  # The class stands for the controller: EKS Auto Mode's own has no Deployment.
  grep -qE '^/alb (ingress\.k8s\.aws|eks\.amazonaws\.com)/alb$' <<<"$found" ||
    problem "The cluster has no IngressClass alb of a load balancer controller: install the AWS Load Balancer Controller (https://docs.aws.amazon.com/eks/latest/userguide/lbc-helm.html), which brings it; for EKS Auto Mode make it as SETUP.md says."
  ! grep -q "^$name/$name true$" <<<"$found" ||
    problem "The Deployment is paused, so nothing would roll out: run kubectl --namespace $name rollout resume deployment/$name."
}

check_certificate() {
  local state
  [[ $certificate_arn == arn:* ]] || return 0
  state=$(aws acm describe-certificate --certificate-arn "$certificate_arn" \
    --query Certificate.Status --output text 2>"$work/error") || state=$(complaint)
  [ "$state" = ISSUED ] ||
    problem "The certificate $certificate_arn is not ISSUED ($state): correct --certificate-arn, or wait until it is validated."
}

check_queue() {
  local url redrive former_queue
  former_queue=$(value_of FormerQueueName)
  if [ -n "$former_queue" ] && [ -z "$queue_name" ]; then
    problem "The last run broke off while the queue changed from $former_queue to $(value_of QueueName): give --queue-name with the one that is to be used."
    return
  fi
  if url=$(sqs get-queue-url --queue-name "$queue" --query QueueUrl --output text 2>"$work/error"); then
    [ "$create_queue" = false ] || [ "$ours" = true ] ||
      problem "The queue $queue exists already: leave out --create-queue, or give another --queue-name."
    if [ "$ours" = true ] || [ -n "$dead_letters" ]; then
      return
    fi
    redrive=$(sqs get-queue-attributes --queue-url "$url" --attribute-names RedrivePolicy \
      --query Attributes.RedrivePolicy --output text 2>"$work/error") ||
      problem "AWS does not show the queue $queue ($(complaint)): get the permission sqs:GetQueueAttributes."
    dead_letters=$(sed -nE 's/.*"arn:[^"]*:([^":]+)".*/\1/p' <<<"$redrive")
    [ -n "$dead_letters" ] ||
      say "note: the queue $queue has no dead-letter queue, so the alarm DeadLetterQueueNotEmpty watches nothing"
  elif ! grep -qiE 'NonExistentQueue|does not exist' "$work/error"; then
    problem "AWS does not show the queue $queue ($(complaint)): get the permission sqs:GetQueueUrl."
  elif [ "$create_queue" = false ]; then
    problem "There is no queue $queue in $region: add --create-queue, or correct --queue-name."
  fi
}

# Sets token_found to the first of the parameters that exists, "" if none does.
check_token() {
  local parameter missing=""
  token_found=""
  for parameter in ${tokens//,/ }; do
    if aws ssm get-parameter --name "$parameter" --query Parameter.Type >/dev/null 2>"$work/error"; then
      token_found=${token_found:-$parameter}
    elif grep -q ParameterNotFound "$work/error"; then
      missing+=" $parameter"
    else
      problem "AWS does not show the token parameter $parameter ($(complaint)): get the permission ssm:GetParameter."
      return 0
    fi
  done
  if [ -n "$token_found" ]; then
    for parameter in $missing; do
      say "note: the token parameter $parameter does not exist, so no token of it is accepted"
    done
  # A random token in place of a mistyped name would cut off every client of a service that runs.
  elif [ -n "$stack_status" ] && [ -z "${API_TOKEN:+given}" ] && [ ! -t 0 ]; then
    problem "The token parameter ${tokens%%,*} does not exist: correct --token-parameter, or give its value in API_TOKEN."
  fi
}

preflight() {
  check_tools
  if [ "$mode" != delete ]; then check_registry; fi
  if check_credentials; then
    check_stack
    complete_options
    if check_cluster; then check_objects; fi
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
}

# --- Stack ------------------------------------------------------------------------------------------

# Parameters that are not named keep their value.
deploy_stack() {
  aws cloudformation deploy --stack-name "$stack" --template-file "$template" \
    --capabilities CAPABILITY_NAMED_IAM --no-fail-on-empty-changeset \
    --tags "service=$name" --parameter-overrides "$@" >"$work/log" 2>&1 || {
    # Some versions report an unchanged stack as a failure all the same.
    grep -q 'No updates are to be performed' "$work/log" || {
      grep -v '^[[:space:]]*$' "$work/log" | tail -n 5 >&2
      aws cloudformation describe-stack-events --stack-name "$stack" --output text \
        --query "StackEvents[?ends_with(ResourceStatus, 'FAILED')].[LogicalResourceId, ResourceStatusReason]" \
        2>/dev/null | head -n 10 >&2 || true
      die "The stack $stack was not deployed, for the reasons above. Correct them and run this again."
    }
  }
}

# Sets parameters to what the stack gets, and former to what it had. While old pods and new ones run
# side by side, the role may use the tokens and the queues of both.
stack_options() {
  local token key queues=$create_queue
  role_tokens=$tokens former_queue=$last_queue
  for token in ${last_tokens//,/ }; do
    [[ ,$role_tokens, == *,$token,* ]] || role_tokens+=,$token
  done
  role_tokens=$(cut -d , -f -10 <<<"$role_tokens") # the template takes no more
  [ "$former_queue" != "$queue" ] || former_queue=""
  parameters=("ClusterName=$cluster" "OidcProvider=$issuer" "DeadLetterQueueName=$dead_letters" "TokenParameterNames=$role_tokens")
  [ -z "$environment" ] || parameters+=("EnvironmentName=$environment")
  [ -z "$token_key_arn" ] || parameters+=("TokenKeyArn=$token_key_arn")
  [ -z "$rate_limit" ] || parameters+=("RateLimit=$rate_limit")
  [ -z "$alarm_email" ] || parameters+=("AlarmEmail=$alarm_email")
  if [ -n "$stack_status" ]; then
    for key in "${parameters[@]%%=*}"; do
      former+=("$key=$(value_of "$key")")
    done
    # A queue that the stack once made exists still, and cannot be made again.
    former+=("QueueName=$(value_of QueueName)" "FormerQueueName=$(value_of FormerQueueName)"
      "CreateQueue=$([ "$queue" = "$(value_of QueueName)" ] && echo "$ours" || echo false)")
  fi
  [ "$ours" = false ] || queues=true
  parameters+=("QueueName=$queue" "FormerQueueName=$former_queue" "CreateQueue=$queues")
}

# Gives the pods of before their ConfigMap back, or nothing if there was none.
restore_config() {
  [ -z "$config_before" ] || kube apply -f - <<<"$config_before" >/dev/null || true
}

# Gives them their rights back.
restore_stack() {
  widened=no
  [ ${#former[@]} -gt 0 ] || return 0
  if (deploy_stack "${former[@]}"); then
    say "gave the stack $stack the values of the last run back"
  fi
}

# However the run ends: also when Ctrl-C ends it.
clean_up() {
  if [ "$widened" = yes ]; then
    restore_config
    restore_stack
  elif [ "$settled" = yes ]; then
    # Else the next run would take the tokens of before for some that are to be accepted.
    (narrow_stack) || true
  fi
  rm -rf "$work"
}

# --- Token ------------------------------------------------------------------------------------------

# The value of a new parameter. It stays in this subshell and in a pipe: arguments, exported variables
# and the shell's trace can be seen by others.
token() (
  { set +x; } 2>/dev/null
  token=${API_TOKEN:-}
  if [ -z "$token" ] && [ -t 0 ]; then
    read -rsp "      Token for ${tokens%%,*} (nothing: make one up): " token
    echo >&2
  fi
  [ -n "$token" ] || token=$(head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n')
  printf %s "$token"
)

make_token() {
  local parameter
  if [ -n "$token_found" ]; then
    say "keep $token_found"
    return
  fi
  parameter=${tokens%%,*}
  token |
    AWS_CLI_FILE_ENCODING=UTF-8 aws ssm put-parameter --name "$parameter" --type SecureString \
      --value file:///dev/stdin --tags "Key=made-by-stack,Value=$stack" \
      ${token_key_arn:+--key-id "$token_key_arn"} >/dev/null 2>"$work/error" ||
    die "The token parameter $parameter was not made ($(complaint)). Get the permissions ssm:PutParameter and ssm:AddTagsToResource and run this again."
  token_found=$parameter
  say "made $parameter; clients need its value: aws ssm get-parameter --with-decryption --region $region --name $parameter"
}

# --- Image ------------------------------------------------------------------------------------------

log_in() {
  [[ $registry == *.dkr.ecr.* ]] || return 0 # another registry's login is the user's
  aws ecr get-login-password 2>"$work/error" |
    quietly docker login --username AWS --password-stdin "$registry" ||
    die "docker does not log in to $registry ($(complaint)). Get the permission ecr:GetAuthorizationToken and run this again."
}

# Sets image to the repository with the digest that the registry knows for the tag.
find_digest() {
  image=$(docker image inspect --format '{{range .RepoDigests}}{{println .}}{{end}}' "$repository:$tag" |
    grep -F "$repository@sha256:" | head -n 1)
}

# The same for an image that this machine has never had.
ask_registry() {
  local digest
  [[ $registry == *.dkr.ecr.* ]] &&
    digest=$(aws ecr describe-images --repository-name "${repository#*/}" --image-ids "imageTag=$tag" \
      --query 'imageDetails[0].imageDigest' --output text 2>/dev/null) && [[ $digest == sha256:* ]] &&
    image=$repository@$digest
}

push_image() {
  log_in
  if docker pull --quiet --platform "$platform" "$repository:$tag" >/dev/null 2>&1 && find_digest; then
    say "keep $repository:$tag, which the registry has"
    return
  fi
  quietly docker build --platform "$platform" --tag "$repository:$tag" . ||
    die "The image was not built, for the reasons above. Correct them and run this again."
  say "built $tag"
  quietly docker push "$repository:$tag" ||
    die "The image was not pushed to $repository, for the reasons above. Correct them and run this again."
  find_digest || die "docker knows no digest of $repository:$tag after the push. Run this again."
  say "pushed ${image##*@}"
}

# --- Manifests --------------------------------------------------------------------------------------

# Sets from the stack what the manifests need; what a stack that is not there yet would say, else.
read_outputs() {
  local repository_uri
  repository_uri=$(value_of RepositoryUri)
  repository=$registry/${repository_uri#*/}
  [ -n "$repository_uri" ] || repository=$registry/$stack
  role_arn=$(value_of RoleArn)
  role_arn=${role_arn:-arn:aws:iam::$account:role/$name-role${environment:+-$environment}}
  queue_url=$(value_of QueueUrl)
  queue_url=${queue_url:-https://sqs.$region.amazonaws.com/$account/$queue}
  # --render with another --queue-name: the stack does not have it yet.
  [ "$queue" = "$(value_of QueueName)" ] || queue_url=${queue_url%/*}/$queue
  web_acl_arn=$(value_of WebAclArn)
}

# A certificate that was given before is not lost by leaving out the option: tokens would travel
# in clear text.
find_certificate() {
  [ -n "$certificate_arn" ] || certificate_arn=$(kube get ingress "$name-ingress" --ignore-not-found \
    --output 'jsonpath={.metadata.annotations.alb\.ingress\.kubernetes\.io/certificate-arn}' 2>"$work/error") || return 1
  [ "$certificate_arn" != none ] || certificate_arn=""
}

# The document of this kind, out of a manifest that has several.
document() {
  awk -v kind="kind: $2" '
    function flush() { if (found) printf "%s", text; text = ""; found = 0 }
    /^---/ { flush(); next }
    { text = text $0 "\n" }
    $0 == kind { found = 1 }
    END { flush() }' "$manifests_folder/$1.yaml"
}

# The manifests of one part, with all that differs between accounts filled in.
render() {
  local part=$1 file expressions=(
    -e "s|https://sqs\.us-west-1\.amazonaws\.com/ACCOUNT_ID/dev-CP-queue|$queue_url|g"
    -e "s|arn:aws:iam::ACCOUNT_ID:role/email-processor-role|$role_arn|g"
    -e "s|aws_region: us-west-1|aws_region: $region|"
    -e "s|image: IMAGE|image: $image|" -e "s|CONFIG_CHECKSUM|$config_checksum|"
  )
  if [ -n "$certificate_arn" ]; then
    expressions+=(-e '/# without a certificate$/d' -e 's| *# with a certificate$||' -e "s|CERTIFICATE_ARN|$certificate_arn|g")
  else
    expressions+=(-e '/# with a certificate$/d' -e 's|^( *)# (.*[^ ]) *# without a certificate$|\1\2|')
  fi
  if [ -n "$web_acl_arn" ]; then
    expressions+=(-e 's| *# with a web ACL$||' -e "s|WEB_ACL_ARN|$web_acl_arn|g")
  else
    expressions+=(-e '/# with a web ACL$/d')
  fi
  # The ALB's readiness gate goes only into pods that come after Service and Ingress. The Deployment is
  # alone, so that when something is refused no roll-out has begun that nobody waits for.
  case $part in
    config) cat "$manifests_folder/configmap.yaml" ;;
    before)
      for file in namespace configmap serviceaccount networkpolicy pdb hpa; do
        cat "$manifests_folder/$file.yaml"
        echo ---
      done
      document deployment Service
      echo ---
      cat "$manifests_folder/ingress.yaml"
      ;;
    after) document deployment Deployment ;;
  esac | sed -E "${expressions[@]}"
}

# Sets before and after to the rendered manifests, to apply in this order.
render_all() {
  local newline=$'\n'
  config_checksum=$(render config | sed '1,/^data:/d' | git hash-object --stdin)
  before=$(render before) after=$(render after)
  # The manifests leave the variable at its default.
  [ "$tokens" = "$default_token" ] ||
    after=${after/"          env:$newline"/"          env:$newline            - name: TOKEN_SSM_PARAMETER$newline              value: $tokens$newline"}
  ! grep -qE '(^|[^A-Z_])(ACCOUNT_ID|IMAGE|CERTIFICATE_ARN|WEB_ACL_ARN|CONFIG_CHECKSUM)($|[^A-Z_])' <<<"$before$after" ||
    die "A placeholder is left in the manifests of $manifests_folder/. Restore them: git checkout $manifests_folder."
}

apply() {
  local applied complete=yes
  applied=$(kube apply -f - <<<"$1" 2>"$work/error") || complete=no
  cat "$work/error" >&2 # warnings, too
  [ "$complete" = yes ] ||
    die "The manifests were not all applied, for the reasons above. Correct them and run this again."
  changes+=$applied$'\n'
  grep -v ' unchanged$' <<<"$applied" | sed 's/^/      /' || true
}

revision() {
  kube get deployment "$name" --ignore-not-found \
    --output 'jsonpath={.metadata.annotations.deployment\.kubernetes\.io/revision}'
}

# The gate needs the controller's TargetGroupBinding, a few seconds after the Ingress. Going on without
# it costs no more than the gate of the first pods.
wait_for_binding() {
  local i found
  for ((i = 0; i < 30; i++)); do
    found=$(kube get targetgroupbindings --output name 2>/dev/null) || return 0
    [ -z "$found" ] || return 0
    sleep 2
  done
}

apply_manifests() {
  find_certificate ||
    die "kubectl does not show the Ingress ($(complaint)). Give --certificate-arn (none for HTTP) and run this again."
  [ "$check" != alb ] || [ -z "$certificate_arn" ] ||
    die "The service has a certificate, which is the domain's and not the ALB's own host's. Give --check https://DOMAIN and run this again."
  render_all
  revision_before=$(revision 2>"$work/error") ||
    die "kubectl does not show the Deployment ($(complaint)). Get access to the namespace $name and run this again."
  config_before=$(kube apply view-last-applied configmap "$name-config" --output json 2>/dev/null) || config_before=""
  applied_before=$(kube apply view-last-applied deployment "$name" --output json 2>/dev/null) || applied_before=""
  apply "$before"
  wait_for_binding
  widened=no # from here on, new pods may have begun to use what is new
  apply "$after"
  if ! grep -qv ' unchanged$' <<<"${changes%$'\n'}"; then say "nothing to change"; fi
}

# --- Roll-out ---------------------------------------------------------------------------------------

show_reasons() {
  local newest
  {
    echo "--- pods"
    kube get pods --output wide || true
    echo "--- events"
    kube get events --field-selector type!=Normal --sort-by .lastTimestamp | tail -n 15 || true
    newest=$(kube get pods --sort-by .metadata.creationTimestamp --output name | tail -n 1) || true
    [ -z "$newest" ] || {
      echo "--- last log lines of $newest"
      kube logs "$newest" --all-containers --tail 20 || true
      kube logs "$newest" --all-containers --tail 20 --previous 2>/dev/null || true
    }
    echo "---"
  } >&2
}

# It ends when for progressDeadlineSeconds nothing has gone on. A limit to the whole would undo the
# healthy roll-out of many pods.
rollout_status() {
  kube rollout status "deployment/$name" 2>&1 | sed 's/^/      /'
}

# Takes from the role what only the pods of before used.
narrow_stack() {
  settled=no
  deploy_stack "TokenParameterNames=$tokens" "FormerQueueName=" "$@"
}

# Ends the run, after going back to what ran before.
go_back() {
  local failed=$1
  if [ -z "$revision_before" ]; then
    narrow_stack
    die "$failed failed, for the reasons above. It is the first deployment, so there is nothing to go back to. Correct them and run this again."
  elif [ "$(revision)" = "$revision_before" ]; then
    die "$failed failed, for the reasons above, though this run has not changed the pods. Correct them and run this again."
  fi
  restore_config
  # kubectl compares the next manifest with the last one that it applied, which undo leaves as it is. It
  # is only noted here: after an undo by hand it is not what ran.
  if ! { quietly kube rollout undo "deployment/$name" --to-revision "$revision_before" &&
    { [ -z "$applied_before" ] || quietly kube apply set-last-applied -f - <<<"$applied_before"; } &&
    rollout_status; }; then
    die "$failed failed, for the reasons above, and so did going back to revision $revision_before. See kubectl --namespace $name rollout history deployment/$name."
  fi
  restore_stack
  die "$failed failed, for the reasons above, and the deployment was undone: revision $revision_before serves again. Correct them and run this again."
}

wait_for_rollout() {
  rollout_status || {
    show_reasons
    go_back "The roll-out"
  }
}

# --- ALB --------------------------------------------------------------------------------------------

wait_for_alb() {
  local end=$((SECONDS + timeout))
  while true; do
    host=$(kube get ingress "$name-ingress" --output 'jsonpath={.status.loadBalancer.ingress[0].hostname}' 2>"$work/error") || host=""
    [ -z "$host" ] || return 0
    [ "$SECONDS" -lt "$end" ] || return 1
    say "not there yet ($((end - SECONDS)) s left)"
    sleep 5
  done
}

show_ingress() {
  kube get events --field-selector "involvedObject.name=$name-ingress" --sort-by .lastTimestamp 2>/dev/null | tail -n 5 >&2 || true
}

# Tries the service from outside. A new ALB and its name need some minutes.
try_service() {
  local url=${check%/} end=$((SECONDS + timeout))
  if [ -z "$host" ]; then
    show_ingress
    echo "There is no ALB after $timeout s." >&2
    return 1
  fi
  [ "$check" != alb ] || url=http://$host
  # -q: a .curlrc might change what is sent.
  until curl -q --silent --show-error --fail --max-time 10 --output /dev/null "$url/health" 2>"$work/error"; do
    if [ "$SECONDS" -ge "$end" ]; then
      echo "$url/health does not answer after $timeout s ($(complaint))." >&2
      return 1
    fi
    sleep 5
  done
  TOKEN_SSM_PARAMETER=$token_found ./test.sh "$url" 2>&1 | sed 's/^/      /'
}

# The alarms on the ALB name it, so they are made when it is known.
finish_stack() {
  local balancer="" group=""
  if [ "$role_tokens" != "$tokens" ] || [ -n "$former_queue" ]; then
    say "wait until the pods of before have stopped"
    sleep 45 # terminationGracePeriodSeconds
  fi
  [ -z "$host" ] || balancer=$(aws elbv2 describe-load-balancers --output text \
    --query "LoadBalancers[?DNSName=='$host'].LoadBalancerArn" 2>"$work/error") || balancer=""
  [ -z "$balancer" ] || group=$(aws elbv2 describe-target-groups --load-balancer-arn "$balancer" --output text \
    --query 'TargetGroups[0].TargetGroupArn' 2>"$work/error") || group=""
  if [[ $group == arn:* ]]; then
    narrow_stack "LoadBalancerFullName=${balancer#*:loadbalancer/}" "TargetGroupFullName=${group##*:}"
    return
  fi
  narrow_stack
  if [ -z "$host" ]; then
    show_ingress
    die "The service runs, but has no ALB after $timeout s. See kubectl --namespace $name describe ingress $name-ingress and the controller's log, and run this again."
  fi
  echo "deploy.sh: warning: AWS does not show the load balancer $host yet, so its alarms are not made. Run this again in a minute." >&2
}

# --- What can be done -------------------------------------------------------------------------------

deploy() {
  steps=8
  [ -z "$check" ] || steps=9
  step "check tools, credentials and cluster"
  preflight
  step "deploy the stack $stack"
  stack_options
  deploy_stack "${parameters[@]}"
  widened=yes
  read_stack || die "AWS does not show the stack $stack ($(complaint)). Run this again."
  read_outputs
  step "make the token parameter, if there is none"
  make_token
  step "build and push the image $repository:$tag"
  push_image
  step "apply the manifests of $manifests_folder/ to $cluster"
  apply_manifests
  step "wait for the roll-out"
  wait_for_rollout
  [ -n "$check" ] || settled=yes
  step "wait for the ALB"
  wait_for_alb || true
  if [ -n "$check" ]; then
    step "check the service at $check"
    try_service || go_back "The check"
    settled=yes
  fi
  step "make the alarms of the ALB, and take away the rights of what ran before"
  finish_stack
  local url=http://$host
  [ -z "$certificate_arn" ] || url=https://$host
  echo "Deployed in $SECONDS s: $url"
  [ -z "$certificate_arn" ] ||
    echo "Point the certificate's domain at this host with a CNAME or alias record; clients use the domain."
}

dry_run() {
  steps=8
  [ -z "$check" ] || steps=9
  step "check tools, credentials and cluster"
  preflight
  stack_options
  step "would deploy the stack $stack (${stack_status:-there is none yet}) with ${parameters[*]}"
  read_outputs
  if [ -n "$token_found" ]; then
    step "would keep the token parameter $token_found"
  else
    step "would make the token parameter ${tokens%%,*}"
  fi
  step "would build and push $repository:$tag, unless the registry has it"
  find_certificate || true
  step "would apply the manifests of $manifests_folder/ to $cluster, with ${certificate_arn:-no certificate}; --render prints them"
  step "would wait for the roll-out, and undo it if it fails"
  step "would wait up to $timeout s for the ALB"
  if [ -n "$check" ]; then step "would check the service at $check, and undo the roll-out if that fails"; fi
  step "would make the alarms of the ALB, and take away the rights of what ran before"
  echo "Nothing was changed."
}

# Standard output is for the manifests alone. What AWS and the cluster cannot say yet is taken from
# the names that a first run would give.
print_manifests() {
  if ! { command -v git >/dev/null && find_tag; }; then
    die "The image's tag is the commit, and git does not tell it. Render in a git clone."
  fi
  # Names of a first run in place of the real ones would lead the service elsewhere.
  if command -v aws >/dev/null; then
    check_credentials || die "${problems[0]}"
    read_stack || die "AWS does not show the stack $stack ($(complaint)). Get the permission cloudformation:DescribeStacks and run this again."
  fi
  if [ -z "$stack_status" ]; then
    stack_values=""
    echo "deploy.sh: note: there is no stack $stack to ask, so names are those of a first run, without a web ACL." >&2
  fi
  complete_options
  read_outputs
  find_digest 2>/dev/null || ask_registry || {
    image=$repository:$tag
    echo "deploy.sh: note: neither docker here nor ECR knows a digest of the image, so it is named by its tag; deploy it first." >&2
  }
  if [ -z "$certificate_arn" ] && ! { command -v kubectl >/dev/null && make_kubeconfig && find_certificate; }; then
    [ -z "$stack_status" ] ||
      die "The cluster $cluster does not tell its certificate, without which tokens might travel in clear text. Correct --cluster or --context, or give --certificate-arn (none for HTTP)."
    echo "deploy.sh: note: the cluster cannot be asked for its certificate, so this is plain HTTP; give --certificate-arn for HTTPS." >&2
  fi
  [ "$certificate_arn" != none ] || certificate_arn=""
  render_all
  printf '%s\n---\n%s\n' "$before" "$after"
}

delete_all() {
  local queues parameter made url
  steps=4
  step "check tools, credentials and cluster"
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
    if [ "$made" = "$stack" ]; then
      aws ssm delete-parameter --name "$parameter" 2>"$work/error" ||
        die "The token parameter $parameter was not deleted ($(complaint)). Get the permission ssm:DeleteParameter and run this again."
      say "deleted $parameter"
    fi
  done
  step "delete the stack $stack"
  [ -n "$stack_status" ] || {
    say "there is none"
    echo "Deleted."
    return
  }
  queues=$(aws cloudformation describe-stack-resources --stack-name "$stack" --output text \
    --query "StackResources[?ResourceType=='AWS::SQS::Queue'].PhysicalResourceId" 2>/dev/null) || queues=""
  if ! { aws cloudformation delete-stack --stack-name "$stack" 2>"$work/error" &&
    aws cloudformation wait stack-delete-complete --stack-name "$stack" 2>"$work/error"; }; then
    die "The stack $stack was not deleted ($(complaint)). See its events (aws cloudformation describe-stack-events --region $region --stack-name $stack), and run this again."
  fi
  for url in $queues; do
    if [ "$delete_queues" = no ]; then
      say "kept $url with its messages; to delete it: aws sqs delete-queue --region $region --queue-url $url"
    elif sqs delete-queue --queue-url "$url" 2>"$work/error"; then
      say "deleted $url"
    elif ! grep -qiE 'NonExistentQueue|does not exist' "$work/error"; then
      die "The queue $url was not deleted ($(complaint)). Delete it: aws sqs delete-queue --region $region --queue-url $url"
    fi
  done
  echo "Deleted."
}

mode=deploy delete_queues=no create_queue=false ours=false
region=${AWS_REGION:-us-west-1} environment="" cluster="" context="" queue_name="" dead_letter_queue=""
certificate_arn="" token_parameter="" token_key_arn="" rate_limit="" alarm_email="" platform=linux/amd64 timeout=300 check=""
read_arguments "$@"
check_arguments
stack=$name${environment:+-$environment}
number=0 steps=0 problems=() parameters=() former=() widened=no settled=no changes="" tag="" image="" issuer="" of="" config_checksum=""
stack_status="" stack_values="" config_before="" applied_before=""

# Only the shell itself needs it, not every tool that is started.
export -n API_TOKEN
export AWS_REGION=$region AWS_DEFAULT_REGION=$region AWS_PAGER=""
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")"
work=$(mktemp -d)
trap clean_up EXIT

case $mode in
  deploy) deploy ;;
  dry-run) dry_run ;;
  render) print_manifests ;;
  delete) delete_all ;;
esac
