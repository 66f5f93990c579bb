"""CellProfiler's feature families as batch kernels, one family a file. Floor 1: numpy, numba.

A family has two functions: one that lists its feature names for given channels, and one that
takes a `Batch` and returns float64 values of shape (images, compartments, features) in the order
of those names. Values of empty masks are not defined here; `measurement` overwrites them with NaN.
The other files are shared: the batch, distances, sorting, and what segmentation is made of.
"""
