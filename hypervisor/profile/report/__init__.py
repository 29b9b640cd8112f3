"""A profile for people and for other tools: text, JSON, HTML, folded stacks, Perfetto, Prometheus."""
