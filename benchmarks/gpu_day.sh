#!/usr/bin/env bash
# What a short stay on a GPU machine should do, most precious first:
#
#   benchmarks/gpu_day.sh --minutes 25
#
# Every step has a time limit and a log, saves what it finds as it goes, and takes no other step with it. The exit status
# is 1 if one failed or was ended at its limit. It runs from a source tree and installs nothing.
# Options: --python PY (default python3; with torch, triton, pytest, pytest-xdist, matplotlib, jinja2 and tqdm),
# --minutes N (for all steps, default 25), --out DIR (default build/gpu-day; `bench` goes on with the rows that are
# there), --steps a,b (of tests, parity, headline, peers, kernels, tune, profile, rest; default all).
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python3 minutes=25 out=$root/build/gpu-day steps=
while (($#)); do
  if (($# < 2)); then echo "error: $1 needs a value" >&2; exit 2; fi
  case $1 in
    --python) python=$2 ;;
    --minutes) minutes=$2 ;;
    --out) out=$(realpath -m -- "$2") ;;
    --steps) steps=$2 ;;
    *) echo "error: $1; expected --python, --minutes, --out or --steps" >&2; exit 2 ;;
  esac
  shift 2
done
if [[ ! $minutes =~ ^[1-9][0-9]*$ ]]; then echo "error: --minutes $minutes; expected a positive integer" >&2; exit 2; fi
for name in ${steps//,/ }; do
  if [[ " tests parity headline peers kernels tune profile rest " != *" $name "* ]]; then
    echo "error: step $name; expected some of tests,parity,headline,peers,kernels,tune,profile,rest" >&2; exit 2
  fi
done
# the steps run in another folder; a virtual environment's python is a link that must stay one
if [[ $python == */* && $python != /* ]]; then python=$PWD/$python; fi
if ! "$python" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
  echo "error: $python has no torch that sees a CUDA device; give another with --python" >&2; exit 2
fi

# kernels/ and benchmarks/ are packages of vitfast, and an installed vitfast must not come first
tree=$root/build/tree
rm -rf "$tree"
mkdir -p "$tree/vitfast" "$out"
ln -s "$root"/vitfast/* "$root/kernels" "$root/benchmarks" "$tree/vitfast/"
ln -s "$root/tests" "$root/pyproject.toml" "$tree/"
# the commands of benchmarks/ are entry points, which Python looks for beside the packages
mkdir "$tree/vitfast.dist-info"
echo 'Name: vitfast' >"$tree/vitfast.dist-info/METADATA"
sed -n '/^\[project.entry-points/,/^$/{s/.*entry-points\.//;s/"//g;p}' "$root/pyproject.toml" |
  sed 's/^\(.*\)\]$/[\1]/' >"$tree/vitfast.dist-info/entry_points.txt"
cd "$tree" || exit 2
export PYTHONPATH=$tree${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# the user's own configs are neither read nor written
VITFAST_CONFIG_DIR=$(mktemp -d)
export VITFAST_CONFIG_DIR
trap 'rm -rf "$VITFAST_CONFIG_DIR"' EXIT

summary=() failed=0
seconds() { echo $((minutes * 60 * $1 / 100)); }

# step NAME PERCENT ARGUMENTS...: python with these, for at most that share of the time
step() {
  local name=$1 limit status=0 begin=$SECONDS
  limit=$(seconds "$2")
  if [[ -n $steps && ,$steps, != *,${name%%-*},* ]]; then return; fi
  echo "==> $name: at most $limit s, log in $out/$name.log"
  timeout --kill-after=10 "$limit" "$python" "${@:3}" >"$out/$name.log" 2>&1 || status=$?
  case $status in
    0) summary+=("$name: done in $((SECONDS - begin)) s") ;;
    124 | 137) summary+=("$name: ended at its limit of $limit s"); failed=1 ;;
    *) summary+=("$name: failed with status $status: $(tail -n 1 "$out/$name.log")"); failed=1 ;;
  esac
  echo "${summary[-1]}" | tee -a "$out/summary.txt"
}

# compiling takes most of a test's time, and one core
workers=$(($(nproc) > 12 ? 12 : $(nproc)))
tests() { OMP_NUM_THREADS=1 step "tests-$1" "$2" -m pytest -q --tb=short -n "$workers" -p no:cacheprovider -o faulthandler_timeout=120 -m gpu "$3"; }
parity() { step "parity-$1-$2" 2 -m vitfast parity "$1" --precision "$2" --batch 8; }
# the budget leaves time to finish the last workload
bench() { step "$1" "$2" -m vitfast bench --out "$out" --budget "$(($(seconds "$2") * 7 / 10 + 1))" "${@:3}"; }

B=vit_base_patch16_224 L=vit_large_patch16_224
tests kernels 9 tests/kernels
tests models 9 tests/vitfast
for model in $B $L; do parity $model bf16; done
for precision in fp16 fp32 tf32; do parity $B $precision; done
# against all peers later: compiling them takes minutes
bench headline 12 --model $B $L --batch 256 1 --peers "torch eager" "torch compiled" "timm compiled" vitfast
bench peers 15 --model $B $L --batch 256 1
bench kernels 12 --layers kernel --model $B $L --batch 256 1
step tune 16 -m vitfast tune --model $B $L --batch 1 256 --budget "$(($(seconds 16) * 8 / 10 + 1))" --out "$out/configs"
for batch in 256 1; do step "profile-$batch" 2 -m vitfast.benchmarks.kernel_profile --model $B --batch "$batch"; done
bench rest 13 --layers model train block end_to_end --batch 256 1

printf '%s\n' '' "${summary[@]}"
exit "$failed"
