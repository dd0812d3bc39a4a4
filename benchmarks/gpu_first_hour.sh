#!/usr/bin/env bash
# All that docs/results/GPU_TODO.md asks of a new GPU and a script can do, in under 25 minutes:
#
#   benchmarks/gpu_first_hour.sh [--dry-run] [FOLDER]      default: results/gpu_first_hour
#
# Build, self-checks, compute-sanitizer on small shapes, pytest -m cuda, all benchmarks, a short training. Each
# part's output goes to a file of FOLDER; a part that fails or runs out of time is noted, and the next one begins.
# The end is summary.txt, and status 1 if a part failed or was left out. --dry-run prints the commands and needs
# no GPU.
set -uo pipefail

MINUTES=25
dry_run=false
case "${1:-}" in
-h | --help) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;;
--dry-run) dry_run=true; shift ;;
-*) echo "gpu_first_hour.sh: error: expected --dry-run or a folder, got $1 (see --help)" >&2; exit 2 ;;
esac
[ $# -le 1 ] || { echo "gpu_first_hour.sh: error: expected one folder, got $*" >&2; exit 2; }
folder=$(realpath -m -- "${1:-$(dirname "$0")/../results/gpu_first_hour}")
no_gpu() { echo "gpu_first_hour.sh: error: $1" >&2; exit 1; }
gpus=2 capability=9.0 # of a dry run
if ! $dry_run; then
    gpus=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | grep -c .)
    [ "$gpus" -gt 0 ] || no_gpu "no GPU here: nvidia-smi finds none"
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -u | paste -sd ';')
fi
cd "$(dirname "$0")/.." || exit 1
if $dry_run; then
    PYTHON=python
else
    source ./environment.sh
    use_environment requirements-test.txt test || exit 1
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        no_gpu "nvidia-smi finds a GPU, PyTorch sees none: is it a CPU build, or newer than the driver?"
    mkdir -p "$folder" || exit 1
    { git log -1; git status --short; nvidia-smi; nvidia-smi topo -m; lscpu; } >"$folder/machine.txt" 2>&1
    : >"$folder/summary.txt"
fi
SECONDS=0
failures=0

note() { echo "$1" | if $dry_run; then cat; else tee -a "$folder/summary.txt"; fi; }

# part NAME LIMIT COMMAND …: run it for at most LIMIT seconds.
part() {
    local name=$1 limit=$2 began=$SECONDS status=0 left=$((60 * MINUTES - SECONDS))
    shift 2
    if $dry_run; then
        printf '%-22s %4d s  %s\n' "$name" "$limit" "$*"
        return
    fi
    if [ "$left" -lt 10 ]; then
        note "$(printf '%-22s left out: %d minutes are over' "$name" "$MINUTES")"
        failures=$((failures + 1))
        return
    fi
    echo "$name …"
    # Inputs from nowhere: a part that asks something must not wait.
    timeout --kill-after=10 "$((limit < left ? limit : left))" "$@" >"$folder/$name.txt" 2>&1 </dev/null || status=$?
    case $status in
    0) note "$(printf '%-22s ok, %d s' "$name" $((SECONDS - began)))" ;;
    124 | 137) note "$(printf '%-22s FAILED: no end after %d s' "$name" $((SECONDS - began)))" ;;
    *) note "$(printf '%-22s FAILED with status %d: %s' "$name" "$status" "$(tail -n 1 "$folder/$name.txt")")" ;;
    esac
    [ $status -eq 0 ] || failures=$((failures + 1))
}

bench() { # bench NAME LIMIT SCRIPT OPTION …
    local name=$1 limit=$2 script=$3
    shift 3
    part "$name" "$limit" "$PYTHON" "benchmarks/$script.py" --device cuda "$@"
}

# Right first, then fast. This card's architecture alone builds in a minute.
part build 240 env TORCH_CUDA_ARCH_LIST="$capability" "$PYTHON" setup.py build_ext --inplace
part doctor_attention 60 "$PYTHON" -m cc_attention
part doctor_abn 60 "$PYTHON" -m libs
small="test_fused_relu_equals_the_cpu or test_attention_against_the_reference or test_a_clip_of_one_frame"
for tool in memcheck racecheck synccheck; do
    for package in cc_attention libs; do
        part "${tool}_$package" 60 compute-sanitizer --tool $tool --error-exitcode 9 "$PYTHON" -m $package
    done
done
part memcheck_tests 120 compute-sanitizer --tool memcheck --error-exitcode 9 \
    "$PYTHON" -m pytest -q -x -p no:cacheprovider tests/test_cuda.py tests/libs/test_cuda.py -k "$small"
part pytest_cuda 300 "$PYTHON" -m pytest -q -m cuda -p no:cacheprovider --numprocesses 4 --durations=10

for dtype in bfloat16 float16 float32; do
    bench "attention_$dtype" 90 attention --batch 8 --dtype $dtype --json "$folder/attention_$dtype.json"
done
bench attention_tf32 60 attention --batch 8 --tf32 --criss-cross-only --json "$folder/attention_tf32.json"
bench attention_clips 60 attention --batch 2 --dtype bfloat16 --frames 5 --json "$folder/attention_clips.json"
bench claims 60 claims --json "$folder/claims.json"
bench heads 60 heads
bench abn 60 abn --shape 8,256,97,97
for dtype in float32 bfloat16; do
    bench "memory_$dtype" 90 memory --batch 8 --dtype $dtype --json "$folder/memory_$dtype.json"
done
bench train_step 120 train_step --batch 8 --json "$folder/train_step.json"
bench train_step_unfused 90 train_step --batch 8 --compare-unfused --json "$folder/train_step_unfused.json"
bench train_step_ccl 90 train_step --batch 8 --compare-ccl --json "$folder/train_step_ccl.json"
part loader 60 "$PYTHON" benchmarks/loader.py --json "$folder/loader.json"
part sass 120 "$PYTHON" benchmarks/sass.py

run=(--data-dir "$folder/demo" --input-size 193,257 --batch-size 8 --random-scale 0 --ohem 0 --learning-rate 0.02)
part demo 60 "$PYTHON" -m dataset.demo "$folder/demo" --train 64 --val 12 --size 256,512
part train 120 "$PYTHON" train.py "${run[@]}" --gpu 0 --amp bf16 --num-steps 200 --snapshot-dir "$folder/train"
part evaluate 60 "$PYTHON" evaluate.py --data-dir "$folder/demo" --restore-from "$folder/train" --whole \
    --output-dir "$folder/evaluate"
part train_recipe 180 "$PYTHON" train.py --data-dir "$folder/demo" --gpu 0 --amp bf16 --batch-size 8 --num-steps 30 \
    --snapshot-dir "$folder/train_recipe"
if [ "$gpus" -gt 1 ]; then
    part train_replicas 120 "$PYTHON" train.py "${run[@]}" --gpu 0,1 --num-steps 30 \
        --snapshot-dir "$folder/train_replicas"
    part train_processes 120 "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 2 train.py "${run[@]}" \
        --num-steps 30 --snapshot-dir "$folder/train_processes"
fi

if $dry_run; then exit 0; fi
note "$failures parts failed or were left out, after $((SECONDS / 60)) minutes; all is in $folder"
[ "$failures" -eq 0 ]
