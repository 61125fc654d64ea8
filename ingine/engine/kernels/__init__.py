"""The kernels of a model: attention, layers and sampling, in torch, C++ and Triton. `select` chooses."""
