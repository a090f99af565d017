#!/usr/bin/env bash
# A TPU slice without a scheduler, all its hosts at once:    bash tpu_vm.sh
# The hosts know each other from the slice's metadata, so `mor train` needs no launch flags.
set -uo pipefail
TPU=TPU_NAME ZONE=TPU_ZONE restarts=0

on_all() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

# Images of Ubuntu 22.04 bring Python 3.10; and what a user installs lies where a command over ssh does not look.
LOCAL='PATH=$PATH:~/.local/bin'
INSTALL="$LOCAL; pip install --quiet uv && uv tool install --quiet --python 3.12 'mor_jax[tpu]'"

# gcloud returns the code of one host, so a host that ends with 2 leaves a file, and then none starts again.
BAD=/SHARED/RUN.bad_input
TRAIN="$LOCAL; test ! -e $BAD || exit 2
mor train /SHARED/RUN.yaml --resume
code=\$?; test \$code -ne 2 || touch $BAD; exit \$code"

on_all "rm -f $BAD; $INSTALL" || exit 1
until on_all "$TRAIN"; do
  code=$?
  [ "$code" -eq 2 ] && exit 2 # bad input: the message says what to mend
  ((restarts++ < 20)) || exit "$code"
  echo "exit $code: again from the newest checkpoint" >&2
  sleep 30
done
