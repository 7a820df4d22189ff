#!/usr/bin/env bash
# Train an image model with AdEMAMix by timm's own train.py, which is in timm's repository:
#
#     examples/timm_train.sh path/to/train.py DATA [more options of train.py]
#
# DATA has the folders train/CLASS/IMAGE and validation/CLASS/IMAGE. PYTHON, GPUS, EPOCHS, BATCH, MODEL and LR are
# environment variables.
set -euo pipefail

train=${1:?the path of timm\'s train.py} data=${2:?the folder of the images}
shift 2
gpus=${GPUS:-1} epochs=${EPOCHS:-300} batch=${BATCH:-256} # images per GPU and step

# AdEMAMix's settings follow from the number of steps; timm leaves out each epoch's last, smaller batch.
images=$(find -L "$data/train" -type f | wc -l)
steps=$((epochs * (images / gpus / batch)))
echo "$images images, $steps steps"

launch=("${PYTHON:-python}")
if [ "$gpus" -gt 1 ]; then
    launch+=(-m torch.distributed.run --standalone --nproc-per-node "$gpus")
fi

# About half of AdamW's learning rate; its weight decay and its two betas.
"${launch[@]}" -m ademamix.integrations.timm "$train" \
    --data-dir "$data" --model "${MODEL:-vit_small_patch16_224}" \
    --epochs "$epochs" --batch-size "$batch" --warmup-epochs 5 --sched-on-updates \
    --opt ademamix --opt-betas 0.9 0.999 --opt-kwargs total_steps=$((steps < 100 ? 100 : steps)) \
    --lr "${LR:-5e-4}" --weight-decay 0.05 --clip-grad 1.0 \
    "$@"
