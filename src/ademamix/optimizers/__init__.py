"""What a user instantiates: each class names a memory and a geometry, its hyperparameters and their coefficients."""
