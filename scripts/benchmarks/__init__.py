"""What `scripts/bench` measures, one module for each group of rows.

main: options and the order of things. table: rows, verdicts, output. tools: scratch files, compiler, the C baselines.
guests: the machine code that is run. exits, startup, linux_boot, resources: the rows. in_host, sixteen: programs that
these start, the one in the emulated host, the other in a process of its own.
"""
