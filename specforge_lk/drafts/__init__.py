"""Draft architectures that SpecForge lacks: MEDUSA, the MLP speculator and MTP.

All three read the target's last hidden state and propose a chain, head by head. They share one
training model (`training`), one base class (`model`) and one form of registration (`algorithms`);
each brings its module and its config. Registering them imports neither torch nor transformers.
"""
