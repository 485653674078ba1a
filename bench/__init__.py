"""How fast the kernels are: against the machine's floor, and against what one would use instead."""
