"""Every operation of the model and the optimizers in plain array code, forward and backward side by side.

Each function takes the array module first (`xp`: numpy or cupy) and writes its results into arrays it is given.
Two contracts hold everywhere: activations and their gradients are overwritten; gradients of parameters are overwritten
when `accumulate` is false and added to when it is true. These functions are what every other implementation is
checked against.
"""
