"""The lab: train small models, compare optimizers, and redo the paper's experiments (`pip install "ademamix[lab]"`).

cli.py         the commands
plan.py        what memory a run needs, counted without it
checkpoints.py a run's weights, for other programs
experiments/   the paper's experiments and ours, one file each; trials.py: many runs at a time, kept by Optuna;
               compare.py: AdamW against another optimizer on equal terms; arms.py: its two runs; workers.py: processes
               that train; statistics.py: means and their errors; kernels.py: what an optimizer remembers, measured
reports/       what came out, as a page, Markdown and tables; claims.py: the paper's claims, and what decides them
training/      loop.py: the one training loop, exact to the bit across stops; checkpoints, processes, devices, models,
               tasks, the learning rate, and optimizers by their names
data/          text to token files, images to files of pixels, and both to batches
config.py      what a run is: typed settings and presets
console.py     what a run shows while it works
files.py       folders that are written whole or not at all
own_code.py    the user's own rules: a command runs only files that it names
signals.py     SIGTERM as an exception, so that what was begun is cleaned up
values.py      settings typed as NAME=VALUE
"""
