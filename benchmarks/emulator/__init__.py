"""Runs on a CPU what Triton compiles for an NVIDIA GPU: its PTX, instruction by instruction.

Triton's own interpreter runs a kernel's source, without pipelines, shared memory, matrix instructions, or products of
bfloat16. Here all of these are run as they were compiled: machine.cpp is the machine, program.py reads PTX for it, and
driver.py lets Triton launch on it. Only what the project's kernels are compiled to is known; anything else is an error.

What comes after PTX is not seen: the assembler's work, time, and races between blocks. After NVIDIA's "Parallel Thread
Execution ISA".
"""
