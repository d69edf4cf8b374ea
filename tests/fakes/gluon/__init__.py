"""Gluon kernels for Hopper, run on the CPU once ``language.emulate`` has been called.

Each duty of a program's warps is a thread of which one runs at a time, in an order drawn from a seed. Copies of the
tensor memory accelerator end at any later moment, products of the matrix units when they are waited for. What no
barrier orders is found in any order (``races``). So a wait that is missing, a stage that is given back too early and an
agreement that cannot end are errors here, where a GPU gives a wrong number now and then.
"""
