"""`python -m nano_vllm.bench throughput|latency|kernels`: a table for people, one JSON line for
machines.
"""
