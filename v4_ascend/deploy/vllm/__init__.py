"""The engine `vllm`: what starts it on each host for a plan, and how it is watched."""
