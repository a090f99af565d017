#!/usr/bin/env bash
# Two plain hosts, started on each:    bash two_hosts.sh 0    on FIRST_HOST, and    bash two_hosts.sh 1    on the other
# FIRST_HOST must be reachable by that name, with the port open, from both.
set -uo pipefail
PROCESS=$1 restarts=0

# A host that ends with 2 leaves a file, so that the other one does not wait for it again and again.
BAD=/SHARED/RUN.bad_input
rm -f "$BAD.$PROCESS"

# The one that is first waits for the other for five minutes; when one is lost the other ends within a minute, exit 3.
until mor train /SHARED/RUN.yaml --resume --coordinator FIRST_HOST:8476 --num-processes 2 --process-id "$PROCESS"; do
  code=$?
  case $code in
    2) touch "$BAD.$PROCESS" && exit 2 ;; # bad input: the message says what to mend
    130 | 143) exit "$code" ;; # somebody stopped it
  esac
  ((restarts++ < 20)) || exit "$code"
  sleep 10
  if compgen -G "$BAD.*" > /dev/null; then
    echo "the other host ended with bad input and was not started again" >&2
    exit 2
  fi
  echo "exit $code: again from the newest checkpoint" >&2
done
