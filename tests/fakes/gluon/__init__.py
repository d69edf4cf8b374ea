"""Gluon kernels for Hopper, run on the CPU.

Each duty of a program's warps is a thread of which one runs at a time, in an order drawn from a seed. Copies of the
tensor memory accelerator and products of the matrix units end at any later moment, or never when nobody waits. So a
wait that is missing, a stage that is given back too early and an agreement that cannot end are errors here, where a GPU
gives a wrong number now and then.
"""
