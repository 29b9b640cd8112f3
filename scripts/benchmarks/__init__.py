"""What `scripts/bench` measures, one module for each group of rows.

main: options and the order of things. table: rows, verdicts, output. tools: scratch files, compiler, the C baselines.
guests: the machine code that is run. profile_file: large profiles. exits, startup, linux_boot, disk, profile, migration
and resources: the rows. in_host, in_host_profile, read_profile, sixteen: programs that these start, in the emulated
host or in processes of their own.
"""
