"""Moving a machine to another process while its guest runs: see `source.migrate` and `target.receive`.

Both ends speak over one connection (`wire`). The source sends RAM while the guest writes to it, then again what has
changed, until the rest is so little that it is sent with the guest standing still. The hand-over has three steps, so
that the guest never runs twice: the target has loaded everything (LOADED), the source lets go (GO), the target says
that it takes over (MINE) before its first instruction. Until it has let go, the source goes on whatever happens to the
target. After that it goes on only if it is certain that the target has not taken over. Disks change hands with the
machine (`disks`); with post-copy its last pages follow over a second connection (`postcopy`).
"""
