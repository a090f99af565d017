#!/usr/bin/env bash
# Two plain hosts, started on each:    bash two_hosts.sh 0    on FIRST_HOST, and    bash two_hosts.sh 1    on the other
# FIRST_HOST must be reachable by that name, with the port open, from both.
set -uo pipefail
PROCESS=$1 restarts=0

# The one that is first waits for the other for five minutes; when one is lost the other ends within a minute, exit 3.
until mor train /SHARED/RUN.yaml --resume --coordinator FIRST_HOST:8476 --num-processes 2 --process-id "$PROCESS"; do
  code=$?
  case $code in
    2 | 130 | 143) exit "$code" ;; # bad input, or somebody stopped it
  esac
  ((restarts++ < 20)) || exit "$code" # where the other one had the bad input this one ends with 3 every time
  echo "exit $code: again from the newest checkpoint" >&2
  sleep 10
done
