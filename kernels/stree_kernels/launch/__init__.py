"""How kernels are launched: dependent launch, shared memory, and the rows that ops exchange."""
