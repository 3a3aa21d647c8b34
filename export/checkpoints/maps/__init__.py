"""Key maps as data, one module a family: which tensors of a checkpoint make up each tensor of our backbone.

A map holds up to six tables, read by :mod:`lehr.export.checkpoints.rules`:

    DIFFUSERS           rules for a diffusers folder
    DIFFUSERS_IGNORED   patterns of keys there that the backbone does not need
    DIFFUSERS_OLD       rules for a folder that uses diffusers' former names of attention layers
    ORIGINAL            rules for the authors' single file; empty where our names are theirs
    ORIGINAL_IGNORED    patterns of keys there that the backbone does not need
    MARKER              some of our keys that, together, only this family has; what recognises a file at a glance
    READS               what the tables read, for the table of models in the documents

Where block numbers depend on the blocks of a level, ``diffusers_rules(num_res_blocks)`` makes the rules and
``DIFFUSERS`` holds those of the released models.

A key of ours that no rule names is looked up under its own name.
"""
