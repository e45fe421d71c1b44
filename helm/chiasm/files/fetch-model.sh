#!/bin/sh
# Fills the folder $MODEL once. Pods that share the volume wait for the first of them; what is half
# done is left out of sight in $MODEL.part.
set -eu

say() { echo "fetch-model: $*"; }

mkdir -p "$(dirname "$MODEL")"
exec 9>"$MODEL.lock"
say "waiting for other pods"
flock -w 14400 9 || { say "another pod has been filling $MODEL for four hours"; exit 1; }
if [ -d "$MODEL" ]; then
  say "$MODEL is there"
  exit 0
fi

MODEL_DIR="$MODEL.part"
export MODEL_DIR
case "$MODEL_SOURCE" in
huggingface) # goes on where it broke off
  set --
  if [ "${MODEL_WEIGHTS:-yes}" = no ]; then set -- --exclude '*.safetensors'; fi
  HF_HOME=/tmp/huggingface hf download "$MODEL_REPOSITORY" --revision "$MODEL_REVISION" \
    --local-dir "$MODEL_DIR" "$@"
  ;;
archive)
  rm -rf "$MODEL_DIR"
  mkdir -p "$MODEL_DIR"
  python3 -c '
import os, tarfile, urllib.request
with urllib.request.urlopen(os.environ["MODEL_URL"], timeout=60) as answer:
    with tarfile.open(fileobj=answer, mode="r|*") as archive:
        archive.extractall(os.environ["MODEL_DIR"], filter="data")
'
  ;;
command)
  rm -rf "$MODEL_DIR"
  mkdir -p "$MODEL_DIR"
  sh -euc "$MODEL_COMMAND"
  ;;
*)
  say "unknown source $MODEL_SOURCE"
  exit 1
  ;;
esac

if [ -n "${MODEL_CHECKSUMS:-}" ]; then
  sums="$MODEL_CHECKSUMS"
  if [ "${MODEL_WEIGHTS:-yes}" = no ]; then
    sums=/tmp/checksums
    grep -v '\.safetensors$' "$MODEL_CHECKSUMS" >"$sums" || :
  fi
  count=$(grep -c . "$sums" || :)
  say "checking $count checksums"
  if [ "$count" != 0 ] && ! (cd "$MODEL_DIR" && sha256sum --check --strict --quiet "$sums"); then
    rm -rf "$MODEL_DIR"
    exit 1
  fi
fi
mv "$MODEL_DIR" "$MODEL"
say "$MODEL is filled"
