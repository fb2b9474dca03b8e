"""`python -m nano_vllm.bench throughput|latency|prefill|startup|kernels`: a table for people, one
JSON line for machines.
"""
