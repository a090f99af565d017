#!/usr/bin/env bash
# A TPU slice without a scheduler, all its hosts at once:    bash tpu_vm.sh
# The hosts know each other from the slice's metadata, so `mor train` needs no launch flags.
set -uo pipefail
TPU=TPU_NAME ZONE=TPU_ZONE

on_all() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

on_all "pip install --quiet 'mor_jax[tpu]'" || exit 1
until on_all "mor train /SHARED/RUN.yaml --resume"; do
  code=$?
  [ "$code" -eq 2 ] && exit 2 # bad input: the message says what to mend
  echo "exit $code: again from the newest checkpoint" >&2
  sleep 30
done
