"""Load over HTTP, and the benchmark against other libraries; imports nothing of ours."""
