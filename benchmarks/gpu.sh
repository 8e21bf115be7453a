#!/usr/bin/env bash
# Everything that a short stay on a GPU machine should do, most precious first, saved as it goes and resumable:
#
#   benchmarks/gpu.sh --minutes 25
#
# It runs from a source tree with whatever torch and triton are there and installs nothing into them.
# Options: --python PY (default python3), --wheels DIR (wheels to use beside what is installed), and those of
# `benchmarks/stages.py`: --out DIR, --minutes N, --stages a,b,c, --dry-run (tiny shapes, on any machine).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python3
wheels=
args=()
while (($#)); do
  if [[ $1 == --python || $1 == --wheels || $1 == --out ]] && (($# < 2)); then
    echo "error: $1 needs a value" >&2; exit 2
  fi
  case $1 in
    --python) python=$2; shift 2 ;;
    --wheels) wheels=$2; shift 2 ;;
    --out) args+=(--out "$(realpath -m -- "$2")"); shift 2 ;;
    *) args+=("$1"); shift ;;
  esac
done
# the stages run in another folder; a virtual environment's python is a link that must stay one
if [[ $python == */* && $python != /* ]]; then python=$PWD/$python; fi
if ! "$python" -c 'import torch' 2>/dev/null; then
  echo "error: $python cannot import torch; give another with --python" >&2; exit 2
fi

# kernels/ and benchmarks/ are packages of vitfast, and an installed vitfast must not come first; a link that is right is
# left alone, since another call may be reading it
tree=$root/build/tree
link() {
  local path
  for path in "${@:2}"; do
    [[ $1/${path##*/} -ef $path ]] || ln -sfn "$path" "$1/"
  done
}
mkdir -p "$tree/vitfast"
link "$tree/vitfast" "$root"/vitfast/* "$root/kernels" "$root/benchmarks"
link "$tree" "$root/tests" "$root/pyproject.toml"
export PYTHONPATH="$tree${PYTHONPATH:+:$PYTHONPATH}"
if [[ -n $wheels ]]; then
  compgen -G "$wheels/*.whl" >/dev/null || { echo "error: --wheels $wheels: no wheels are there" >&2; exit 2; }
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --upgrade \
    --target "$tree/wheels" "$wheels"/*.whl
  export PYTHONPATH="$tree/wheels:$PYTHONPATH"
fi
cd "$tree"
# in this process's place, so that whoever ends it reaches the stages
exec "$python" -m vitfast.benchmarks.stages --root "$root" "${args[@]+"${args[@]}"}"
