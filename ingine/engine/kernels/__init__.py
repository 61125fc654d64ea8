"""What computes a model: attention, layers, and kernels in C++ and Triton. `select` chooses."""
