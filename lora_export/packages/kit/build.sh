#!/bin/sh
# Builds the engine for @TARGET@ on the device that it is for.
# Made by lora-export build-engine --kit. Usage: sh build.sh [--force] [OUTPUT_FOLDER]
# An engine of the same graph that is there is replaced, any other one with --force only.
# With TensorRT's own @TOOL@ (or $TRTEXEC); without it, with lora-export.
set -eu

# Prints the whole path of a folder, and an x: without it, a line break at the name's end would be lost.
# "-" alone would be the folder before.
whole() {
  case $1 in
    /*) cd -- "$1" ;;
    *) cd -- "./$1" ;;
  esac >/dev/null && pwd && echo x
}
case $0 in
  */*) kit=${0%/*}/ ;;
  *) kit=. ;;
esac
kit=$(whole "$kit")
kit=${kit%?x}
force=
if [ "${1:-}" = --force ]; then
  force=--force
  shift
fi
out=${1:-.}
mkdir -p -- "$out"
out=$(whole "$out")
out=${out%?x}

(cd -- "$kit" && sha256sum -c --quiet SHA256SUMS) || {
  echo "Error: the kit is damaged: copy it again" >&2
  exit 1
}

engine=@ENGINE@
has_python=
if command -v python3 >/dev/null 2>&1; then
  has_python=yes
  # What a killed run has left is put in order first.
  # (-I, -S: nothing but the standard library is imported, whatever lies beside the script.)
  identity=$(python3 -I -S "$kit/begin.py" "$out")
  # Before a build that may take an hour, and again when it is over.
  if [ -z "$force" ]; then
    python3 -I -S "$kit/finish.py" "$kit/record.json" "$out/$engine" || exit 1
  fi
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
if [ -z "$tool" ] && command -v lora-export >/dev/null 2>&1; then
  # What it may replace was looked at above, or lora-export does it.
  exec lora-export build-engine "$kit"/@MODEL@ -o "$out" ${has_python:+--force} ${force:+--force} \
    @OURS@
fi

if [ -z "$tool" ]; then
  echo "Error: neither lora-export nor @TOOL@ is installed" >&2
  echo "hint: install lora-export with pip, or TensorRT; or set TRTEXEC to the path of @TOOL@" >&2
  exit 1
fi
if [ -z "$has_python" ]; then
  echo "Error: python3 is not installed: it writes the engine's record" >&2
  exit 1
fi

# A folder of this run's own: another run may build into the same one. Its name and its lock are those of
# lora-export's own temporary files: what a killed run leaves is known to be left.
own=$out/.lora-export-$identity
lease=$own.lease
trap 'rm -rf -- "$own"; rm -f -- "$lease"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
(umask 077 && : >"$lease")
exec 9>"$lease"
python3 -I -S "$kit/begin.py" "$out" "$lease" 9 || exit 1
mkdir -m 700 -- "$own"

keep_log() {
  log="$out/${engine%.engine}.log"
  # A log that stands beside an engine is that engine's.
  if [ -e "$out/$engine" ]; then
    log="$out/${engine%.engine}.failed.log"
  fi
  if [ -e "$log" ] && [ ! -f "$log" ]; then
    free .failed .log
    log=$name
  fi
  mv -f -- "$own/log" "$log"
}

# Sets $name to one of the engine's names that is free: free .kept .engine
free() {
  name=$out/${engine%.engine}$1$2
  number=1
  while [ -e "$name" ] || [ -L "$name" ]; do
    number=$((number + 1))
    name=$out/${engine%.engine}$1-$number$2
  done
}

# Keeps an engine that can't get its own name.
keep_engine() {
  free .kept .engine
  if [ -f "$own/engine" ] && mv -- "$own/engine" "$name" 2>/dev/null; then
    printf 'hint: the engine that was built is kept, without a record: %s\n' "$name" >&2
  fi
}

if ! "$tool" --onnx="$kit"/@MODEL@ --saveEngine="$own/engine" \
    @FLAGS@ >"$own/log" 2>&1; then
  python3 -I -S "$kit/finish.py" "$own/log" >&2 || true
  keep_log
  printf 'Error: %s could not build the engine; all of its messages are in %s\n' "$tool" "$log" >&2
  exit 1
fi
status=0
python3 -I -S "$kit/finish.py" "$kit/record.json" "$own/engine" "$own/log" "$out/$engine" ${force:+--force} ||
  status=$?
if [ "$status" -ne 0 ]; then
  # It may have been killed while files got their names. What can't be put back stays for the next run.
  python3 -I -S "$kit/begin.py" put-back "$own" || trap - EXIT
  # 1: it has refused. After a signal, what is there is as it was.
  if [ "$status" -eq 1 ]; then
    keep_engine
  fi
  keep_log
  printf 'hint: the messages of %s are in %s\n' "$tool" "$log" >&2
  exit 1
fi
printf 'wrote %s\n' "$out/$engine"
