"""The lab: train small language models and compare optimizers on them (`pip install "ademamix[lab]"`).

config.py    what a run is: typed settings and presets
corpus.py    text to token files
tokens.py    token files to batches
schedule.py  the learning rate over a run
model.py     the language model and its loss
train.py     the one training loop, with checkpoints and exact resume
compare.py   AdamW against AdEMAMix on equal terms
budget.py    what memory a training needs, counted without it
report.py    a comparison as one HTML page, a picture and a table
console.py   what a run shows while it works
cli.py       the commands
"""
