"""What the bundled model learns from: tasks made by seed, in the form the services see them.

`tasks` names them, `stream` draws samples, `encode` lays them out by the serving code itself,
`packing` joins them to batches.
"""
