"""Captured graphs that outlive the process: what a later one need not capture again.

Dynamo takes ten seconds to capture LatentSync's UNet and the passes take three, however full the
caches of compiled code are. So the rewritten graph is kept on disk
(:mod:`lsync_compile.compile_cache`), and a later process that finds it goes on from there
(:mod:`.call`). What dynamo does to be sure that a graph is right is done here by other means:
the key says all that the capture has read (:mod:`.state`), and before each call everything that may
have changed since is compared (:class:`.state.Watch`).
"""
