"""``fastalign plan``: memory, communication and time of a run, from its settings alone.

    settings, a number of devices, lengths of prompts and answers             `setting.Setting`
        |
    one rank's model on the meta device, run over a few packed prompts        `footprint.footprint`
        |                                                                     every byte that autograd keeps is counted
    bytes of a rank by kind, and where they are most                          `memory.memory`
    operations, bytes moved, seconds of a step                                `speed.speed`
        |
    what fits: the largest micro-batch, or settings                           `search`
        |
    tables, JSON, YAML                                                        `show`

Parameters, gradients, moments, activations and gathered weights are counted; times are modelled, from the assumptions
that are printed beside them.
"""
