#!/bin/sh
# Builds the engine for @TARGET@ on the device that it is for.
# Made by lora-export build-engine --kit. Usage: sh build.sh [OUTPUT_FOLDER]
# With TensorRT's own @TOOL@ (or $TRTEXEC); without it, with lora-export.
set -eu

kit=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
out=${1:-.}
mkdir -p -- "$out"
out=$(CDPATH='' cd -- "$out" && pwd)

(cd -- "$kit" && sha256sum -c --quiet SHA256SUMS) || {
  echo "Error: the kit is damaged: copy it again" >&2
  exit 1
}

tool=${TRTEXEC:-}
if [ -z "$tool" ]; then
  for found in @TOOL@ /usr/src/tensorrt/bin/@TOOL@ /opt/tensorrt/bin/@TOOL@; do
    if command -v "$found" >/dev/null 2>&1; then
      tool=$found
      break
    fi
  done
fi
if [ -z "$tool" ] && command -v lora-export >/dev/null 2>&1; then
  exec lora-export build-engine "$kit"/@MODEL@ -o "$out" \
    @OURS@
fi

if [ -z "$tool" ]; then
  echo "Error: neither lora-export nor @TOOL@ is installed" >&2
  echo "hint: install lora-export with pip, or TensorRT; or set TRTEXEC to the path of @TOOL@" >&2
  exit 1
fi
# Before a build that may take an hour.
if ! command -v python3 >/dev/null 2>&1; then
  echo "Error: python3 is not installed: it writes the engine's record" >&2
  exit 1
fi

engine=@ENGINE@
log="$out/${engine%.engine}.log"
trap 'rm -f -- "$out/$engine.tmp"' EXIT
if ! "$tool" --onnx="$kit"/@MODEL@ --saveEngine="$out/$engine.tmp" \
    @FLAGS@ >"$log" 2>&1; then
  tail -n 20 -- "$log" >&2
  printf 'Error: %s could not build the engine; all of its messages are in %s\n' "$tool" "$log" >&2
  exit 1
fi
python3 "$kit/finish.py" "$kit/record.json" "$out/$engine.tmp" "$log" "$out/$engine"
printf 'wrote %s\n' "$out/$engine"
