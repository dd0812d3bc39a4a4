#!/usr/bin/env bash
# Train and evaluate CCNet, set-up included.
#
#   ./run_local.sh                                  a few minutes on synthetic streets, on a CPU or a GPU
#   ./run_local.sh /path/to/cityscapes [OPTION …]   the published recipe on the visible GPUs
#
# OPTIONs go to train.py after the recipe's, so they win. Run again after an interruption, it continues.
# Variables: BACKBONE=resnet101-imagenet.pth, the ImageNet weights of the recipe ("none": start from random
# weights); DEMO_STEPS=300 and DEMO_SIZE=256,512, the demo's length and its images' height and width.
set -euo pipefail
fail() { echo "run_local.sh: error: $2" >&2; exit "$1"; }

case "${1:-}" in
-h | --help) sed -n '2,/^set -/s/^# \{0,1\}//p' "$0"; exit 0 ;;
-*) fail 2 "expected the path of a Cityscapes folder, got $1 (see --help)" ;;
esac
for option in "${@:2}"; do
    case "$option" in
    --data-dir* | --snapshot-dir*) fail 2 "$option is set here; call train.py and evaluate.py yourself to choose it" ;;
    esac
done
data=${1:+$(realpath -m -- "$1")}
backbone=${BACKBONE:-resnet101-imagenet.pth}
if [ -f "$backbone" ]; then backbone=$(realpath -- "$backbone"); fi
cd "$(dirname "$0")"
if [ -n "$data" ]; then
    [ -d "$data" ] || fail 1 "$data: no such data folder"
    [ "$backbone" = none ] || [ -f "$backbone" ] || fail 1 "no $backbone here: the recipe starts from ImageNet weights, \
to be had from http://sceneparsing.csail.mit.edu/model/pretrained_resnet/resnet101-imagenet.pth \
(BACKBONE=/path/to/it names another place, BACKBONE=none starts from random weights)"
fi
source ./environment.sh
use_environment requirements.txt
build_kernels

demo() {
    local steps=${DEMO_STEPS:-300}
    "$PYTHON" -m dataset.demo data/demo --train 64 --val 12 --size "${DEMO_SIZE:-256,512}"
    # Short as it is, the run learns more from images at the size that they are evaluated at.
    "$PYTHON" train.py --data-dir data/demo --snapshot-dir snapshots/demo --resume \
        --backbone resnet18 --input-size 193,257 --batch-size 4 --num-steps "$steps" \
        --learning-rate 0.02 --random-scale 0 --ohem 0 --save-pred-every 100
    "$PYTHON" evaluate.py --data-dir data/demo --restore-from snapshots/demo --whole --save \
        --output-dir results/demo
    echo "pictures (image, label, prediction): results/demo/panels/"
    echo "TensorBoard: $PYTHON -m tensorboard.main --logdir snapshots/demo"
}

published() {
    local gpus launch=("$PYTHON") weights=(--restore-from "$backbone")
    if [ "$backbone" = none ]; then weights=(); fi
    gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
    while [ "$gpus" -gt 1 ] && [ $((8 % gpus)) -ne 0 ]; do gpus=$((gpus - 1)); done # share a batch of 8
    if [ "$gpus" -gt 1 ]; then
        launch=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$gpus")
    elif [ "$gpus" -eq 0 ]; then
        echo "note: no GPU is visible; on a CPU the recipe takes months"
    fi
    "${launch[@]}" train.py --data-dir "$data" --snapshot-dir snapshots/cityscapes --resume \
        "${weights[@]}" --backbone resnet101 --recurrence 2 \
        --ohem 1 --ohem-thres 0.7 --ohem-keep 100000 --input-size 769,769 --batch-size 8 \
        --num-steps 60000 --learning-rate 1e-2 --weight-decay 1e-4 --val-every 5000 "$@"
    "$PYTHON" evaluate.py --data-dir "$data" --restore-from snapshots/cityscapes --save \
        --output-dir results/cityscapes
    echo "pictures (image, label, prediction): results/cityscapes/panels/"
    echo "TensorBoard: $PYTHON -m tensorboard.main --logdir snapshots/cityscapes"
}

if [ -z "$data" ]; then demo; else shift; published "$@"; fi
