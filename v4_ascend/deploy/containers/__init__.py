"""Files for pods and containers: each host of a plan starts by itself."""
