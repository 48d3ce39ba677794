#!/bin/sh
# Builds the engine for @TARGET@ on the device that it is for.
# Made by lora-export build-engine --kit. Usage: sh build.sh [OUTPUT_FOLDER]
set -eu

kit=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
out=${1:-.}
mkdir -p -- "$out"
out=$(CDPATH='' cd -- "$out" && pwd)
cd -- "$kit"

sha256sum -c --quiet SHA256SUMS || {
  echo "Error: the kit is damaged: copy it again" >&2
  exit 1
}

if command -v lora-export >/dev/null 2>&1; then
  exec lora-export build-engine @MODEL@ -o "$out" \
    @OURS@
fi

tool=${TRTEXEC:-}
if [ -z "$tool" ]; then
  for found in @TOOL@ /usr/src/tensorrt/bin/@TOOL@ /opt/tensorrt/bin/@TOOL@; do
    if command -v "$found" >/dev/null 2>&1; then
      tool=$found
      break
    fi
  done
fi
if [ -z "$tool" ]; then
  echo "Error: neither lora-export nor @TOOL@ is installed" >&2
  echo "hint: install lora-export with pip, or TensorRT; or set TRTEXEC to the path of @TOOL@" >&2
  exit 1
fi

engine=@ENGINE@
log="$out/${engine%.engine}.log"
trap 'rm -f -- "$out/$engine.tmp"' EXIT
if ! "$tool" --onnx=@MODEL@ --saveEngine="$out/$engine.tmp" \
    @FLAGS@ >"$log" 2>&1; then
  tail -n 20 -- "$log" >&2
  echo "Error: $tool could not build the engine; all of its messages are in $log" >&2
  exit 1
fi
mv -- "$out/$engine.tmp" "$out/$engine"
python3 finish.py record.json "$out/$engine" "$log"
echo "wrote $out/$engine"
