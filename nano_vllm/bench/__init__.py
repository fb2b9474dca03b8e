"""`python -m nano_vllm.bench throughput|latency|prefill|startup|serve|kernels`: a table for people,
one JSON line for machines.
"""
