"""The lab: train small models, compare optimizers, and redo the paper's experiments (`pip install "ademamix[lab]"`).

config.py      what a run is: typed settings and presets
values.py      settings typed as NAME=VALUE
optimizers.py  which optimizer is meant, a rule of the user's among them, and its arguments
corpus.py      text to token files; tokens.py: token files to batches
images.py      images to files of pixels, and to batches
files.py       folders that are written whole or not at all
model.py       the models
tasks.py       what is learned: model, batches and loss of a recipe
schedule.py    the learning rate over a run
devices.py     which device, and how long things take there
processes.py   the processes of a training under torchrun
checkpoints.py checkpoints: complete, checked, without code in them
train.py       the one training loop, exact to the bit across stops
trials.py      many runs at a time: grids of them, kept by Optuna
compare.py     AdamW against AdEMAMix, or another, on equal terms
kernels.py     what an optimizer remembers, measured
experiments/   the paper's experiments and ours, one file each
claims.py      the paper's claims, and the criteria that decide them
pictures.py    charts and heat maps, for the page and for files
report.py      what came out, as a page, Markdown and tables; the index of reports
budget.py      what memory a training needs, counted without it
console.py     what a run shows while it works
cli.py         the commands
"""
