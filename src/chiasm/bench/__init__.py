"""The load generator behind `chiasm bench serve`.

settings -> workload and arrivals (what is sent, and when) -> runner (sends it through a backend)
-> records -> summary -> report. Only `grpc_backend` knows grpc and only `openai_backend` httpx.
"""
