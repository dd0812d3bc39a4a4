#!/usr/bin/env bash
# Train and evaluate CCNet, set-up included.
#
#   ./run_local.sh                                  a few minutes on synthetic streets, on a CPU or a GPU
#   ./run_local.sh /path/to/cityscapes [OPTION …]   the published recipe on all visible GPUs
#
# OPTIONs go to train.py after the recipe's, so they win. Run again after an interruption, it continues.
# Variables: BACKBONE=resnet101-imagenet.pth, the ImageNet weights of the recipe ("none": start from random
# weights); DEMO_STEPS=300, the length of the demo.
set -euo pipefail
data=${1:+$(realpath -m -- "$1")}
backbone=${BACKBONE:-resnet101-imagenet.pth}
[ "$backbone" = none ] || backbone=$(realpath -m -- "$backbone")
cd "$(dirname "$0")"
source ./environment.sh
use_environment requirements.txt

demo() {
    local steps=${DEMO_STEPS:-300}
    "$PYTHON" -m dataset.demo data/demo --train 64 --val 12 --size 256,512
    "$PYTHON" train.py --data-dir data/demo --snapshot-dir snapshots/demo --resume \
        --backbone resnet18 --input-size 193,257 --batch-size 4 --num-steps "$steps" --ohem 0 \
        --save-pred-every 100
    "$PYTHON" evaluate.py --data-dir data/demo --restore-from snapshots/demo --whole --save \
        --output-dir results/demo
    echo "pictures (image, label, prediction): results/demo/panels/"
    echo "TensorBoard: $PYTHON -m tensorboard.main --logdir snapshots/demo"
}

published() {
    local gpus launch=("$PYTHON") weights=(--restore-from "$backbone")
    if [ "$backbone" = none ]; then
        weights=()
    elif [ ! -f "$backbone" ]; then
        echo "error: no $backbone: the recipe starts from ImageNet weights, to be had from" >&2
        echo "http://sceneparsing.csail.mit.edu/model/pretrained_resnet/resnet101-imagenet.pth" >&2
        echo "(BACKBONE=/path/to/it names another place, BACKBONE=none starts from random weights)" >&2
        exit 1
    fi
    gpus=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())')
    while [ "$gpus" -gt 1 ] && [ $((8 % gpus)) -ne 0 ]; do gpus=$((gpus - 1)); done # share a batch of 8
    if [ "$gpus" -gt 1 ]; then
        launch=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$gpus")
    elif [ "$gpus" -eq 0 ]; then
        echo "note: no GPU is visible; on a CPU the recipe takes months"
    fi
    "${launch[@]}" train.py --data-dir "$data" --snapshot-dir snapshots/cityscapes --resume \
        "${weights[@]}" --backbone resnet101 --recurrence 2 --norm sync \
        --ohem 1 --ohem-thres 0.7 --ohem-keep 100000 --input-size 769,769 --batch-size 8 \
        --num-steps 60000 --learning-rate 1e-2 --weight-decay 1e-4 "$@"
    "$PYTHON" evaluate.py --data-dir "$data" --restore-from snapshots/cityscapes --save \
        --output-dir results/cityscapes
    echo "pictures (image, label, prediction): results/cityscapes/panels/"
    echo "TensorBoard: $PYTHON -m tensorboard.main --logdir snapshots/cityscapes"
}

if [ -z "$data" ]; then demo; else shift; published "$@"; fi
