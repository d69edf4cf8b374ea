"""In-situ quantization: full-precision weights become integers with scales while a model loads.

One file per method, all of them functions of a weight and of what its input looks like; ``walk`` applies them layer by
layer. Knows neither the server nor how a device packs what comes out.
"""
