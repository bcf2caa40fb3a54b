"""The layers of the model, a file each: parameters, planned arrays, forward and backward of one layer together."""
