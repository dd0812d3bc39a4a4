#!/usr/bin/env bash
# Train and evaluate Mask R-CNN with criss-cross attention, set-up included.
#
#   instances/run_local.sh                            some minutes on the hundred images of
#                                                     ../shared/data/coco_tiny, else on images that it draws
#   instances/run_local.sh /path/to/coco [OPTION …]   the published setting on the visible GPUs
#
# OPTIONs go to instances.train after the setting's, so they win. Run again after an interruption, it continues.
# Variables: STEPS=300, the length of the short run; WEIGHTS=imagenet, what the published setting starts from
# (a file, or "none"); TINY=../shared/data/coco_tiny, real images for the short run ("none": draw some).
set -euo pipefail
fail() { echo "run_local.sh: error: $2" >&2; exit "$1"; }

case "${1:-}" in
-h | --help) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;;
-*) fail 2 "expected the path of a COCO folder, got $1 (see --help)" ;;
esac
for option in "${@:2}"; do
    case "$option" in
    --data-dir* | --snapshot-dir* | --resume*) fail 2 "$option is set here; call instances.train yourself to choose it" ;;
    esac
done
data=${1:+$(realpath -m -- "$1")}
cd "$(dirname "$0")/.."
if [ -n "$data" ] && [ ! -d "$data" ]; then fail 1 "$data: no such data folder"; fi
source ./environment.sh
PYTHON=.venv-instances/bin/python

# An environment of its own: no torchvision works beside the CPU build of PyTorch in .venv.
use_own_environment() {
    local wanted=instances/requirements.txt
    if cmp --silent "$wanted" .venv-instances/installed.txt; then return; fi
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail 1 "Python 3.11 or later is needed; python3 is $(python3 --version 2>&1)"
    echo "environment: installing $wanted into .venv-instances (5.5 GB, a minute or more, once)"
    "$PYTHON" -m pip --version >/dev/null 2>&1 || python3 -m venv --clear .venv-instances ||
        fail 1 "python3 cannot make a virtual environment; on Debian: apt install python3-venv"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$wanted" ||
        fail 1 "installing $wanted failed, see above; run this again once that is mended"
    cp "$wanted" .venv-instances/installed.txt
}

short_run() {
    local tiny=${TINY:-../shared/data/coco_tiny} imagenet=../shared/data/imagenet/resnet18_imagenet_fp16.pth.xz
    local folder name split weights=none
    if [ -f "$tiny/annotations/instances_train2017.json" ]; then
        # Too few images to learn from; what can be seen is that their instances are fitted.
        folder=$tiny name=coco_tiny split=train2017
        if [ -f "$imagenet" ]; then
            weights=data/resnet18_imagenet.pth
            mkdir -p data
            "$PYTHON" -c 'import lzma, sys; open(sys.argv[2], "wb").write(lzma.open(sys.argv[1]).read())' \
                "$imagenet" "$weights"
        fi
    else
        folder=data/shapes name=shapes split=val2017
        "$PYTHON" -m instances.demo "$folder"
    fi
    "$PYTHON" -m instances.train --data-dir "$folder" --snapshot-dir "snapshots/$name" --resume \
        --backbone resnet18 --recurrence 2 --weights "$weights" --norm frozen --min-size 160 --max-size 224 \
        --anchor-size 8 --roi-samples 32 --proposals 256 --batch-size 1 --num-steps "${STEPS:-300}" \
        --learning-rate 0.006 --warm-up 50 --save-every 100
    "$PYTHON" -m instances.evaluate --data-dir "$folder" --split "$split" --restore-from "snapshots/$name" \
        --output-dir "results/$name"
    echo "pictures (image, annotated, detected): results/$name/pictures/"
    echo "TensorBoard: $PYTHON -m tensorboard.main --logdir snapshots/$name"
}

published() {
    local gpus launch=("$PYTHON")
    gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
    while [ "$gpus" -gt 1 ] && [ $((16 % gpus)) -ne 0 ]; do gpus=$((gpus - 1)); done # share a batch of 16
    if [ "$gpus" -gt 1 ]; then
        launch=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$gpus")
    elif [ "$gpus" -eq 0 ]; then
        echo "note: no GPU is visible; on a CPU this setting takes months"
    fi
    if [ "$gpus" -gt 0 ] && [ ! -e cc_attention/_C.abi3.so ]; then build_kernels; fi
    "${launch[@]}" -m instances.train --data-dir "$data" --snapshot-dir snapshots/coco --resume \
        --weights "${WEIGHTS:-imagenet}" --backbone resnet50 --recurrence 2 --batch-size 16 "$@"
    "${launch[@]}" -m instances.evaluate --data-dir "$data" --restore-from snapshots/coco --output-dir results/coco
}

use_own_environment
if [ -z "$data" ]; then short_run; else shift; published "$@"; fi
