"""Reference implementation of every operation of models and optimizers in array code, each forward with its backward.

The first parameter of each function is the array module (`xp`: numpy or cupy); results are written to arrays passed in.
Two contracts hold everywhere: activations and their gradients are overwritten; parameter gradients are overwritten if
`accumulate` is false and added to if it is true. All other implementations are tested against these functions.
"""
